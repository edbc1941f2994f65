"""Published PyTorch checkpoints into `Atma`, without PyTorch.

A published checkpoint is a directory with ``weights.pt`` (``{"model": state_dict}``, PyTorch's zip format),
``config.json`` and ``tokenizer.json``. Layer 3. The pickle inside ``weights.pt`` is read by an unpickler that knows tensors
and nothing else: any other name in it is refused, so a hostile file cannot run code.
"""

from __future__ import annotations

import collections
import json
import pathlib
import pickle
from typing import Any
import zipfile

from flax import nnx
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from atma_jax.config import MemoryConfig, ModelConfig, UserError
from atma_jax.models import Atma

STORAGE_DTYPES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
                  "BFloat16Storage": ml_dtypes.bfloat16}


def load_pytorch(directory: str | pathlib.Path) -> Atma:
  """The model of a published checkpoint directory, weights in its `param_dtype` (float32).

  Raises:
    UserError: a file is missing or malformed, or a tensor is missing, unexpected or of the wrong shape (named).
  """
  directory = pathlib.Path(directory)
  tensors = read_state_dict(directory / "weights.pt")
  return from_state_dict(tensors, model_config(directory / "config.json", tensors), str(directory))


def model_config(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> ModelConfig:
  """Our configuration for a published ``config.json``; head counts and widths are read off the tensors."""
  try:
    published = json.loads(path.read_text())
    config = ModelConfig(
      vocab_size=published["vocab_size"],
      num_layers=published["num_hidden_layers"],
      width=published["hidden_size"],
      head_dim=published["head_dim"],
      attention=published["attn_type"],
      window=published["attn_window"],
      memory=MemoryConfig(enabled=published["mem_enabled"], gamma_bias=published["mem_gamma_bias"],
                          beta_bias=published["mem_beta_bias"]),
      conv_taps=published["conv_kernel_size"],
      canon_taps=published["attn_kernel_size"],
      norm_eps=published["rms_norm_eps"],
      activation_dtype=published["dtype"],
    )
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file; a published checkpoint has weights.pt and config.json") from error
  except (json.JSONDecodeError, KeyError) as error:
    raise UserError(f"{path}: not a published configuration: {error!r} is missing or malformed") from error
  first_global = config.block_pattern.index("global")
  config.num_heads = _tensor(tensors, f"blocks.{first_global}.attn.proj.weight", path).shape[1] // config.head_dim
  config.num_kv_heads = _tensor(tensors, f"blocks.{first_global}.attn.k.weight", path).shape[0] // config.head_dim
  config.mlp_width = _tensor(tensors, "blocks.0.mlp.proj.weight", path).shape[1]
  return config


def from_state_dict(tensors: dict[str, np.ndarray], config: ModelConfig, source: str = "state_dict") -> Atma:
  """An `Atma` holding these published tensors; every one of them must be used and none may be missing."""
  names = parameter_names(config)
  unexpected = sorted(set(tensors) - {name for layer_names, _ in names.values() for name in layer_names})
  if unexpected:
    raise UserError(f"{source}: unexpected tensor {unexpected[0]!r} for attention={config.attention!r}, "
                    f"memory={config.memory.enabled} ({len(unexpected)} in all)")
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  graphdef, abstract = nnx.split(model, nnx.Param)
  loaded = []
  for path, param in nnx.to_flat_state(abstract):
    layer_names, stacked = names[path]
    arrays = [_to_ours(_tensor(tensors, name, source), path[-1]) for name in layer_names]
    value = np.stack(arrays) if stacked else arrays[0]
    if value.shape != param.shape:
      raise UserError(f"{source}: tensor {layer_names[0]!r} gives shape {value.shape}, the configuration wants {param.shape}")
    loaded.append((path, param.replace(jnp.asarray(value, param.dtype))))
  return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def parameter_names(config: ModelConfig) -> dict[tuple, tuple[list[str], bool]]:
  """Our parameter path -> (published names, one per stacked layer; whether they are stacked)."""
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  pattern = len(config.block_pattern)
  repeats = config.num_layers // pattern
  names = {}
  for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if path[0] in ("groups", "tail"):
      layer = path[2]
      leaf = _published_leaf(path[3:], config.block_pattern[layer])
      layers = [g * pattern + layer for g in range(repeats)] if path[0] == "groups" else [repeats * pattern + layer]
      names[path] = ([f"blocks.{i}.{leaf}" for i in layers], path[0] == "groups")
    else:
      top = {("embed", "embedding"): "embed.weight", ("head", "kernel"): "proj.weight", ("head", "bias"): "proj.bias",
             ("norm", "weight"): "norm.weight"}
      names[path] = ([top[path]], False)
  return names


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of ``weights.pt``, by name."""
  try:
    with zipfile.ZipFile(path) as archive:
      root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
      content = _TensorUnpickler(archive, root).load()
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file") from error
  except (zipfile.BadZipFile, StopIteration, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
    raise UserError(f"{path}: not a PyTorch checkpoint of tensors: {error}") from error
  if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
    raise UserError(f"{path}: must hold {{'model': state_dict}}")
  return {name.removeprefix("_orig_mod."): tensor for name, tensor in content["model"].items()}


class _TensorUnpickler(pickle.Unpickler):
  """Reads tensors, dicts and plain values; refuses every other global."""

  def __init__(self, archive: zipfile.ZipFile, root: str):
    super().__init__(archive.open(root + "data.pkl"))
    self._archive, self._root = archive, root

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _rebuild_tensor
    if module == "torch" and name in STORAGE_DTYPES:
      return STORAGE_DTYPES[name]
    raise pickle.UnpicklingError(f"refused global {module}.{name}")

  def persistent_load(self, pid: tuple) -> np.ndarray:
    kind, dtype, key, _, size = pid
    if kind != "storage":
      raise pickle.UnpicklingError(f"refused persistent id of kind {kind!r}")
    return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), dtype, count=size)


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *unused: Any) -> np.ndarray:
  del unused  # requires_grad and backward hooks
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if all(shape) else offset
  if min((offset, *strides, *shape)) < 0 or last >= max(storage.size, 1):
    raise pickle.UnpicklingError("tensor reaches outside its storage")
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, [s * storage.itemsize for s in strides])


def _published_leaf(path: tuple[str, ...], kind: str) -> str:
  """A parameter's published name within its block, e.g. ``("mixer", "core", "null_slope")`` -> ``attn.null_slope_raw``.

  The published code calls every output projection ``proj``, except the short convolution's.
  """
  renamed = {"mixer": "attn", "memory": "mem", "gamma": "w_gamma", "beta": "w_beta", "kernel": "weight",
             "null_slope": "null_slope_raw", "len_gain": "len_gain_raw", "mag_beta": "mag_beta_raw"}
  if not (kind == "local" and path[0] == "mixer"):
    renamed["out_proj"] = "proj"
  return ".".join(renamed.get(part, part) for part in path if part != "core")


def _to_ours(tensor: np.ndarray, leaf: str) -> np.ndarray:
  """Kernels (out, in) -> (in, out); filters (channels, 1, taps) -> (taps, channels); the rest as it is."""
  if tensor.ndim == 3:
    return tensor[:, 0].T
  return tensor.T if leaf == "kernel" else tensor


def _tensor(tensors: dict[str, np.ndarray], name: str, source: Any) -> np.ndarray:
  if name not in tensors:
    raise UserError(f"{source}: tensor {name!r} is missing")
  return tensors[name]

"""How the published code names and lays out what `Atma` holds: tensors and configuration, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import json
import math
import pathlib
import re
from typing import Any

from absl import logging
from flax import nnx
import jax.numpy as jnp
import numpy as np

from atma_jax.config import Config, MemoryConfig, ModelConfig
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.pytorch.archive import Shaped, Tensors

# Fields of a published configuration that say how the public code computes, with its defaults; nothing depends on them here.
_RUNTIME_FIELDS = {"num_random_keys": 0, "attn_online": False, "attn_k_block": 512, "attn_kernel": "triton", "mem_chunk": 128,
                   "mem_kernel": "auto"}
# What it has no field for and has only one way of doing; written, under names of ours, where a model does otherwise.
_EXTENSIONS = {"block_pattern": "block_pattern", "logit_cap": "logit_cap", "mem_max_half_life": "memory.max_half_life",
               "attn_null_length": "null_length", "attn_count_length": "count_length",
               "attn_direction_scale": "direction_scale"}


def model_config(path: pathlib.Path, tensors: Tensors) -> ModelConfig:
  """Our configuration for a published ``config.json``; head counts, widths and the dtype of weights are read off the tensors.

  Raises:
    UserError: the file is missing or malformed, or does not describe these tensors.
  """
  return from_published(read_config(path), tensors, path)


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """The fields of a ``config.json``."""
  try:
    published = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file; a published checkpoint has weights.pt and config.json") from error
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path}: not a published configuration: {error}") from error
  if not isinstance(published, dict):
    raise UserError(f"{path}: not a published configuration: must be an object of fields")
  return published


def from_published(published: dict[str, Any], tensors: Tensors, source: Any) -> ModelConfig:
  """Our configuration for the fields of a published one; `source` names it in errors."""
  if published.get("wall_gate_bias") is not None:
    raise UserError(f"{source}: wall_gate_bias={published['wall_gate_bias']!r} is not supported; legal: null")
  try:
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
  except KeyError as error:
    raise UserError(f"{source}: not a published configuration: field {error} is missing") from error
  for name, path in _EXTENSIONS.items():
    if name in published:
      owner, leaf = _owner(config, path)
      value = published[name]
      setattr(owner, leaf, tuple(value) if isinstance(value, list) else value)
  try:
    Config(model=config).validate()
  except UserError as error:
    raise UserError(f"{source}: {error}") from error
  _check_depth(config, tensors, source)
  first_global = next((i for i in range(config.num_layers) if _kind(config, i) == "global"), None)
  if first_global is not None:
    config.num_heads = _matrix(tensors, f"blocks.{first_global}.attn.proj.weight", source)[1] // config.head_dim
    config.num_kv_heads = _matrix(tensors, f"blocks.{first_global}.attn.k.weight", source)[0] // config.head_dim
  config.mlp_width = _matrix(tensors, "blocks.0.mlp.proj.weight", source)[1]
  config.param_dtype = _param_dtype(tensors, source)
  try:
    Config(model=config).validate()
  except UserError as error:
    raise UserError(f"{source}: its tensors give {error}") from error
  return config


def to_published(config: Config) -> dict[str, Any]:
  """The fields of a published configuration; what it has no field for is added under a name of ours, and said."""
  model = config.model
  published = {
    "vocab_size": model.vocab_size,
    "num_hidden_layers": model.num_layers,
    "hidden_size": model.width,
    "head_dim": model.head_dim,
    "attn_kernel_size": model.canon_taps,
    "conv_kernel_size": model.conv_taps,
    "max_position_embeddings": config.data.sequence_length,
    "rms_norm_eps": model.norm_eps,
    "dtype": model.activation_dtype,
    "tie_word_embeddings": False,
    **{name: _RUNTIME_FIELDS[name] for name in ("num_random_keys", "attn_online", "attn_k_block", "attn_kernel")},
    "attn_type": model.attention,
    "wall_gate_bias": None,
    "attn_window": model.window,
    "mem_enabled": model.memory.enabled,
    "mem_chunk": _RUNTIME_FIELDS["mem_chunk"],
    "mem_gamma_bias": model.memory.gamma_bias,
    "mem_beta_bias": model.memory.beta_bias,
    "mem_kernel": _RUNTIME_FIELDS["mem_kernel"],
  }
  for name, path in _EXTENSIONS.items():
    (owner, leaf), (default_owner, _) = _owner(model, path), _owner(ModelConfig(), path)
    if getattr(owner, leaf) != getattr(default_owner, leaf):
      published[name] = getattr(owner, leaf)
      logging.warning("the published format has no field for config.model.%s=%r: written as %r, which the public code does "
                      "not know", path, published[name], name)
  return published


def from_state_dict(tensors: Tensors, config: ModelConfig, source: str = "state_dict") -> Atma:
  """An `Atma` holding these published tensors; every one of them must be used and none may be missing."""
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  graphdef, abstract = nnx.split(model, nnx.Param)
  flat = nnx.to_flat_state(abstract)
  names = _names((path for path, _ in flat), config)
  unexpected = sorted(set(tensors) - {name for layer_names, _ in names.values() for name in layer_names})
  if unexpected:
    raise UserError(f"{source}: unexpected tensor {unexpected[0]!r} for attention={config.attention!r}, "
                    f"memory={config.memory.enabled} ({len(unexpected)} in all)")
  for path, param in flat:  # all of them before the first is read
    layer_names, stacked = names[path]
    for name in layer_names:
      shape = tuple(_tensor(tensors, name, source).shape)
      wanted = _published_shape(param.shape[1:] if stacked else param.shape, path[-1])
      if shape != wanted:
        raise UserError(f"{source}: tensor {name!r} gives shape {shape}, the configuration wants {wanted}")
  loaded = []
  for path, param in flat:
    layer_names, stacked = names[path]
    value = np.empty(param.shape, param.dtype)
    for index, name in enumerate(layer_names):
      value[index if stacked else ...] = _to_ours(np.asarray(tensors[name]), path[-1])
    loaded.append((path, param.replace(jnp.asarray(value))))
  return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def to_state_dict(model: Atma) -> tuple[list[Shaped], Iterator[np.ndarray]]:
  """Name, shape and dtype of every published tensor of a model, layer by layer, and the tensors, each made when asked for."""
  params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  names = _names(params, model.config)
  entries = [(name, path, index if stacked else None) for path, (layer_names, stacked) in names.items()
             for index, name in enumerate(layer_names)]
  top = ("embed.weight", "proj.weight", "proj.bias", "norm.weight")
  entries.sort(key=lambda entry: (0, top.index(entry[0])) if entry[0] in top else (1, int(entry[0].split(".")[1])))
  shapes = [(name, _published_shape(params[path].shape if index is None else params[path].shape[1:], path[-1]),
             np.dtype(params[path].dtype)) for name, path, index in entries]

  def arrays() -> Iterator[np.ndarray]:
    host = {path: np.asarray(param[...]) for path, param in params.items()}  # on a CPU, no copy
    for _, path, index in entries:
      yield _to_published(host[path] if index is None else host[path][index], path[-1])

  return shapes, arrays()


def parameter_names(config: ModelConfig) -> dict[tuple, tuple[list[str], bool]]:
  """Our parameter path -> (published names, one per stacked layer; whether they are stacked)."""
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  return _names((path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))), config)


def _names(paths: Iterable[tuple], config: ModelConfig) -> dict[tuple, tuple[list[str], bool]]:
  pattern = len(config.block_pattern)
  repeats = config.num_layers // pattern
  names = {}
  for path in paths:
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


def _to_published(array: np.ndarray, leaf: str) -> np.ndarray:
  """Inverse of `_to_ours`."""
  if leaf == "weight" and array.ndim == 2:
    return array.T[:, None]
  return array.T if leaf == "kernel" else array


def _published_shape(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
  return _to_published(np.broadcast_to(np.float32(0), shape), leaf).shape


def _owner(config: ModelConfig, path: str) -> tuple[Any, str]:
  *owners, leaf = path.split(".")
  owner = config
  for name in owners:
    owner = getattr(owner, name)
  return owner, leaf


def _kind(config: ModelConfig, layer: int) -> str:
  return config.block_pattern[layer % len(config.block_pattern)]


def _check_depth(config: ModelConfig, tensors: Tensors, source: Any) -> None:
  """Names the first block that is missing: before anything is built for as many layers as the file says."""
  present = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
  missing = next((i for i in range(min(config.num_layers, len(present) + 1)) if i not in present), None)
  if missing is not None:
    raise UserError(f"{source}: num_hidden_layers={config.num_layers}, but tensor 'blocks.{missing}.norm1.weight' is missing")


def _param_dtype(tensors: Tensors, source: Any) -> str:
  """The narrowest dtype that holds every tensor; float64, which nothing here trains in, is rounded to float32."""
  dtype = np.dtype(jnp.result_type(*{np.dtype(tensor.dtype) for tensor in tensors.values()}))
  if dtype == np.float64:
    logging.warning("%s: float64 tensors are rounded to float32", source)
    return "float32"
  return dtype.name


def _matrix(tensors: Tensors, name: str, source: Any) -> tuple[int, int]:
  shape = tuple(_tensor(tensors, name, source).shape)
  if len(shape) != 2 or not math.prod(shape):
    raise UserError(f"{source}: tensor {name!r} gives shape {shape}, must be a matrix")
  return shape


def _tensor(tensors: Tensors, name: str, source: Any) -> Any:
  if name not in tensors:
    raise UserError(f"{source}: tensor {name!r} is missing")
  return tensors[name]

"""Translates parameters of `Atma` to and from tensors with the names and layouts of the published code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.pytorch.archive import Tensors, TensorSpec, required

Path = tuple[Any, ...]  # of a parameter in the tree
Names = dict[Path, tuple[list[str], bool]]  # published names, one per stacked layer, and whether the parameter is stacked


def from_state_dict(tensors: Tensors, config: ModelConfig, source: str = "state_dict") -> Atma:
  """Builds an `Atma` from published tensors, each of which must be used.

  Args:
    tensors: by published name; they are read one at a time.
    config: of the model.
    source: what errors call the tensors' origin.

  Raises:
    UserError: a tensor is missing, unexpected or of the wrong shape.
  """
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  graphdef, abstract = nnx.split(model, nnx.Param)
  flat = nnx.to_flat_state(abstract)
  names = _published_names((path for path, _ in flat), config)
  unexpected = sorted(set(tensors) - {name for layer_names, _ in names.values() for name in layer_names})
  if unexpected:
    raise UserError(f"{source}: unexpected tensor {unexpected[0]!r} for attention={config.attention!r}, "
                    f"memory={config.memory.enabled} ({len(unexpected)} in all)")
  for path, param in flat:  # all shapes are checked before the first tensor is read
    layer_names, stacked = names[path]
    for name in layer_names:
      shape = tuple(required(tensors, name, source).shape)
      expected = _published_shape(param.shape[1:] if stacked else param.shape, path[-1])
      if shape != expected:
        raise UserError(f"{source}: tensor {name!r} gives shape {shape}, the configuration wants {expected}")
  loaded = []
  for path, param in flat:
    layer_names, stacked = names[path]
    value = np.empty(param.shape, param.dtype)
    for index, name in enumerate(layer_names):
      value[index if stacked else ...] = _from_published_layout(np.asarray(tensors[name]), path[-1])
    loaded.append((path, param.replace(jnp.asarray(value))))
  return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def to_state_dict(model: Atma) -> tuple[list[TensorSpec], Iterator[np.ndarray]]:
  """Returns the specs of a model's published tensors, layer by layer, and an iterator that makes the tensors in that order."""
  params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  names = _published_names(params, model.config)
  entries = [(name, path, index if stacked else None) for path, (layer_names, stacked) in names.items()
             for index, name in enumerate(layer_names)]
  top = ("embed.weight", "proj.weight", "proj.bias", "norm.weight")
  entries.sort(key=lambda entry: (0, top.index(entry[0])) if entry[0] in top else (1, int(entry[0].split(".")[1])))
  specs = [(name, _published_shape(params[path].shape if index is None else params[path].shape[1:], path[-1]),
            np.dtype(params[path].dtype)) for name, path, index in entries]

  def arrays() -> Iterator[np.ndarray]:
    host = {path: np.asarray(param[...]) for path, param in params.items()}  # on a CPU, no copy
    for _, path, index in entries:
      yield _to_published_layout(host[path] if index is None else host[path][index], path[-1])

  return specs, arrays()


def parameter_names(config: ModelConfig) -> Names:
  """Returns the published names of every parameter.

  Each path in the parameter tree is mapped to one name, or to one per layer if the parameter is a stack of layers, and to whether
  it is a stack.
  """
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  return _published_names((path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))), config)


def _published_names(paths: Iterable[Path], config: ModelConfig) -> Names:
  """Returns what `parameter_names` does, for given paths."""
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


def _published_leaf(path: Path, kind: str) -> str:
  """Returns a parameter's published name within its block, e.g. ``attn.null_slope_raw`` for ("mixer", "core", "null_slope").

  The published code calls every output projection ``proj``, except that of the short convolution.
  """
  renamed = {"mixer": "attn", "memory": "mem", "gamma": "w_gamma", "beta": "w_beta", "kernel": "weight",
             "null_slope": "null_slope_raw", "len_gain": "len_gain_raw", "mag_beta": "mag_beta_raw"}
  if not (kind == "local" and path[0] == "mixer"):
    renamed["out_proj"] = "proj"
  return ".".join(renamed.get(str(part), str(part)) for part in path if part != "core")


def _from_published_layout(tensor: np.ndarray, leaf: Any) -> np.ndarray:
  """Transposes kernels (out, in) to (in, out) and filters (channels, 1, taps) to (taps, channels); returns the rest as it is."""
  if tensor.ndim == 3:
    return tensor[:, 0].T
  return tensor.T if leaf == "kernel" else tensor


def _to_published_layout(array: np.ndarray, leaf: Any) -> np.ndarray:
  """Inverts `_from_published_layout`."""
  if leaf == "weight" and array.ndim == 2:
    return array.T[:, None]
  return array.T if leaf == "kernel" else array


def _published_shape(shape: tuple[int, ...], leaf: Any) -> tuple[int, ...]:
  """Returns the published shape of a parameter of this shape."""
  return _to_published_layout(np.broadcast_to(np.float32(0), shape), leaf).shape

"""Translates parameters of `Atma` to and from tensors with the names and layouts of the published code.

Two things in a published file are no parameters here: the angular frequencies of rope, a buffer of every global block, which is
checked when it is read, computed when it is written, and may be absent; and the dtype of the embedding, which the published code
keeps in bfloat16 beside float32 weights, and which is written so if it was read so.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

from flax import nnx
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.ops.rotary import BASE
from atma_jax.pytorch.archive import Tensors, TensorSpec, required

ROTARY_BUFFER = "attn.rotary.angular_freq"  # of a global block with rope
_TOP = {("embed", "embedding"): "embed.weight", ("head", "kernel"): "proj.weight", ("head", "bias"): "proj.bias",
        ("norm", "weight"): "norm.weight"}
_RENAMED = {"mixer": "attn", "memory": "mem", "gamma": "w_gamma", "beta": "w_beta", "kernel": "weight",
            "null_slope": "null_slope_raw", "len_gain": "len_gain_raw", "mag_beta": "mag_beta_raw"}
_RAVEN_RENAMED = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "router": "r_proj", "step_size": "a_proj", "log_rate": "A_log",
                  "step_bias": "dt_bias", "out_proj": "o_proj"}
Path = tuple[Any, ...]  # of a parameter in the tree
Names = dict[Path, tuple[list[str], bool]]  # published names, one per stacked layer, and whether the parameter is stacked


def from_state_dict(tensors: Tensors, config: ModelConfig, source: str = "state_dict") -> Atma:
  """Builds an `Atma` from published tensors, each of which must be used.

  Args:
    tensors: by published name; they are read one at a time.
    config: of the model.
    source: what errors call the tensors' origin.

  Raises:
    UserError: a tensor is missing, unexpected or of the wrong shape, or a buffer has values that the model does not compute with.
  """
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  graphdef, abstract = nnx.split(model, nnx.Param)
  flat = nnx.to_flat_state(abstract)
  names = _published_names((path for path, _ in flat), config)
  buffers = _rotary_buffers(config)
  unexpected = sorted(set(tensors) - {name for layer_names, _ in names.values() for name in layer_names} - set(buffers))
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
  for name in buffers:
    if name in tensors:
      _check_rotary_buffer(tensors, name, config.head_dim, source)
  loaded = []
  for path, param in flat:
    layer_names, stacked = names[path]
    value = np.empty(param.shape, param.dtype)
    for index, name in enumerate(layer_names):
      value[index if stacked else ...] = _from_published_layout(np.asarray(tensors[name]), path[-1], len(param.shape) - stacked)
    loaded.append((path, param.replace(jnp.asarray(value))))
  return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def to_state_dict(model: Atma) -> tuple[list[TensorSpec], Iterator[np.ndarray]]:
  """Returns the specs of a model's published tensors, layer by layer, and an iterator that makes the tensors in that order.

  Raises:
    UserError: two parameters of a block of a foreign kind would have the same name.
  """
  params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  names = _published_names(params, model.config)
  frequencies = angular_frequencies(model.config.head_dim)
  entries: list[tuple[TensorSpec, Path, int | None]] = []
  for path, (layer_names, stacked) in names.items():
    for index, name in enumerate(layer_names):
      param = params[path]
      spec = (name, _published_shape(param.shape[1:] if stacked else param.shape, path[-1]), _stored_dtype(name, param))
      entries.append((spec, path, index if stacked else None))
  twice = next((name for name, count in collections.Counter(spec[0] for spec, _, _ in entries).items() if count > 1), None)
  if twice is not None:
    raise UserError(f"two parameters of a block have the published name {twice!r}; such a model can't be written")
  entries += [((name, frequencies.shape, frequencies.dtype), (), None) for name in _rotary_buffers(model.config)]
  top = list(_TOP.values())
  entries.sort(key=lambda entry: (0, top.index(entry[0][0])) if entry[0][0] in top else (1, int(entry[0][0].split(".")[1])))

  def arrays() -> Iterator[np.ndarray]:
    host = {path: np.asarray(param[...]) for path, param in params.items()}  # on a CPU, no copy
    for (_, _, dtype), path, index in entries:
      if not path:
        yield frequencies
      else:
        yield _to_published_layout(host[path] if index is None else host[path][index], path[-1]).astype(dtype, copy=False)

  return [spec for spec, _, _ in entries], arrays()


def angular_frequencies(head_dim: int) -> np.ndarray:
  """Returns the angular frequencies of rope as the published code stores them, (head_dim / 2,) in float32.

  They are ``(1/1024)^linspace(0, 1, head_dim / 4)`` and as many zeros. The exponents are rounded as PyTorch rounds a `linspace`,
  which counts its second half from the end. So the values are PyTorch's to the last bit for heads of 16, 32, 64 and 128, where
  its power is rounded correctly, and to one unit in the last place for others.
  """
  quarter = head_dim // 4
  steps, step = np.arange(quarter), np.float64(np.float32(1) / np.float32(max(quarter - 1, 1)))
  exponents = np.where(steps < max(quarter // 2, 1), step * steps, 1 - step * steps[::-1]).astype(np.float32)
  return np.concatenate([BASE ** -exponents.astype(np.float64), np.zeros(quarter)]).astype(np.float32)


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
      names[path] = ([_TOP[path]], False)
  return names


def _published_leaf(path: Path, kind: str) -> str:
  """Returns a parameter's published name within its block, e.g. ``attn.null_slope_raw`` for ("mixer", "core", "null_slope").

  The published code calls every output projection ``proj``, except those of the short convolution and of Raven.
  """
  renamed = dict(_RENAMED)
  if kind == "raven" and path[0] == "mixer" and path[1] != "memory":
    renamed |= _RAVEN_RENAMED
  elif not (kind == "local" and path[0] == "mixer"):
    renamed["out_proj"] = "proj"
  return ".".join(renamed.get(str(part), str(part)) for part in path if part != "core")


def _rotary_buffers(config: ModelConfig) -> list[str]:
  """Returns the names of the buffers with angular frequencies that a published file of this model holds."""
  if config.attention != "rope":
    return []
  return [f"blocks.{layer}.{ROTARY_BUFFER}" for layer, kind in enumerate(config.layer_kinds) if kind == "global"]


def _check_rotary_buffer(tensors: Tensors, name: str, head_dim: int, source: str) -> None:
  """Raises `UserError` if a buffer does not hold the angular frequencies, up to the rounding of the dtype it is stored in."""
  expected, stored = angular_frequencies(head_dim), tensors[name]
  if tuple(stored.shape) != expected.shape:
    raise UserError(f"{source}: tensor {name!r} gives shape {tuple(stored.shape)}, the configuration wants {expected.shape}")
  # A float32 power is good to a few units in the last place, and no more of a narrower dtype is kept than it can hold.
  tolerance = 8 * float(np.finfo(np.float32).eps) + float(ml_dtypes.finfo(stored.dtype).eps)
  if not np.allclose(np.asarray(stored, np.float64), expected, rtol=tolerance, atol=0):
    raise UserError(f"{source}: tensor {name!r} holds other values than (1/1024)^linspace(0, 1, {head_dim // 4}) and "
                    f"{head_dim // 4} zeros, the angular frequencies of rope here")


def _stored_dtype(name: str, param: nnx.Param) -> np.dtype:
  """Returns the dtype to write a parameter in: its own, but bfloat16 for a float32 embedding that bfloat16 holds exactly."""
  dtype = np.dtype(param.dtype)
  if name != "embed.weight" or dtype != np.float32:
    return dtype
  bits = np.bitwise_or.reduce(np.asarray(param[...]).view(np.uint32), axis=None)
  return dtype if bits & 0xFFFF else np.dtype(ml_dtypes.bfloat16)


def _from_published_layout(tensor: np.ndarray, leaf: Any, axes: int) -> np.ndarray:
  """Transposes matrices (out, in) to (in, out) and filters (channels, 1, taps) to (taps, channels); returns the rest as it is.

  Args:
    tensor: the published tensor.
    leaf: the last part of the parameter's path: "kernel" of matrices, "weight" of filters.
    axes: of the parameter of one layer.
  """
  if leaf == "weight" and axes == 2:
    return tensor[:, 0].T
  return tensor.T if leaf == "kernel" and axes == 2 else tensor


def _to_published_layout(array: np.ndarray, leaf: Any) -> np.ndarray:
  """Inverts `_from_published_layout`."""
  if leaf == "weight" and array.ndim == 2:
    return array.T[:, None]
  return array.T if leaf == "kernel" and array.ndim == 2 else array


def _published_shape(shape: tuple[int, ...], leaf: Any) -> tuple[int, ...]:
  """Returns the published shape of a parameter of this shape."""
  return _to_published_layout(np.broadcast_to(np.float32(0), shape), leaf).shape

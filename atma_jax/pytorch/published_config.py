"""Translates the published ``config.json`` to and from `Config`."""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any

from absl import logging
import jax.numpy as jnp
import numpy as np

from atma_jax.config import Config, MemoryConfig, ModelConfig
from atma_jax.errors import UserError
from atma_jax.pytorch.archive import Tensors, read_json, required

# Published fields that choose how the public code computes, with its defaults. They are written, and never read.
_RUNTIME_FIELDS = {"num_random_keys": 0, "attn_online": False, "attn_k_block": 512, "attn_kernel": "triton", "mem_chunk": 128,
                   "mem_kernel": "auto"}
# Names of ours for fields of `ModelConfig` that the published format lacks, because the public code has one value for them. They
# are written only if a model has another value.
_EXTENSIONS = {"block_pattern": "block_pattern", "logit_cap": "logit_cap", "mem_max_half_life": "memory.max_half_life",
               "mem_reset": "memory_reset", "mem_off": "memory_off", "attn_null_length": "null_length",
               "attn_count_length": "count_length", "attn_direction_scale": "direction_scale"}


def model_config(path: pathlib.Path, tensors: Tensors) -> ModelConfig:
  """Reads a published ``config.json``; numbers of heads, the MLP's width and the dtype of weights are taken from the tensors.

  Raises:
    UserError: the file is missing or malformed, or does not describe these tensors.
  """
  return from_published(read_config(path), tensors, path)


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Reads the fields of a published ``config.json``; raises `UserError` if it is missing or malformed."""
  published = read_json(path, "a published configuration", "a published checkpoint has weights.pt and config.json")
  if not isinstance(published, dict):
    raise UserError(f"{path}: not a published configuration: must be an object of fields")
  return published


def from_published(published: dict[str, Any], tensors: Tensors, source: pathlib.Path | str) -> ModelConfig:
  """Translates published fields, as `model_config` does; errors name their `source`."""
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
    config.num_heads = _matrix_shape(tensors, f"blocks.{first_global}.attn.proj.weight", source)[1] // config.head_dim
    config.num_kv_heads = _matrix_shape(tensors, f"blocks.{first_global}.attn.k.weight", source)[0] // config.head_dim
  config.mlp_width = _matrix_shape(tensors, "blocks.0.mlp.proj.weight", source)[1]
  config.param_dtype = _param_dtype(tensors, source)
  try:
    Config(model=config).validate()
  except UserError as error:
    raise UserError(f"{source}: its tensors give {error}") from error
  return config


def to_published(config: Config) -> dict[str, Any]:
  """Returns the published fields of a configuration, and logs a warning for each field that only this package knows."""
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
      logging.warning("the published format has no field for config.model.%s=%r: it is written as %r, which the public code "
                      "ignores", path, published[name], name)
  return published


def _owner(config: ModelConfig, path: str) -> tuple[Any, str]:
  """Returns the object that has the field at a dotted path, and the field's name."""
  *owners, leaf = path.split(".")
  owner: Any = config
  for name in owners:
    owner = getattr(owner, name)
  return owner, leaf


def _kind(config: ModelConfig, layer: int) -> str:
  """Returns the kind of a layer's mixer."""
  return config.block_pattern[layer % len(config.block_pattern)]


def _check_depth(config: ModelConfig, tensors: Tensors, source: pathlib.Path | str) -> None:
  """Raises `UserError` for the first missing block, before anything is built for as many layers as the file claims."""
  present = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
  missing = next((i for i in range(min(config.num_layers, len(present) + 1)) if i not in present), None)
  if missing is not None:
    raise UserError(f"{source}: num_hidden_layers={config.num_layers}, but tensor 'blocks.{missing}.norm1.weight' is missing")


def _param_dtype(tensors: Tensors, source: pathlib.Path | str) -> str:
  """Returns the narrowest dtype that holds every tensor; float64, in which no model here trains, is rounded to float32."""
  dtype = np.dtype(jnp.result_type(*{np.dtype(tensor.dtype) for tensor in tensors.values()}))
  if dtype == np.float64:
    logging.warning("%s: float64 tensors are rounded to float32", source)
    return "float32"
  return dtype.name


def _matrix_shape(tensors: Tensors, name: str, source: pathlib.Path | str) -> tuple[int, int]:
  """Returns the shape of a tensor that must be a matrix."""
  shape = tuple(required(tensors, name, source).shape)
  if len(shape) != 2 or not math.prod(shape):
    raise UserError(f"{source}: tensor {name!r} gives shape {shape}, must be a matrix")
  return shape

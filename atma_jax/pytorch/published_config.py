"""Translates the published ``config.json`` to and from `Config`."""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any

from absl import logging
import jax.numpy as jnp
import numpy as np

from atma_jax.config import Config, MemoryConfig, ModelConfig, shown
from atma_jax.errors import UserError
from atma_jax.pytorch.archive import Tensors, read_json, required
from atma_jax.pytorch.published_limits import published_layers, uncarried_fields
from atma_jax.pytorch.published_raven import PATTERNS, from_raven, is_raven, to_raven
from atma_jax.pytorch.published_tensors import ROTARY_BUFFER

# Published fields that choose how the public code computes, with its defaults. They are written, and never read.
_RUNTIME_FIELDS = {"num_random_keys": 0, "attn_online": False, "attn_k_block": 512, "attn_kernel": "triton", "mem_chunk": 128,
                   "mem_kernel": "auto"}
# Names of ours for fields of `ModelConfig` that the published format lacks, because the public code has one value for them. They
# are written only if a model has another value. The public code ignores them all (`atma_jax.pytorch.published_limits`).
_EXTENSIONS = {"block_pattern": "block_pattern", "raven_slots": "raven.slots", "raven_top_k": "raven.top_k",
               "logit_cap": "logit_cap", "mem_max_half_life": "memory.max_half_life", "mem_reset": "memory_reset",
               "mem_off": "memory_off", "attn_null_length": "null_length", "attn_count_length": "count_length",
               "attn_direction_scale": "direction_scale"}


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
  try:
    config = from_raven(published, source) if is_raven(published) else _from_atma(published, source)
  except KeyError as error:
    raise UserError(f"{source}: not a published configuration: field {error} is missing") from error
  if "activation_dtype" in published:  # transformers writes the dtype of the weights into the other field
    config.activation_dtype = published["activation_dtype"]
  elif "dtype" in published:
    dtype = published["dtype"]
    config.activation_dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
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
  first_global = next((i for i, kind in enumerate(config.layer_kinds) if kind == "global"), None)
  if "block_pattern" in published and "num_heads" in published and "num_kv_heads" in published:
    config.num_heads, config.num_kv_heads = published["num_heads"], published["num_kv_heads"]
  elif first_global is not None:
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
  """Returns the published fields of a configuration, and fields of ours for what only this package knows.

  What the public code would not compute is in the latter: see `atma_jax.pytorch.published_limits.uncarried`.
  """
  model, layers = config.model, published_layers(config.model)
  plain = ModelConfig()
  if layers in PATTERNS and not uncarried_fields(model):
    published = to_raven(config, layers)
    plain.block_pattern, plain.raven = PATTERNS[layers], model.raven
  else:
    published = _to_atma(config)
    if layers != "atma":
      published |= {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
  for name, path in _EXTENSIONS.items():
    (owner, leaf), (plain_owner, _) = _owner(model, path), _owner(plain, path)
    if getattr(owner, leaf) != getattr(plain_owner, leaf):
      published[name] = getattr(owner, leaf)
  return published


def _from_atma(published: dict[str, Any], source: pathlib.Path | str) -> ModelConfig:
  """Translates the published fields of a model with attention; raises KeyError for a field that is missing."""
  for field, legal in (("wall_gate_bias", None), ("polar_variant", "full")):
    if published.get(field, legal) != legal:
      raise UserError(f"{source}: {field}={shown(published[field])} is not supported; legal: {json.dumps(legal)}")
  return ModelConfig(
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
  )


def _to_atma(config: Config) -> dict[str, Any]:
  """Inverts `_from_atma`, with the fields that choose how the public code computes."""
  model = config.model
  return {
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


def _owner(config: ModelConfig, path: str) -> tuple[Any, str]:
  """Returns the object that has the field at a dotted path, and the field's name."""
  *owners, leaf = path.split(".")
  owner: Any = config
  for name in owners:
    owner = getattr(owner, name)
  return owner, leaf


def _check_depth(config: ModelConfig, tensors: Tensors, source: pathlib.Path | str) -> None:
  """Raises `UserError` for the first missing block, before anything is built for as many layers as the file claims."""
  present = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
  missing = next((i for i in range(min(config.num_layers, len(present) + 1)) if i not in present), None)
  if missing is not None:
    raise UserError(f"{source}: num_hidden_layers={config.num_layers}, but tensor 'blocks.{missing}.norm1.weight' is missing")


def _param_dtype(tensors: Tensors, source: pathlib.Path | str) -> str:
  """Returns the narrowest dtype that holds every parameter; float64, in which no model here trains, is rounded to float32."""
  dtype = np.dtype(jnp.result_type(*{np.dtype(tensor.dtype) for name, tensor in tensors.items()
                                     if not name.endswith(ROTARY_BUFFER)}))
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

"""Translates the published ``config.json`` of the Raven baselines to and from `ModelConfig`.

The published code calls them ``raven_native`` (Raven in every layer), ``atma_raven`` (Raven in place of attention) and
``atma_raven_titans`` (likewise, with the gated-delta memory beside it). Their configuration has fields of its own.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import logging

from atma_jax.config import Config, MemoryConfig, ModelConfig, RavenConfig, shown
from atma_jax.errors import UserError

PATTERNS = {"raven_native": ("raven",), "atma_raven": ("local", "local", "raven", "local"),
            "atma_raven_titans": ("local", "local", "raven", "local")}
NAMES = tuple(PATTERNS)
MEMORY = {"raven_native": False, "atma_raven": False, "atma_raven_titans": True}
# Variants of the published mixer of which the mixer here is one.
_VARIANT = {"feature_map": "swish", "router_score": "sigmoid", "router_type": "lin", "decay_type": "Mamba2", "bias_rmm": False}
# Published fields that choose how the public code trains, with its defaults. They are written, and never read.
_TRAINING_FIELDS = {"reg_mode": "baseline", "distractor": False, "num_random_keys": 0, "add_gumbel_noise": True,
                    "gate_logit_normalizer": 8, "sketch_dim": 64, "mem_chunk": 128, "mem_kernel": "auto"}


def is_raven(published: dict[str, Any]) -> bool:
  """Returns whether published fields are those of a Raven baseline."""
  return "arch_type" in published or published.get("attn_type") in NAMES


def from_raven(published: dict[str, Any], source: pathlib.Path | str) -> ModelConfig:
  """Translates the published fields of a Raven baseline; what only the tensors tell is left at its default.

  Raises:
    UserError: a field that is not legal, or that asks for another variant of the mixer, which the message names.
    KeyError: a field is missing.
  """
  name = published["arch_type"] if "arch_type" in published else published["attn_type"]
  if name not in NAMES:
    raise UserError(f"{source}: arch_type={shown(name)}: must be one of {', '.join(NAMES)}")
  for field, legal in _VARIANT.items():
    if published[field] != legal:
      raise UserError(f"{source}: {field}={shown(published[field])} is not supported; legal: {legal!r}")
  heads, width = published["num_heads"], published["hidden_size"]
  kv_heads = published.get("num_kv_heads")
  config = ModelConfig(
    vocab_size=published["vocab_size"],
    num_layers=published["num_hidden_layers"],
    width=width,
    num_heads=heads,
    num_kv_heads=heads if kv_heads is None else kv_heads,
    head_dim=1,
    window=published.get("attn_window"),
    block_pattern=PATTERNS[name],
    memory=MemoryConfig(enabled=MEMORY[name], gamma_bias=published["mem_gamma_bias"], beta_bias=published["mem_beta_bias"]),
    raven=RavenConfig(slots=published["num_slots"], top_k=published["topk"]),
    conv_taps=published["conv_kernel_size"],
  )
  try:
    Config(model=config).validate()
  except UserError as error:
    raise UserError(f"{source}: {error}") from error
  if width % heads:
    raise UserError(f"{source}: num_heads={heads}: must divide hidden_size={width}")
  config.head_dim = width // heads
  if published.get("add_gumbel_noise"):
    logging.info("%s: add_gumbel_noise acts in the public code's training only; training here adds none to the router", source)
  return config


def raven_name(model: ModelConfig) -> str | None:
  """Returns the published name of a model's layers and memory, or None if they are not those of a Raven baseline."""
  for name, pattern in PATTERNS.items():
    kinds = tuple(pattern[layer % len(pattern)] for layer in range(model.num_layers))
    if "raven" in kinds and model.layer_kinds == kinds and model.memory.enabled == MEMORY[name]:
      return name
  return None


def to_raven(config: Config, name: str) -> dict[str, Any]:
  """Returns the published fields of a Raven baseline of this published name."""
  model = config.model
  return {
    "arch_type": name,
    "attn_type": name,
    **_TRAINING_FIELDS,
    "memory": model.memory.enabled,
    "window": False,
    "vocab_size": model.vocab_size,
    "hidden_size": model.width,
    "num_hidden_layers": model.num_layers,
    "num_heads": model.num_heads,
    "num_kv_heads": model.num_kv_heads,
    "atma_head_match": name == "raven_native" or model.num_heads != 4,  # else the public code makes 8 of 4 heads
    "num_slots": model.raven.slots,
    "topk": model.raven.top_k,
    **_VARIANT,
    "conv_kernel_size": model.conv_taps,
    "seq_len": config.data.sequence_length,
    "mem_gamma_bias": model.memory.gamma_bias,
    "mem_beta_bias": model.memory.beta_bias,
    "attn_window": model.window,
    "mem_enabled": model.memory.enabled,
    "dtype": model.activation_dtype,
  }

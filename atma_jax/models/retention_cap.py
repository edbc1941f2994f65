"""How long the heads of the memory remember: half-lives, and caps on them at inference.

The half-life of a head is ``ln(1/2) / ln(gamma)`` tokens, after which half of what it holds has decayed. The sigmoid keeps gamma
below 1 by no margin: in the published checkpoints single heads had drifted to millions of tokens, invisible at the training
length and harmful far past it (Polar Attention, arXiv 2606.25156).
"""

from __future__ import annotations

from collections.abc import Iterator
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from atma_jax.config import RetentionCap
from atma_jax.errors import UserError
from atma_jax.models.memory import LogGammaCap, Memory
from atma_jax.models.model import Atma


def half_life(log_gamma: Float[np.ndarray | Array, "*shape"]) -> Float[np.ndarray, "*shape"]:
  """Tokens until half is left, in float64; infinite where nothing decays."""
  with np.errstate(divide="ignore"):
    return math.log(2) / -np.asarray(log_gamma, np.float64)


def zero_input_half_lives(model: Atma) -> dict[int, Float[np.ndarray, " H"]]:
  """Half-lives by layer, of every layer with a memory, from the bias of the decay gate alone: what a head does where its input
  says nothing."""
  return {layer: half_life(log_gamma if row is None else log_gamma[row]) for layer, row, memory in _memories(model)
          for log_gamma in [np.asarray(memory.log_gamma(jnp.asarray(np.asarray(memory.gamma.bias[...]))))]}


def capped_heads(model: Atma, cap: RetentionCap) -> list[tuple[int, int]]:
  """The (layer, head) pairs that a cap bounds in a model.

  Raises:
    UserError: the model has no memory, or not one of the heads that are listed.
  """
  half_lives = zero_input_half_lives(model)
  if not half_lives:
    raise UserError("--retention_cap: the model has no memory")
  every = [(layer, head) for layer, values in half_lives.items() for head in range(len(values))]
  chosen = cap.pairs()
  if chosen is None:
    return every if cap.heads == "all" else [max(every, key=lambda pair: half_lives[pair[0]][pair[1]])]
  for layer, head in chosen:
    if (layer, head) not in every:
      raise UserError(f"--retention_heads={cap.heads}: no memory head {layer}:{head}; layers with a memory: "
                      f"{', '.join(map(str, half_lives))}; heads: 0 to {model.config.num_heads - 1}")
  return list(chosen)


def with_retention_cap(model: Atma, cap: RetentionCap | None) -> Atma:
  """A model with the same arrays whose memory decays at least as fast as `cap` says; None takes a cap away.

  The weights stay as they are; full passes, prefill and decoding all obey. The cap is an array beside the parameters, so models
  that differ in its value alone share compiled programs; without one nothing is computed.

  Raises:
    UserError: as for `capped_heads`.
  """
  model = nnx.merge(*nnx.split(model))
  chosen = set() if cap is None else set(capped_heads(model, cap))
  for layer, row, memory in _memories(model):
    if cap is None:
      if memory.cap is not None:
        del memory.cap
      continue
    bias = memory.gamma.bias[...]
    bounds = np.zeros(bias.shape, np.float32) if not row or memory.cap is None else np.array(memory.cap[...])
    bounds[... if row is None else row] = [-math.log(2) / cap.tokens if (layer, head) in chosen else 0.0
                                           for head in range(model.config.num_heads)]
    memory.cap = LogGammaCap(jax.device_put(bounds, bias.sharding))
  return model


def share_caps(model: Atma, other: Atma) -> Atma:
  """`model` with the caps of `other`, a model of the same shape."""
  for (*_, memory), (*_, capped) in zip(_memories(model), _memories(other), strict=True):
    if capped.cap is not None:
      memory.cap = capped.cap
  return model


def _memories(model: Atma) -> Iterator[tuple[int, int | None, Memory]]:
  """Layer, row in its stacked arrays (None for a memory that is not stacked) and memory, in the order of layers."""
  pattern = len(model.config.block_pattern)
  repeats = model.config.num_layers // pattern
  groups: list[tuple[int, int | None, Any]] = [(row * pattern, row, model.groups) for row in range(repeats)]
  groups.append((repeats * pattern, None, model.tail))
  for first, row, group in groups:
    for index, block in enumerate([] if group is None else group.blocks):
      if block.mixer.memory is not None:
        yield first + index, row, block.mixer.memory

"""From logits to the next token. Every option is a number per row, so one compiled program serves any mixture."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from atma_jax.errors import UserError


def _option(default: Any, description: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": description})


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request is sampled and when it ends; field names are those of the common completion services."""

  max_tokens: int = _option(128, "Most new tokens of a prompt.")
  temperature: float = _option(1.0, "0 takes the likeliest token.")
  top_k: int = _option(0, "Draw from the k likeliest tokens; 0 is all.")
  top_p: float = _option(1.0, "Draw from the likeliest tokens that together have this probability.")
  min_p: float = _option(0.0, "Least share of the likeliest token's probability.")
  repetition_penalty: float = _option(1.0, "Divides positive logits of tokens seen before, multiplies negative ones.")
  seed: int = _option(0, "Of the random numbers.")
  stop: tuple[str, ...] = _option((), "A string that ends the text and is not part of it; may be given several times.")
  ignore_end: bool = _option(False, "Go on past end-of-text.")

  def __post_init__(self):
    legal = {
      "max_tokens": (1 <= self.max_tokens < 2**31, "between 1 and 2^31 - 1"),
      "temperature": (self.temperature == 0 or 1e-4 <= self.temperature <= 1e4, "0, or from 1e-4 to 1e4"),
      "top_k": (0 <= self.top_k < 2**31, "at least 0"),
      "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
      "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
      "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
      "seed": (0 <= self.seed < 2**32, "between 0 and 2^32 - 1"),
      "stop": (all(self.stop), "non-empty strings"),
    }
    for name, (good, words) in legal.items():
      if not good:
        raise UserError(f"{name}={getattr(self, name)!r}: must be {words}")


class Knobs(NamedTuple):
  """`Sampling` on the device, an entry a row."""

  temperature: jax.Array  # (B,) float32
  top_k: jax.Array  # (B,) int32
  top_p: jax.Array  # (B,) float32
  min_p: jax.Array  # (B,) float32
  repetition_penalty: jax.Array  # (B,) float32
  seed: jax.Array  # (B,) uint32

  @classmethod
  def of(cls, *samplings: Sampling) -> Knobs:
    """The knobs of these requests, a row each."""
    dtypes = {"top_k": jnp.int32, "seed": jnp.uint32}
    return cls(*(jnp.asarray([getattr(s, name) for s in samplings], dtypes.get(name, jnp.float32))
                 for name in cls._fields))


def narrows(sampling: Sampling) -> bool:
  """Whether top-k or top-p may take tokens away, for which the logits must be sorted."""
  return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)


def sample(logits: jax.Array, knobs: Knobs, seen: jax.Array, index: jax.Array, narrow: bool | None = None) -> jax.Array:
  """The next token of each row, from its own logits, knobs and random numbers alone.

  In this order: repetition penalty, temperature, top-k, top-p of what is left, min-p. Ties at a threshold are kept.

  Args:
    logits: (B, V) float32, -inf for tokens that must not come.
    knobs: of B rows.
    seen: (B, V) bool, tokens of prompt and text so far.
    index: (B,) int32, how many tokens the row has drawn: with the seed, what its random numbers depend on.
    narrow: whether a row `narrows`. None looks at the knobs, and spares all rows what none needs; a GPU would have to ask
      the host for that.

  Returns:
    (B,) int32.
  """
  penalty = knobs.repetition_penalty[:, None]
  logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
  greedy = jnp.argmax(logits, axis=-1)

  def draw() -> jax.Array:
    scaled = logits / jnp.where(knobs.temperature > 0, knobs.temperature, 1)[:, None]
    if narrow is None:
      narrowed = (knobs.top_k > 0) | (knobs.top_p < 1)
      scaled = jax.lax.cond(jnp.any(narrowed), lambda: _top(scaled, knobs), lambda: scaled)
    elif narrow:
      scaled = _top(scaled, knobs)
    floor = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(knobs.min_p)[:, None]
    scaled = jnp.where(scaled >= floor, scaled, -jnp.inf)
    noise = jax.vmap(lambda seed, i: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), i), logits.shape[1:]))
    return jnp.argmax(scaled + noise(knobs.seed, index), axis=-1)

  drawn = jax.lax.cond(jnp.any(knobs.temperature > 0), draw, lambda: greedy) if narrow is None else draw()
  return jnp.where(knobs.temperature > 0, drawn, greedy).astype(jnp.int32)


def _top(logits: jax.Array, knobs: Knobs) -> jax.Array:
  """-inf for what top-k, and then top-p of what it leaves, take away."""
  ordered = -jnp.sort(-logits, axis=-1)
  rank = jnp.arange(logits.shape[-1])
  k = jnp.where(knobs.top_k > 0, knobs.top_k, logits.shape[-1])[:, None]
  probabilities = jax.nn.softmax(jnp.where(rank < k, ordered, -jnp.inf), axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = (rank < k) & ((before < knobs.top_p[:, None]) | (knobs.top_p[:, None] >= 1)) | (rank == 0)
  lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= lowest, logits, -jnp.inf)

"""Sampling: from logits to the next token.

`Sampling` is the one place where an option of a request is declared: its default, its help, its legal values, and how it is
stored on the device follow from its field. Flags of ``generate`` and fields of HTTP requests are derived from them. Every option
that the device needs is an array with one entry per row, so one compiled program serves any mixture of requests.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from atma_jax.errors import UserError


def _option(default: Any, help: str, legal: str = "", is_legal: Callable[[Any], bool] = lambda value: True,
            **metadata: Any) -> Any:
  return dataclasses.field(default=default, metadata={"help": help, "legal": legal, "is_legal": is_legal, **metadata})


def _whole_number(default: int, help: str, low: int, high: int) -> Any:
  return _option(default, help, f"from {low} to {high}", lambda value: low <= value <= high, low=low, high=high)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request is sampled and when it ends. The names are those of the common completion services.

  Raises:
    UserError: a value is not legal.
  """

  max_tokens: int = _whole_number(128, "Most new tokens of a prompt.", 1, 2**31 - 1)
  temperature: float = _option(1.0, "0 takes the likeliest token.", "0, or from 1e-4 to 1e4",
                               lambda t: t == 0 or 1e-4 <= t <= 1e4)
  top_k: int = _whole_number(0, "Draw from the k likeliest tokens; 0 is all.", 0, 2**31 - 1)
  top_p: float = _option(1.0, "Draw from the likeliest tokens that together have this probability.", "above 0 and at most 1",
                         lambda p: 0 < p <= 1)
  min_p: float = _option(0.0, "Least share of the likeliest token's probability.", "between 0 and 1", lambda p: 0 <= p <= 1)
  repetition_penalty: float = _option(1.0, "Divides positive logits of tokens seen before, multiplies negative ones.",
                                      "from 0.01 to 100", lambda penalty: 0.01 <= penalty <= 100)
  seed: int = _whole_number(0, "Seed of the random numbers.", 0, 2**32 - 1)
  stop: tuple[str, ...] = _option((), "A string that ends the text and is not part of it; may be given several times.",
                                  "non-empty strings", all)
  ignore_end: bool = _option(False, "Go on past end-of-text.")

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not field.metadata["is_legal"](value):
        raise UserError(f"{field.name}={value!r}: must be {field.metadata['legal']}")

  def spread(self, count: int) -> list[Self]:
    """Returns the options of `count` prompts that are drawn independently: prompt i has the seed `seed` + i, modulo 2^32."""
    return [dataclasses.replace(self, seed=(self.seed + i) % 2**32) for i in range(count)]

  @property
  def filters(self) -> bool:
    """Whether top-k or top-p may exclude tokens, which requires sorted logits."""
    return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class RowSampling(NamedTuple):
  """The fields of `Sampling` that the device needs, with one entry per row of a batch."""

  temperature: Float[Array, " B"]
  top_k: Int[Array, " B"]
  top_p: Float[Array, " B"]
  min_p: Float[Array, " B"]
  repetition_penalty: Float[Array, " B"]
  seed: Int[Array, " B"]

  @classmethod
  def stack(cls, *samplings: Sampling) -> RowSampling:
    """Puts the options of B requests into arrays, one row each: float32, int32, and uint32 for seeds."""
    return cls(*(jnp.asarray([getattr(sampling, name) for sampling in samplings], _DTYPES[name]) for name in cls._fields))


_DTYPES: dict[str, type[np.generic]] = {
  field.name: np.uint32 if field.name == "seed" else np.int32 if field.type == "int" else np.float32
  for field in dataclasses.fields(Sampling)}


def sample(logits: Float[Array, "B V"], options: RowSampling, seen: Bool[Array, "B V"], drawn: Int[Array, " B"],
           filters: bool | None = None) -> Int[Array, " B"]:
  """Draws the next token of every row from that row's logits, options and random numbers alone.

  Applies, in this order: repetition penalty, temperature, top-k, top-p among what is left, min-p. Ties at a threshold are kept.

  Args:
    logits: (B, V) float32; -inf for tokens that must never be drawn.
    options: of the B rows.
    seen: (B, V) bool, the tokens of prompt and text so far.
    drawn: (B,) int32, how many tokens the row has drawn. Its random numbers depend on this and the seed.
    filters: whether any row has `Sampling.filters`. None decides on the device, so that a batch without such rows skips the sort;
      on a GPU that branch would have to ask the host.

  Returns:
    (B,) int32.
  """
  penalty = options.repetition_penalty[:, None]
  logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
  greedy = jnp.argmax(logits, axis=-1)

  def draw() -> jax.Array:
    scaled = logits / jnp.where(options.temperature > 0, options.temperature, 1)[:, None]
    if filters is None:
      filtered = (options.top_k > 0) | (options.top_p < 1)
      scaled = jax.lax.cond(jnp.any(filtered), lambda: _filter_top_k_top_p(scaled, options), lambda: scaled)
    elif filters:
      scaled = _filter_top_k_top_p(scaled, options)
    floor = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(options.min_p)[:, None]
    scaled = jnp.where(scaled >= floor, scaled, -jnp.inf)
    noise = jax.vmap(lambda seed, i: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), i), logits.shape[1:]))
    return jnp.argmax(scaled + noise(options.seed, drawn), axis=-1)

  token = jax.lax.cond(jnp.any(options.temperature > 0), draw, lambda: greedy) if filters is None else draw()
  return jnp.where(options.temperature > 0, token, greedy).astype(jnp.int32)


def _filter_top_k_top_p(logits: Float[Array, "B V"], options: RowSampling) -> Float[Array, "B V"]:
  """Sets logits to -inf that top-k, and then top-p among the rest, exclude."""
  ordered = -jnp.sort(-logits, axis=-1)
  rank = jnp.arange(logits.shape[-1])
  k = jnp.where(options.top_k > 0, options.top_k, logits.shape[-1])[:, None]
  probabilities = jax.nn.softmax(jnp.where(rank < k, ordered, -jnp.inf), axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = (rank < k) & ((before < options.top_p[:, None]) | (options.top_p[:, None] >= 1)) | (rank == 0)
  lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= lowest, logits, -jnp.inf)

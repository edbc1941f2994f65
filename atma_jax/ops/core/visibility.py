"""Which keys a query of causal attention sees, and how many: the one place that says so.

Positions count from 0 over queries and keys together. A query sees the keys up to its own position, of which a window leaves
the last `window`, its own included; ``window=None`` leaves all. Every function takes Python numbers and traced arrays alike, so
that masks, counts and the block ranges of streams and kernels follow from the same lines.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Position = Any  # a Python int, or an integer array of any shape


def check_window(window: int | None) -> None:
  """Raises ValueError unless `window` is at least 1, or None."""
  if window is not None and window < 1:
    raise ValueError(f"window={window} must be at least 1, or None")


def sees(distance: jax.Array, window: int | None) -> jax.Array:
  """Whether a query sees a key that lies `distance` positions before it (negative: after it)."""
  causal = distance >= 0
  return causal if window is None else causal & within(distance, window)


def within(distance: jax.Array, window: int | None) -> jax.Array:
  """`sees` for keys that are known not to come after the query."""
  return jnp.full(jnp.shape(distance), True) if window is None else distance < window


def visible_keys(position: jax.Array, window: int | None) -> jax.Array:
  """How many keys the query at `position` sees."""
  keys = position + 1
  return keys if window is None else jnp.minimum(keys, window)


def first_key(position: Position, window: int | None) -> Position:
  """Position of the first key that the query at `position` sees."""
  return 0 if window is None else at_least(position - window + 1, 0)


def last_query(position: Position, window: int) -> Position:
  """Position of the last query that sees the key at `position`, if the sequence goes on as far."""
  return position + window - 1


def visible_pairs(queries: int, keys: int, window: int | None) -> int:
  """How many (query, key) pairs the last `queries` of `keys` positions make."""
  window = keys if window is None else min(window, keys)
  ramp = max(window - (keys - queries), 0)  # queries that see fewer keys than the window holds, and the first that sees as many
  return (queries - ramp) * window + ramp * (window + window - ramp + 1) // 2


def at_least(x: Position, low: int) -> Position:
  """The larger of two integers, as a Python number where both are."""
  return max(x, low) if isinstance(x, int) else jnp.maximum(x, low)

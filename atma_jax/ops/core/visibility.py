"""Which keys a query of causal attention sees, and how many: the one place that says so.

Positions count from 0 over queries and keys together. A query sees the keys up to its own position, of which a window leaves
the last `window`, its own included; ``window=None`` leaves all. Where a row packs several documents, a query sees no key before
the start of its own: `document_starts` finds the starts, which ops take as `starts` (B, T). Functions of positions take Python
numbers and traced arrays alike, so that masks, counts and the block ranges of streams and kernels follow from the same lines.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Position = Any  # a Python int, or an integer array of any shape


def check_window(window: int | None) -> None:
  """Raises ValueError unless `window` is at least 1, or None."""
  if window is not None and window < 1:
    raise ValueError(f"window={window} must be at least 1, or None")


def document_starts(tokens: Int[Array, "B T"], first_token: int) -> Int[Array, "B T"]:
  """Position at which the document of each token starts.

  Args:
    tokens: rows that pack documents.
    first_token: the id that every document starts with, and that stands nowhere else: end-of-text, which ends the one before.

  Returns:
    The position of the last `first_token` up to the token's own, or 0 where the row has none before: its first document goes on
    from an earlier row.
  """
  positions = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(tokens == first_token, positions, 0), axis=tokens.ndim - 1)


def document_ends(starts: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Position of the last token of each token's document, from the `document_starts`."""
  T = starts.shape[1]
  positions = jnp.arange(T, dtype=jnp.int32)
  following = jax.lax.cummin(jnp.where(starts == positions, positions, T), axis=1, reverse=True)  # the next start, or its own
  return jnp.concatenate([following[:, 1:], jnp.full_like(following[:, :1], T)], axis=1) - 1


def check_starts(op: str, starts: Int[Array, "B T"] | None, shape: tuple[int, ...], keys: int | None = None) -> dict[str, Any]:
  """The keyword that passes `starts` on to an implementation: none where there are none, so that no other call changes.

  Args:
    op: the name of the operation.
    starts: see `document_starts`.
    shape: (B, T).
    keys: S of an attention, which must be T.

  Raises:
    ValueError: the shapes do not fit together.
  """
  if starts is None:
    return {}
  if starts.shape != shape or not jnp.issubdtype(starts.dtype, jnp.integer) or keys not in (None, shape[1]):
    raise ValueError(f"{op}: starts {starts.dtype} {starts.shape} must be integers (B, T) = {shape}"
                     + ("" if keys in (None, shape[1]) else f", with as many keys as queries and not {keys}"))
  return {"starts": starts}


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

"""Attention of new tokens over cached keys and over themselves: chunked prefill and decoding, forward only.

Unlike the training ops, every row of the batch stands at a position of its own, known at run time. A cache is a ring of
R slots: position p lies in slot ``p % R``, so the same code serves a cache of everything (R at least the length) and
one of a window (R at least the window). The statistics of two disjoint sets of keys merge exactly (`streaming.merge`),
so cached keys are read where they lie and new ones are written afterwards, once, for all layers.

Keys and values may be kept in int8 with a scale for every token and head (`quantise`). The scales are folded into the
scores and into the weights of the values, so nothing is ever dequantised in memory. Rounding moves an element by at
most 1/254 of the largest of its vector.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from atma_jax.ops import streaming
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.streaming import Statistics

BLOCK = 256  # keys at a time
Scales = tuple[jax.Array, jax.Array] | None
NOWHERE = jnp.iinfo(jnp.int32).max  # position of a slot that holds nothing: after every query, so never visible


def slots_for(capacity: int) -> int:
  """Smallest legal number of slots that is at least `capacity`: whole blocks, or whole eighths of less than one."""
  unit = 8 if capacity <= BLOCK else BLOCK
  return -(-capacity // unit) * unit


def cached_polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array,
                           lengths: jax.Array, *, v_null: jax.Array, null_base: jax.Array, null_slope: jax.Array,
                           len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                           scales: Scales = None, reach: int | None = None) -> tuple[jax.Array, jax.Array]:
  """`polar_attention` of T new tokens that follow the `lengths` cached ones.

  Args:
    q: (B, T, H, D).
    k, v: (B, T, K, D) of the new tokens.
    keys, values: (B, K, R, D) ring of the cached tokens; R a value of `slots_for`.
    lengths: (B,) int32 tokens before the new ones; with fewer slots than that, R is at least `window`.
    v_null, null_base, null_slope, len_gain, mag_beta, window: as for `polar_attention`.
    scales, reach: as for `cached_statistics`.

  Returns:
    direction (B, T, H, D) in q's dtype and magnitude (B, T, H), float32 or wider.
  """
  visible = lengths[:, None] + 1 + jnp.arange(q.shape[1])
  if window is not None:
    visible = jnp.minimum(visible, window)
  temp, null = formula.logits_of_counts(null_base, null_slope, len_gain, visible)
  dtype = formula.accumulator(q)
  scale = temp.astype(dtype) * q.shape[-1]**-0.5
  statistics = cached_statistics(q, k, v, keys, values, lengths, scale, window=window, scales=scales, reach=reach)
  direction, magnitude = formula.finalise(statistics, null.astype(dtype), v_null, mag_beta)
  return direction.astype(q.dtype), magnitude


def cached_softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array,
                             lengths: jax.Array, *, scale: float, window: int | None = None, scales: Scales = None,
                             reach: int | None = None) -> jax.Array:
  """`softmax_attention` of T new tokens, (B, T, H, D) in q's dtype; arguments as for `cached_polar_attention`."""
  factors = jnp.full(q.shape[:3], scale, formula.accumulator(q))
  statistics = cached_statistics(q, k, v, keys, values, lengths, factors, window=window, scales=scales, reach=reach)
  return (statistics.S / statistics.L[..., None]).astype(q.dtype)


def cached_statistics(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
                      scale: jax.Array, *, window: int | None = None, scales: Scales = None,
                      reach: int | None = None) -> Statistics:
  """What every new query gathers from the cached keys and from the new ones up to its own.

  Several queries stream over key blocks, as far as the longest row reaches; a single one (decoding) takes all blocks
  at once and merges them. A block without a visible key contributes exact zeros.

  Args:
    q, k, v, keys, values, lengths, window: as for `cached_polar_attention`.
    scale: (B, T, H) factor of the scores, in the dtype of the statistics.
    scales: of int8 keys and of int8 values, (B, K, R) each; None where they are kept as numbers.
    reach: slots that are looked at, a value of `slots_for`: the caller knows that no row that counts has used one
      after them. None is all R.

  Returns:
    Statistics of shape (B, T, H) and (B, T, H, D).
  """
  (B, T, H, D), K, R = q.shape, k.shape[2], keys.shape[2]
  if keys.shape != (B, K, R, D) or values.shape != keys.shape or slots_for(R) != R or H % K:
    raise ValueError(f"cached attention: q {q.shape}, k {k.shape}, keys {keys.shape}, values {values.shape} are not "
                     "(B, T, H, D), (B, T, K, D), (B, K, R, D) twice with H a multiple of K and R one of slots_for")
  positions = lengths[:, None] + jnp.arange(T)

  def group(x: jax.Array) -> jax.Array:  # (B, T, H, ...) -> (B, K, G, T, ...)
    return jnp.moveaxis(x.reshape(B, T, K, H // K, *x.shape[3:]), 1, 3)

  def ungroup(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 3, 1).reshape(B, T, H, *x.shape[4:])

  gather = functools.partial(_gather, group(q), group(scale), positions, NOWHERE if window is None else window)
  block = min(BLOCK, slots_for(T)) if T > 1 else 1
  pad = -T % block
  new = [jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (k, v)]
  new_positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=NOWHERE)
  own = gather(*new, new_positions, block, jnp.int32((T + pad) // block))
  reach = R if reach is None else min(reach, R)
  held = jnp.minimum(jnp.max(lengths, initial=0), reach)
  block = min(BLOCK, reach)
  keys, values, *scales = (x[:, :, :reach] for x in (keys, values, *(scales or ())))
  past = gather(keys, values, slot_positions(lengths, R)[:, :reach], block, (held + block - 1) // block, scales)
  return jax.tree.map(ungroup, streaming.merge(past, own))


def slot_positions(lengths: jax.Array, slots: int) -> jax.Array:
  """(B, slots) position that each slot of a ring holds after `lengths` (B,) tokens; `NOWHERE` for an empty one."""
  last = lengths[:, None] - 1
  position = last - (last - jnp.arange(slots)) % slots
  return jnp.where(position >= 0, position, NOWHERE)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x (..., D) as int8 and a float32 scale (...) each vector is to be multiplied by."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def _gather(q, scale, positions, window, keys, values, key_positions, block, count, scales=()) -> Statistics:
  """Statistics of q (B, K, G, T, D) over the first `count` blocks of keys (B, K, S, D) at positions (B, S)."""
  B, K, G, T, D = q.shape
  S, dtype = keys.shape[2], scale.dtype

  def blocks(keys: jax.Array, values: jax.Array, key_positions: jax.Array, *scales: jax.Array) -> Statistics:
    """Of N blocks, each by itself: (B, K, N, G, T) and (B, K, N, G, T, D)."""
    scales = [x.reshape(B, K, -1, 1, 1, block).astype(dtype) for x in scales]
    keys, values = (x.reshape(B, K, -1, block, D).astype(q.dtype) for x in (keys, values))
    scores = jnp.einsum("bkgtd,bknsd->bkngts", q, keys, preferred_element_type=dtype)
    if scales:
      scores = scores * scales[0]
    distance = positions[:, None, :, None] - key_positions.reshape(B, -1, 1, block)  # (B, N, T, block)
    visible = ((distance >= 0) & (distance < window))[:, None, :, None]
    logits = jnp.where(visible, scale[:, :, None, ..., None] * scores, -jnp.inf)
    M = jnp.maximum(jnp.max(logits, -1), jnp.finfo(dtype).min)  # finite: exp(M - M) is a number for an empty block
    p = jnp.exp(logits - M[..., None])
    weights = p * scales[1] if scales else p
    found = jnp.einsum("bkngts,bknsd->bkngtd", weights.astype(q.dtype), values, preferred_element_type=dtype)
    return Statistics(M, jnp.sum(p, -1), jnp.sum(p * p, -1), found)

  def fold(i: jax.Array, statistics: Statistics) -> Statistics:
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * block, slice_size=block)
    return streaming.merge(statistics, blocks(take(keys, axis=2), take(values, axis=2), take(key_positions, axis=1),
                                              *(take(x, axis=2) for x in scales)))

  if T == 1 or block == S:
    parts = _merge_all(blocks(keys, values, key_positions, *scales))
  else:
    zeros = jnp.zeros((B, K, 1, G, T), dtype)
    lowest = jnp.full_like(zeros, jnp.finfo(dtype).min)
    nothing = Statistics(lowest, zeros, zeros, jnp.zeros((*zeros.shape, D), dtype))
    parts = jax.lax.fori_loop(0, count, fold, nothing)
  return jax.tree.map(lambda x: x[:, :, 0], parts)


def _merge_all(parts: Statistics) -> Statistics:
  """Merges over axis 2 down to one part, at once: what `streaming.merge` gives in any order."""
  M = jnp.max(parts.M, axis=2, keepdims=True)
  w = jnp.exp(parts.M - M)
  L, Q, S = (jnp.sum(x, axis=2, keepdims=True) for x in (w * parts.L, w * w * parts.Q, w[..., None] * parts.S))
  return Statistics(M, L, Q, S)

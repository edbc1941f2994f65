"""Cached attention in XLA: several queries stream over key blocks, a single query takes all blocks at once."""

from __future__ import annotations

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

from atma_jax.ops.core import streaming, visibility
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention.cached.api import BLOCK, Scales, slots_for, tokens_since

NOWHERE = jnp.iinfo(jnp.int32).max  # position given to an empty slot: after every query, so never visible


def cached_statistics(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
                      scale: jax.Array, *, window: int | None, scales: Scales, cache_slots: int | None,
                      layer: int | None, table: jax.Array | None = None) -> Statistics:
  """See `atma_jax.ops.polar_attention.cached.api`.

  Several queries stream over key blocks, up to the length of the longest row; a single one (decoding) takes all blocks at once
  and merges them. A block without a visible key contributes exact zeros.
  """
  if layer is not None:
    keys, values, scales = jax.tree.map(lambda x: x[layer], (keys, values, scales))
  if table is not None:
    return _paged(q, k, v, keys, values, lengths, scale, window, scales, cache_slots, table)
  R = keys.shape[2]
  return _statistics(q, k, v, keys, values, lengths, scale, window, scales, R if cache_slots is None else min(cache_slots, R), R)


def _statistics(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
                scale: jax.Array, window: int | None, scales: Scales, cache_slots: int, R: int) -> Statistics:
  """`cached_statistics` over the first `cache_slots` slots of rings of R slots; keys need hold no more."""
  (B, T, H, _), K = q.shape, k.shape[2]
  positions = lengths[:, None] + jnp.arange(T)

  def group(x: jax.Array) -> jax.Array:  # (B, T, H, ...) -> (B, K, G, T, ...)
    return jnp.moveaxis(x.reshape(B, T, K, H // K, *x.shape[3:]), 1, 3)

  def ungroup(x: jax.Array) -> jax.Array:  # the inverse
    return jnp.moveaxis(x, 3, 1).reshape(B, T, H, *x.shape[4:])

  gather = functools.partial(_gather, group(q), group(scale), positions, window)
  block = min(BLOCK, slots_for(T)) if T > 1 else 1
  pad = -T % block
  new_positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=NOWHERE)
  new_k, new_v = (jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (k, v))
  own = gather(new_k, new_v, new_positions, block, jnp.int32((T + pad) // block))
  held = jnp.minimum(jnp.max(lengths, initial=0), cache_slots)
  block = min(BLOCK, cache_slots)
  keys, values, *kept_scales = (x[:, :, :cache_slots] for x in (keys, values, *(scales or ())))
  past = gather(keys, values, slot_positions(lengths, R)[:, :cache_slots], block, (held + block - 1) // block, kept_scales)
  return jax.tree.map(ungroup, streaming.merge(past, own))


def _paged(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array, scale: jax.Array,
           window: int | None, scales: Scales, cache_slots: int | None, table: jax.Array) -> Statistics:
  """`cached_statistics` over rings whose first `cache_slots` slots are gathered from their pages."""
  R = keys.shape[2] * table.shape[1]
  cache_slots = R if cache_slots is None else min(cache_slots, R)
  table = table[:, : -(-cache_slots // keys.shape[2])]

  def gather(pool: jax.Array) -> jax.Array:  # (P, K, page, ...) -> (B, K, slots, ...)
    rings = jnp.moveaxis(pool.at[table].get(mode="fill", fill_value=0), 2, 1)
    return rings.reshape(*rings.shape[:2], -1, *rings.shape[4:])

  keys, values, scales = jax.tree.map(gather, (keys, values, scales))
  return _statistics(q, k, v, keys, values, lengths, scale, window, scales, cache_slots, R)


def append(ring: jax.Array, new: jax.Array, lengths: jax.Array, counts: jax.Array, table: jax.Array | None) -> jax.Array:
  """See `atma_jax.ops.polar_attention.cached.api`."""
  (_, rings, _, length), T = ring.shape[:4], new.shape[3]
  slots = length if table is None else length * table.shape[1]
  index = jnp.arange(T)
  written = (index < counts[:, None]) & (index >= counts[:, None] - slots)
  slot = jnp.where(written, (lengths[:, None] + index) % slots, slots + index)  # past the end: dropped
  row = jnp.arange(slot.shape[0])[:, None]
  if table is not None:  # the page, and the slot in it; pages past the end, each another, for what is not written
    taken = jnp.take_along_axis(table, slot // length, axis=1, mode="fill", fill_value=rings)
    row, slot = jnp.where(written, taken, rings + row), jnp.where(written, slot % length, index)
  new = jnp.moveaxis(new, (1, 3), (0, 1)).astype(ring.dtype)  # (B, T, L, K, ...)
  return ring.at[:, row, :, slot].set(new, mode="drop", unique_indices=True)


def slot_positions(lengths: jax.Array, slots: int) -> jax.Array:
  """(B, slots) position of the token in each slot of a ring after `lengths` (B,) tokens; `NOWHERE` for an empty slot."""
  length, slot = lengths[:, None], jnp.arange(slots)
  return jnp.where(slot < length, length - 1 - tokens_since(slot, length, slots), NOWHERE)


def _gather(q: jax.Array, scale: jax.Array, positions: jax.Array, window: int | None, keys: jax.Array, values: jax.Array,
            key_positions: jax.Array, block: int, count: jax.Array, scales: Sequence[jax.Array] = ()) -> Statistics:
  """Statistics of q (B, K, G, T, D) over the first `count` blocks of keys (B, K, S, D) at positions (B, S)."""
  B, K, G, T, D = q.shape
  S, dtype = keys.shape[2], scale.dtype

  def blocks(keys: jax.Array, values: jax.Array, key_positions: jax.Array, *scales: jax.Array) -> Statistics:
    """Statistics over each of N blocks: (B, K, N, G, T) and (B, K, N, G, T, D)."""
    factors = [x.reshape(B, K, -1, 1, 1, block).astype(dtype) for x in scales]
    keys, values = (x.reshape(B, K, -1, block, D).astype(q.dtype) for x in (keys, values))
    scores = jnp.einsum("bkgtd,bknsd->bkngts", q, keys, preferred_element_type=dtype)
    if factors:
      scores = scores * factors[0]
    distance = positions[:, None, :, None] - key_positions.reshape(B, -1, 1, block)  # (B, N, T, block)
    visible = visibility.sees(distance, window)[:, None, :, None]
    logits = jnp.where(visible, scale[:, :, None, ..., None] * scores, -jnp.inf)
    M = jnp.maximum(jnp.max(logits, -1), jnp.finfo(dtype).min)  # finite: exp(M - M) is a number for an empty block
    p = jnp.exp(logits - M[..., None])
    weights = p * factors[1] if factors else p
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
  """Merges statistics over axis 2, which keeps a size of 1, as `streaming.merge` does pair by pair."""
  M = jnp.max(parts.M, axis=2, keepdims=True)
  w = jnp.exp(parts.M - M)
  L, Q, S = (jnp.sum(x, axis=2, keepdims=True) for x in (w * parts.L, w * w * parts.Q, w[..., None] * parts.S))
  return Statistics(M, L, Q, S)

"""Cached attention of a single query a row, and the write of its key and value, as TPU kernels (Pallas through Mosaic).

The grid runs over rows and, within a row, over blocks of slots or over pages. A block beyond the row's length, or before its
window, is not fetched: its index maps to the nearest block inside, which is already there. All key/value heads of a block are
taken together, and the group of a head reads its keys and values once. The new token starts the sums.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas, visibility
from atma_jax.ops.core.pallas import MASKED, dot
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention.cached.api import Scales, decoding_refusal, tokens_since

KEYS = 2048  # in a step, of each head: a MiB of bfloat16 keys and values for two heads of 128
ROWS = 16  # rows of a tile of bfloat16; a group has no more query heads
LANES = 128
TILE = 32  # slots that are read and written around a new one: rows of a tile of int8
Ref = Any  # a Pallas reference


def supports(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
             scale: jax.Array, *, table: jax.Array | None = None, **options: Any) -> str | None:
  """Why the kernel cannot serve this call, or None if it can."""
  del v, values, lengths, options
  return decoding_refusal("tpu", q, k, keys, scale, table, group=ROWS, page=LANES)


def supports_append(ring: jax.Array, new: jax.Array, lengths: jax.Array, counts: jax.Array,
                    table: jax.Array | None) -> str | None:
  """Why `append` cannot serve this call, or None if it can."""
  del lengths, counts, table
  if ring.ndim != 5 or new.shape[3] != 1:
    return f"writes one new vector a row, not {new.shape[3]} of shape {new.shape[4:]}"
  if ring.dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
    return f"takes int8, bfloat16 or float32 vectors, not {ring.dtype}"
  return pallas.head_refusal(ring) or pallas.device_refusal("tpu")


def cached_statistics(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
                      scale: jax.Array, *, window: int | None, scales: Scales, cache_slots: int | None, layer: int | None,
                      table: jax.Array | None = None, block: int = KEYS, interpret: bool = False) -> Statistics:
  """See `atma_jax.ops.polar_attention.cached.api`; `block` overrides how many keys a step takes where there are no pages."""
  del cache_slots  # every row is read up to its own length
  (B, _, H, D), K = q.shape, k.shape[2]
  G, paged = H // K, table is not None
  if layer is None:
    layer, keys, values, scales = 0, *jax.tree.map(lambda x: x[None], (keys, values, scales))
  rings, length = keys.shape[1], keys.shape[3]
  slots = length if table is None else length * table.shape[1]
  block = length if paged else min(block, slots)

  def rows(x: jax.Array) -> jax.Array:  # (B, 1, H, ...) -> (B, K, ROWS, ...)
    x = x.reshape(B, K, G, *x.shape[3:])
    return jnp.pad(x, ((0, 0), (0, 0), (0, ROWS - G), *((0, 0),) * (x.ndim - 3)))

  def ring(*shape: int) -> pl.BlockSpec:
    def index(b: Any, n: Any, lengths: Ref, *tables: Ref) -> tuple[Any, ...]:
      first, last = _blocks(lengths[b], slots, block, window)
      n = jnp.clip(n, first, last)
      place = (jnp.minimum(tables[0][b, n], rings - 1), 0, 0) if paged else (b, 0, n)
      return layer, *place, *(0,) * len(shape)
    return pl.BlockSpec((None, None, K, block, *shape), index)

  def own(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda b, n, *_: (b, *(0,) * len(shape)))

  scalars, sums = ((K, ROWS, LANES), (K, ROWS, D))
  grid = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1 + paged, grid=(B, -(-slots // block)),
    in_specs=[own(K, ROWS, 1), own(K, ROWS, D), own(1, K, D), own(1, K, D), ring(D), ring(D),
              *[ring()] * (2 * (scales is not None))],
    out_specs=[*[own(*scalars)] * 3, own(*sums)], scratch_shapes=[])
  M, L, Q, S = pl.pallas_call(
    functools.partial(_kernel, window=window, slots=slots, block=block, paged=paged, quantised=scales is not None),
    name="cached_attention", grid_spec=grid, interpret=interpret,
    out_shape=[jax.ShapeDtypeStruct((B, *shape), jnp.float32) for shape in (*[scalars] * 3, sums)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
  )(lengths, *((table,) if paged else ()), rows(scale)[..., None], rows(q), k, v, keys, values, *(scales or ()))
  M, L, Q = (x[:, :, :G].reshape(B, 1, H, *x.shape[3:])[..., 0] for x in (M, L, Q))
  return Statistics(M, L, Q, S[:, :, :G].reshape(B, 1, H, D))


def _blocks(length: jax.Array, slots: int, block: int, window: int | None) -> tuple[jax.Array, jax.Array]:
  """The first and the last block that a row looks at; both 0 where it has cached nothing."""
  last = jnp.maximum(lax.div(jnp.minimum(length, slots) + block - 1, block) - 1, 0)
  if window is None:
    return jnp.zeros_like(last), last
  first = jnp.minimum(lax.div(visibility.first_key(length, window), block), last)
  return jnp.where(length <= slots, first, 0), last  # a ring that has wrapped is no larger than its window needs


def _kernel(lengths_ref: Ref, *refs: Ref, window: int | None, slots: int, block: int, paged: bool, quantised: bool) -> None:
  scale_ref, q_ref, k_ref, v_ref, keys_ref, values_ref, *others = refs[paged:]
  *scale_refs, M_ref, L_ref, Q_ref, S_ref = others
  b, n = pl.program_id(0), pl.program_id(1)
  length = lengths_ref[b]
  first, last = _blocks(length, slots, block, window)

  @pl.when(n == 0)
  def _start() -> None:
    for head in range(q_ref.shape[0]):
      k, v = (ref[0, head][None, :].astype(jnp.float32) for ref in (k_ref, v_ref))
      own = jnp.sum(q_ref[head].astype(jnp.float32) * k, axis=1, keepdims=True) * scale_ref[head]
      M_ref[head] = jnp.broadcast_to(own, M_ref.shape[1:])
      L_ref[head], Q_ref[head] = jnp.ones(L_ref.shape[1:], jnp.float32), jnp.ones(Q_ref.shape[1:], jnp.float32)
      S_ref[head] = jnp.broadcast_to(v, S_ref.shape[1:])

  @pl.when((n >= first) & (n <= last) & (length > 0))
  def _step() -> None:
    def visible(axis: int) -> jax.Array:
      slot = n * block + lax.broadcasted_iota(jnp.int32, (1, block) if axis else (block, 1), axis)
      seen = slot < jnp.minimum(length, slots)
      if window is not None:
        seen &= visibility.within(tokens_since(slot, length, slots) + 1, window)
      return seen

    across, down = visible(1), visible(0)
    for head in range(q_ref.shape[0]):
      q = q_ref[head]
      scores = dot(q, _as(keys_ref[head], q.dtype), (1, 1)) * scale_ref[head]
      if quantised:
        scores = scores * scale_refs[0][head][None, :]
      scores = jnp.where(across, scores, MASKED)
      m = M_ref[head][:, :1]
      m_next = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
      p, shrink = jnp.where(across, jnp.exp(scores - m_next), 0), jnp.exp(m - m_next)
      L_ref[head] = L_ref[head] * shrink + jnp.sum(p, axis=1, keepdims=True)
      Q_ref[head] = Q_ref[head] * (shrink * shrink) + jnp.sum(p * p, axis=1, keepdims=True)
      weights = p * jnp.where(across, scale_refs[1][head][None, :], 0) if quantised else p
      values = jnp.where(down, _as(values_ref[head], q.dtype), 0)  # what the last block reads past the end may be anything
      S_ref[head] = S_ref[head] * shrink + dot(weights.astype(q.dtype), values)
      M_ref[head] = jnp.broadcast_to(m_next, M_ref.shape[1:])


def append(ring: jax.Array, new: jax.Array, lengths: jax.Array, counts: jax.Array, table: jax.Array | None, *,
           interpret: bool = False) -> jax.Array:
  """See `atma_jax.ops.polar_attention.cached.api`: reads and writes the tiles that the new vectors lie in, in place."""
  (L, rings, K, length, D), B = ring.shape, new.shape[1]
  slots = length if table is None else length * table.shape[1]
  tile = TILE if length % TILE == 0 else length
  slot, written = lengths % slots, (counts > 0).astype(jnp.int32)
  page = jnp.arange(B, dtype=jnp.int32) if table is None else jnp.minimum(
    jnp.take_along_axis(table, (slot // length)[:, None], axis=1)[:, 0], rings - 1)
  # A row that writes nothing visits the tile of the row before it, which merely stays a little longer: the pages that the row
  # once had may be another's by now.
  source = lax.cummax(jnp.where(written > 0, jnp.arange(B), 0))
  source = jnp.maximum(source, jnp.argmax(written))
  page, place = page[source], (slot % length)[source]

  def at(b: Any, page: Ref, place: Ref, written: Ref) -> tuple[Any, ...]:
    del written
    return 0, page[b], 0, lax.div(place[b], tile), 0

  spec = pl.BlockSpec((L, None, K, tile, D), at)
  grid = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=3, grid=(B,), scratch_shapes=[], out_specs=spec,
    in_specs=[pl.BlockSpec((L, None, K, 1, D), lambda b, *_: (0, b, 0, 0, 0)), spec])
  return pl.pallas_call(
    functools.partial(_append_kernel, tile=tile), name="cached_append", grid_spec=grid, interpret=interpret,
    out_shape=jax.ShapeDtypeStruct(ring.shape, ring.dtype), input_output_aliases={4: 0},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
  )(page, place, written, new.astype(ring.dtype), ring)


def _append_kernel(page_ref: Ref, place_ref: Ref, written_ref: Ref, new_ref: Ref, ring_ref: Ref, out_ref: Ref, *,
                   tile: int) -> None:
  b = pl.program_id(0)
  before = jnp.maximum(b - 1, 0)
  same = (b > 0) & (page_ref[b] == page_ref[before]) & (lax.div(place_ref[b], tile) == lax.div(place_ref[before], tile))

  @pl.when(~same)
  def _fetch() -> None:
    out_ref[...] = ring_ref[...]

  @pl.when(written_ref[b] > 0)
  def _write() -> None:
    wide = jnp.int32 if out_ref.dtype == jnp.int8 else jnp.float32
    row = lax.broadcasted_iota(jnp.int32, (1, 1, tile, 1), 2) == lax.rem(place_ref[b], tile)
    out_ref[...] = jnp.where(row, new_ref[...].astype(wide), out_ref[...].astype(wide)).astype(out_ref.dtype)


def _as(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return x.astype(jnp.float32).astype(dtype) if x.dtype == jnp.int8 else x.astype(dtype)

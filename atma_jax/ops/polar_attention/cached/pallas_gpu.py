"""Cached attention of a single query a row as a GPU kernel: Pallas through Triton, split over the keys.

A program takes one row's queries of one key/value head (the group reads every key and value once) and an equal share of the slots
that the row has filled; what lies beyond the row's length or before its window is not read. Scores are in base 2. The first
share also holds the new token. A second kernel, with a program for every query head, merges the shares as `streaming.merge` does.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import visibility
from atma_jax.ops.core.pallas import LOG2_E, MASKED, dot
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention.cached import chunk_gpu
from atma_jax.ops.polar_attention.cached.api import Scales, decoding_refusal, tokens_since

KEYS = 64  # in a step of a program: with values, 32 KiB of bfloat16 on their way while the step before is worked on
ROWS = 16  # of the smallest matrix product; a group has no more query heads
PROGRAMS = 256  # enough for the memory of a large GPU to be busy
COLUMNS = 64  # of a head's values that a program merges
Ref = Any  # a Pallas reference


def supports(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
             scale: jax.Array, *, table: jax.Array | None = None, **options: Any) -> str | None:
  """Why the kernel cannot serve this call, or None if it can."""
  del values, lengths, options
  if q.shape[1] > 1:
    return chunk_gpu.supports(q, k, v, keys, scale, table)
  if keys.dtype.itemsize == 1 and 2**31 < keys.size <= 2**32:
    return f"would be given signed offsets of 32 bits by Pallas, too few for {keys.size / 2**30:.3g} GiB of int8 keys"
  return decoding_refusal("gpu", q, k, keys, scale, table, group=ROWS, page=KEYS)


def cached_statistics(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
                      scale: jax.Array, *, window: int | None, scales: Scales, cache_slots: int | None, layer: int | None,
                      table: jax.Array | None = None, splits: int | None = None, interpret: bool = False) -> Statistics:
  """See `atma_jax.ops.polar_attention.cached.api`; `splits`, a power of two, overrides the number of shares of the keys."""
  del cache_slots  # every row is read up to its own length
  (B, _, H, D), K, R = q.shape, k.shape[2], keys.shape[-2]
  G = H // K
  if layer is None:
    layer, keys, values, scales = 0, *jax.tree.map(lambda x: x[None], (keys, values, scales))
  if q.shape[1] > 1:
    return chunk_gpu.cached_statistics(q, k, v, keys, values, lengths, scale, window=window, layer=layer, interpret=interpret)
  P, R, paged = keys.shape[1], R if table is None else R * table.shape[1], table is not None
  splits = splits or splits_for(B * K, R)

  def ring(*shape: int) -> pl.BlockSpec:
    if paged:
      return pl.BlockSpec((None, P, None, *shape), lambda s, h, b: (layer, 0, h, *(0,) * len(shape)))
    return pl.BlockSpec((None, None, None, *shape), lambda s, h, b: (layer, b, h, *(0,) * len(shape)))

  length = keys.shape[3]  # of a ring or a page
  new = pl.BlockSpec((None, None, None, D), lambda s, h, b: (b, 0, h, 0))
  scalars = jax.ShapeDtypeStruct((B, K, ROWS, splits), jnp.float32)
  scalar = pl.BlockSpec((None, None, ROWS, None), lambda s, h, b: (b, h, 0, s))
  parts = pl.pallas_call(
    functools.partial(_share_kernel, group=G, window=window, splits=splits, slots=R, paged=paged,
                      quantised=scales is not None), name="cached_attention",
    out_shape=[*[scalars] * 3, jax.ShapeDtypeStruct((B, K, ROWS, splits, D), jnp.float32)],
    in_specs=[pl.BlockSpec((None,), lambda s, h, b: (b,)), pl.BlockSpec((None, None, H), lambda s, h, b: (b, 0, 0)),
              pl.BlockSpec((None, None, H, D), lambda s, h, b: (b, 0, 0, 0)), new, new, ring(length, D), ring(length, D),
              *[ring(length)] * (2 * (scales is not None)),
              *[pl.BlockSpec((None, R // length), lambda s, h, b: (b, 0))] * paged],
    out_specs=[*[scalar] * 3, pl.BlockSpec((None, None, ROWS, None, D), lambda s, h, b: (b, h, 0, s, 0))],
    grid=(splits, K, B), interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
  )(lengths, scale * LOG2_E, q, k, v, keys, values, *(scales or ()), *((table,) if paged else ()))
  return _merged(parts, G, interpret)


def splits_for(rows: int, slots: int) -> int:
  """Into how many shares to split the slots, a power of two: `rows` programs each, enough of them, none with less than a step."""
  most = min(PROGRAMS // rows, -(-slots // KEYS))
  return 1 << max(most.bit_length() - 1, 0)


def _share_kernel(length_ref: Ref, scale_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, keys_ref: Ref, values_ref: Ref, *refs: Ref,
                  group: int, window: int | None, splits: int, slots: int, paged: bool, quantised: bool) -> None:
  *scale_refs, M_ref, L_ref, Q_ref, S_ref = refs
  table_ref = scale_refs.pop() if paged else None
  share, length = pl.program_id(0), length_ref[...]
  heads = pl.ds(pl.program_id(1) * group, ROWS)  # the group's; what follows them is masked
  own_heads = jnp.arange(ROWS) < group
  scale = plgpu.load(scale_ref.at[heads], mask=own_heads, other=0)
  q = plgpu.load(q_ref.at[heads, :], mask=jnp.broadcast_to(own_heads[:, None], (ROWS, q_ref.shape[1])), other=0)
  held = jnp.minimum(length, slots)
  first = 0
  if window is not None:  # a ring that has wrapped is no larger than its window needs
    first = jnp.where(length <= slots, lax.div(visibility.first_key(length, window), KEYS), 0)
  count = lax.div(held + KEYS - 1, KEYS) - first

  def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    m, L, Q, S = carry
    slot = block * KEYS + jnp.arange(KEYS)
    if table_ref is not None:
      steps = keys_ref.shape[1] // KEYS  # in a page
      place = table_ref[lax.div(block, steps)], pl.ds(lax.rem(block, steps) * KEYS, KEYS)
    else:
      place = (pl.ds(block * KEYS, KEYS),)

    def read(ref: Ref) -> jax.Array:
      columns = ref.shape[1 + paged :]
      taken = ref.at[(*place, *(slice(None),) * len(columns))]
      if slots % KEYS == 0:
        return plgpu.load(taken)
      inside = (slot < slots).reshape(KEYS, *(1,) * len(columns))
      return plgpu.load(taken, mask=jnp.broadcast_to(inside, (KEYS, *columns)), other=0)

    scores = dot(q, read(keys_ref).astype(q.dtype), (1, 1)) * scale[:, None]
    if quantised:
      scores = scores * read(scale_refs[0])[None, :]
    visible = slot < held
    if window is not None:
      visible &= visibility.within(tokens_since(slot, length, slots) + 1, window)
    scores = jnp.where(visible[None, :], scores, MASKED)
    m_next = jnp.maximum(m, jnp.max(scores, axis=1))
    p, shrink = jnp.where(visible[None, :], jnp.exp2(scores - m_next[:, None]), 0), jnp.exp2(m - m_next)
    L = L * shrink + jnp.sum(p, axis=1)
    Q = Q * (shrink * shrink) + jnp.sum(p * p, axis=1)
    weights = p * read(scale_refs[1])[None, :] if quantised else p
    return m_next, L, Q, S * shrink[:, None] + dot(weights.astype(q.dtype), read(values_ref).astype(q.dtype))

  # The new token, in the first share alone.
  own = jnp.sum(q.astype(jnp.float32) * k_ref[...].astype(jnp.float32)[None, :], axis=1) * scale
  mine = jnp.where(share == 0, jnp.ones((ROWS,), jnp.float32), 0)
  carry = jnp.where(share == 0, own, MASKED), mine, mine, mine[:, None] * v_ref[...].astype(jnp.float32)[None, :]
  start, end = (first + lax.div(count * i, splits) for i in (share, share + 1))
  m, L, Q, S = lax.fori_loop(start, end, step, carry)
  M_ref[...], L_ref[...], Q_ref[...], S_ref[...] = m, L, Q, S


def _merged(parts: list[jax.Array], G: int, interpret: bool) -> Statistics:
  """Statistics (B, 1, H, ...) of all shares, from those of each, (B, K, ROWS, splits, ...) in base 2."""
  B, K, _, splits, D = parts[3].shape
  scalars = jax.ShapeDtypeStruct((B, 1, K * G), jnp.float32)
  if splits == 1:
    M, L, Q, S = (x[:, :, :G, 0].reshape(B, 1, K * G, *x.shape[4:]) for x in parts)
    return Statistics(M / LOG2_E, L, Q, S)
  taken = pl.BlockSpec((None, None, None, splits), lambda c, h, b: (b, h // G, h % G, 0))
  given = pl.BlockSpec((None, None, None), lambda c, h, b: (b, 0, h))
  M, L, Q, S = pl.pallas_call(
    _merge_kernel, name="cached_attention_merge",
    out_shape=[*[scalars] * 3, jax.ShapeDtypeStruct((B, 1, K * G, D), jnp.float32)],
    in_specs=[*[taken] * 3, pl.BlockSpec((None, None, None, splits, COLUMNS), lambda c, h, b: (b, h // G, h % G, 0, c))],
    out_specs=[*[given] * 3, pl.BlockSpec((None, None, None, COLUMNS), lambda c, h, b: (b, 0, h, c))],
    grid=(D // COLUMNS, K * G, B), interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
  )(*parts)
  return Statistics(M, L, Q, S)


def _merge_kernel(M_ref: Ref, L_ref: Ref, Q_ref: Ref, S_ref: Ref, M_out: Ref, L_out: Ref, Q_out: Ref, S_out: Ref) -> None:
  M = M_ref[...]
  top = jnp.max(M)
  w = jnp.exp2(M - top)
  M_out[...] = top / LOG2_E  # programs of other columns write the same
  L_out[...], Q_out[...] = jnp.sum(w * L_ref[...]), jnp.sum(w * w * Q_ref[...])
  S_out[...] = jnp.sum(w[:, None] * S_ref[...], axis=0)

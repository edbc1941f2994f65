"""One device's work in a ring of keys and values, as TPU kernels: the matrix products and layouts of `pallas_tpu`.

Three kernels, each called once a hop of the ring. They add to the sums of the hops before, in place; the positions of the
segments of queries and of keys are prefetched scalars, and the grid's last axis is as long as the longest walk needs. The sums
that belong to queries, S and dq, stay transposed, (D, T), from hop to hop. Statistics are relative to M in base 2; a query that
has seen nothing has ``M = NOTHING``, which lies above every masked logit and below every other, so that L, Q and S stay 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from atma_jax.ops.core.pallas import LOG2_E
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.core.tiles import Tile, Tiles, polar_tiles
from atma_jax.ops.polar_attention.tpu import pallas_tpu
from atma_jax.ops.polar_attention.tpu.tpu_grid import Call, Index, Ref, Starts, line, stack, steps_of, up

NOTHING = -(2.0**60)

supports = pallas_tpu.supports


class RingSteps:
  """See `atma_jax.ops.core.streaming.RingSteps`; `tiles` overrides the table, `interpret` runs the kernels without a TPU."""

  def __init__(self, q: jax.Array, k: jax.Array, *, window: int | None, query_starts: Sequence[jax.Array],
               tiles: Tiles | None = None, interpret: bool = False):
    (B, T, H, D), (S, K), segments = q.shape, k.shape[1:3], len(query_starts)
    tiles = tiles or polar_tiles("tpu", q.dtype.itemsize, D, T)
    T, S = T // segments, S // segments
    call = Call(B, T, S, K, H // K, D, window, tiles, interpret, segments)
    block_q, block_k = zip(*(call.blocks(tile) for tile in (tiles.forward, tiles.dq, tiles.dkv)), strict=True)
    self._length_q, self._length_k = up(T, math.lcm(*block_q)), up(S, math.lcm(*block_k))
    self._call = dataclasses.replace(call, padded=(self._length_q, self._length_k))
    self._dtype, self._query_starts = q.dtype, query_starts

  def queries(self, q: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
    call = self._call
    return (call.array(q, self._length_q), self._rows(scale * LOG2_E)), Statistics(
      self._zeros() + NOTHING, self._zeros(), self._zeros(), self._transposed_zeros())

  def keys(self, k: jax.Array, v: jax.Array) -> Any:
    return self._call.array(k, self._length_k), self._call.array(v, self._length_k)

  def gather(self, rows: Any, statistics: Any, keys: Any, key_starts: Sequence[jax.Array]) -> Any:
    call, (q, scale), (k, v) = self._call, rows, keys
    tile, D = call.tiles.forward, call.dim
    (block_q, block_k), count = call.blocks(tile), call.counts(tile)[0] * call.segments
    heads, size = call.groups * call.members, call.members * block_q
    starts, steps = self._plan(key_starts, call.key_blocks, count, tile)
    row, S = call.row_spec(block_q, _own, True), call.transposed_spec(heads, block_q, _own)
    key = call.spec(call.groups, block_k, functools.partial(_key_block, call, tile))
    vector = pltpu.VMEM((1, size), jnp.float32)
    return Statistics(*call.run(
      "ring_attention", functools.partial(_gather_kernel, call=call), (call.batch, call.groups, count, steps),
      [(q, call.spec(heads, block_q, _own)), (k, key), (v, key), (scale, call.row_spec(block_q, _own, False)),
       *zip(statistics, (row, row, row, S), strict=True)],
      [(_shape(x), spec) for x, spec in zip(statistics, (row, row, row, S), strict=True)],
      [pltpu.VMEM((size, D), q.dtype), vector, vector, vector, vector, pltpu.VMEM((D, size), jnp.float32)],
      products=2, pairs=self._pairs(), starts=starts, carried=4))

  def statistics(self, statistics: Any) -> Statistics:
    M, L, Q, S = statistics
    return Statistics(self._call.unrows(M) / LOG2_E, self._call.unrows(L), self._call.unrows(Q), self._untransposed(S))

  def cotangents(self, q: jax.Array, scale: jax.Array, statistics: Any,
                 cotangents: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
    gL, gQ, gS = cotangents
    scalars = self._rows(scale * LOG2_E), statistics.M, self._rows(2 * gQ * scale), self._rows(-gL * scale)
    arrays = self._call.array(q, self._length_q), self._call.array(gS.astype(self._dtype), self._length_q)
    return (*arrays, *scalars), (self._transposed_zeros(), self._zeros())

  def zero_gradients(self, keys: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys)

  def add_gradients(self, rows: Any, dqueries: Any, keys: Any, dkeys: Any,
                    key_starts: Sequence[jax.Array]) -> tuple[Any, Any]:
    return self._add_dq(rows, dqueries, keys, key_starts), self._add_dkv(rows, keys, dkeys, key_starts)

  def query_gradients(self, dqueries: Any) -> tuple[jax.Array, jax.Array]:
    dq, total = dqueries
    return self._untransposed(dq), self._call.unrows(total)

  def key_gradients(self, dkeys: Any) -> tuple[jax.Array, jax.Array]:
    dk, dv = (self._call.unarray(x, self._call.groups, self._call.keys) for x in dkeys)
    return dk, dv

  def _add_dq(self, rows: Any, dqueries: Any, keys: Any, key_starts: Sequence[jax.Array]) -> Any:
    call, tile = self._call, self._call.tiles.dq
    (block_q, _), count = call.blocks(tile), call.counts(tile)[0] * call.segments
    heads, size = call.groups * call.members, call.members * block_q
    starts, steps = self._plan(key_starts, call.key_blocks, count, tile)
    specs = call.transposed_spec(heads, block_q, _own), call.row_spec(block_q, _own, True)
    rows_of = pltpu.VMEM((size, call.dim), self._dtype)
    return tuple(call.run(
      "ring_attention_dq", functools.partial(_dq_kernel, call=call), (call.batch, call.groups, count, steps),
      [*self._inputs(tile, rows, keys, _own, functools.partial(_key_block, call, tile)), *zip(dqueries, specs, strict=True)],
      [(_shape(x), spec) for x, spec in zip(dqueries, specs, strict=True)],
      [rows_of, rows_of, pltpu.VMEM((call.dim, size), jnp.float32), pltpu.VMEM((1, size), jnp.float32)],
      products=3, pairs=self._pairs(), starts=starts, carried=2))

  def _add_dkv(self, rows: Any, keys: Any, dkeys: Any, key_starts: Sequence[jax.Array]) -> Any:
    call, tile = self._call, self._call.tiles.dkv
    (_, block_k), count = call.blocks(tile), call.counts(tile)[1] * call.segments
    starts, steps = self._plan(key_starts, call.query_blocks, count, tile)
    spec = call.spec(call.groups, block_k, _own)
    return tuple(call.run(
      "ring_attention_dkv", functools.partial(_dkv_kernel, call=call), (call.batch, call.groups, count, steps),
      [*self._inputs(tile, rows, keys, functools.partial(_query_block, call, tile), _own), *((x, spec) for x in dkeys)],
      [(_shape(x), spec) for x in dkeys], [pltpu.VMEM((block_k, call.dim), jnp.float32)] * 2,
      products=4, pairs=self._pairs(), starts=starts, carried=2))

  def _inputs(self, tile: Tile, rows: Any, keys: Any, query: Callable[..., Index],
              key: Callable[..., Index]) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """Arrays and blocks that both backward kernels take; `query` and `key` map the grid's last two indices to blocks."""
    call, (q, go, scale, *scalars) = self._call, rows
    block_q, block_k = call.blocks(tile)
    whole, row = call.spec(call.groups * call.members, block_q, query), call.row_spec(block_q, query, True)
    key_spec = call.spec(call.groups, block_k, key)
    return [(q, whole), *((x, key_spec) for x in keys), (go, whole), (scale, call.row_spec(block_q, query, False)),
            *((x, row) for x in scalars)]

  def _plan(self, key_starts: Sequence[jax.Array], ranges: Callable[..., list[tuple[Index, Index]]], count: int,
            tile: Tile) -> tuple[jax.Array, jax.Array]:
    """The prefetched scalars of a call, and how many blocks its longest walk has, at least one."""
    starts = Starts(tuple(self._query_starts), tuple(key_starts))
    steps = jnp.maximum(jnp.max(steps_of(ranges(jnp.arange(count), tile, starts))), 1).astype(jnp.int32)
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (*starts.queries, *starts.keys, steps)]), steps

  def _pairs(self) -> int:
    """Pairs of a query and a key that an average hop adds, for the cost estimate.

    With two segments, two of the four pairs of segments; with one, the window's pairs divided by the hops it reaches over.
    """
    call = self._call
    if call.segments == 2:
      return 2 * call.queries * call.keys
    everything = call.keys * call.queries
    window = everything if call.window is None else min(call.window, everything)
    return call.queries * window // (1 - (1 - window) // call.keys)

  def _rows(self, x: jax.Array) -> jax.Array:
    return self._call.rows(x, self._length_q)

  def _zeros(self) -> jax.Array:
    call = self._call
    return jnp.zeros((call.batch, call.groups, call.members, call.segments * self._length_q), jnp.float32)

  def _transposed_zeros(self) -> jax.Array:
    call = self._call
    return jnp.zeros((call.batch, call.groups, call.members, call.dim, call.segments * self._length_q), jnp.float32)

  def _untransposed(self, x: jax.Array) -> jax.Array:
    """(B, K, G, D, T padded) as (B, T, H, D)."""
    return self._call.unarray(x.mT, self._call.groups * self._call.members, self._call.queries)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _own(i: Index, s: Index, starts: Ref) -> Index:
  return i


def _key_block(call: Call, tile: Tile, i: Index, s: Index, starts: Ref) -> Index:
  return call.key_block(i, s, tile, _read(starts, call)[0])[0]


def _query_block(call: Call, tile: Tile, j: Index, s: Index, starts: Ref) -> Index:
  return call.query_block(j, s, tile, _read(starts, call)[0])[0]


def _read(ref: Ref, call: Call) -> tuple[Starts, Index]:
  """The positions at which segments start, and the size of the grid's last axis."""
  n = call.segments
  return Starts(tuple(ref[i] for i in range(n)), tuple(ref[n + i] for i in range(n))), ref[2 * n]


def _members(call: Call, block: int) -> Iterator[tuple[int, slice]]:
  """The query heads of a group, each with the rows that it has of a block."""
  return ((g, slice(g * block, (g + 1) * block)) for g in range(call.members))


def _gather_kernel(starts_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, scale_ref: Ref, m_in_ref: Ref, L_in_ref: Ref,
                   Q_in_ref: Ref, S_in_ref: Ref, m_out_ref: Ref, L_out_ref: Ref, Q_out_ref: Ref, S_out_ref: Ref, rows_ref: Ref,
                   scales_ref: Ref, m_ref: Ref, L_ref: Ref, Q_ref: Ref, S_ref: Ref, *, call: Call) -> None:
  tile, (starts, steps), i, step = call.tiles.forward, _read(starts_ref, call), pl.program_id(2), pl.program_id(3)
  j, active = call.key_block(i, step, tile, starts)

  @pl.when(step == 0)
  def _start() -> None:
    rows_ref[...], scales_ref[...] = stack(q_ref), line(scale_ref)
    m_ref[...], L_ref[...], Q_ref[...] = line(m_in_ref), line(L_in_ref), line(Q_in_ref)
    for g, at in _members(call, m_in_ref.shape[1]):
      S_ref[:, at] = S_in_ref[g]

  def body(mask: pallas_tpu.Mask) -> None:
    pallas_tpu.fold(mask, k_ref[0], v_ref[0], rows_ref[...], scales_ref[...], m_ref, L_ref, Q_ref, S_ref)

  pallas_tpu.when_visible(call, tile, starts, active, i, j, body)

  @pl.when(step == steps - 1)
  def _finish() -> None:
    for g, at in _members(call, m_out_ref.shape[1]):
      m_out_ref[g : g + 1, :], L_out_ref[g : g + 1, :], Q_out_ref[g : g + 1, :] = m_ref[:, at], L_ref[:, at], Q_ref[:, at]
      S_out_ref[g] = S_ref[:, at]


def _dq_kernel(starts_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, go_ref: Ref, scale_ref: Ref, m_ref: Ref, twice_ref: Ref,
               delta_ref: Ref, dq_in_ref: Ref, total_in_ref: Ref, dq_out_ref: Ref, total_out_ref: Ref, q_rows_ref: Ref,
               go_rows_ref: Ref, dq_ref: Ref, total_ref: Ref, *, call: Call) -> None:
  tile, (starts, steps), i, step = call.tiles.dq, _read(starts_ref, call), pl.program_id(2), pl.program_id(3)
  j, active = call.key_block(i, step, tile, starts)

  @pl.when(step == 0)
  def _start() -> None:
    q_rows_ref[...], go_rows_ref[...], total_ref[...] = stack(q_ref), stack(go_ref), line(total_in_ref)
    for g, at in _members(call, total_in_ref.shape[1]):
      dq_ref[:, at] = dq_in_ref[g]

  def body(mask: pallas_tpu.Mask) -> None:
    pallas_tpu.add_dq(mask, k_ref[0], v_ref[0], q_rows_ref[...], go_rows_ref[...], line(scale_ref), line(m_ref),
                      line(twice_ref), line(delta_ref), dq_ref, total_ref)

  pallas_tpu.when_visible(call, tile, starts, active, i, j, body)

  @pl.when(step == steps - 1)
  def _finish() -> None:
    for g, at in _members(call, total_out_ref.shape[1]):
      dq_out_ref[g], total_out_ref[g : g + 1, :] = dq_ref[:, at], total_ref[:, at]


def _dkv_kernel(starts_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, go_ref: Ref, scale_ref: Ref, m_ref: Ref, twice_ref: Ref,
                delta_ref: Ref, dk_in_ref: Ref, dv_in_ref: Ref, dk_out_ref: Ref, dv_out_ref: Ref, dk_ref: Ref, dv_ref: Ref, *,
                call: Call) -> None:
  tile, (starts, steps), j, step = call.tiles.dkv, _read(starts_ref, call), pl.program_id(2), pl.program_id(3)
  i, active = call.query_block(j, step, tile, starts)

  @pl.when(step == 0)
  def _start() -> None:
    dk_ref[...], dv_ref[...] = dk_in_ref[0], dv_in_ref[0]

  def body(mask: pallas_tpu.Mask) -> None:
    pallas_tpu.add_dkv(mask, k_ref[0], v_ref[0], stack(q_ref), stack(go_ref), line(scale_ref), line(m_ref), line(twice_ref),
                       line(delta_ref), dk_ref, dv_ref)

  pallas_tpu.when_visible(call, tile, starts, active, i, j, body)

  @pl.when(step == steps - 1)
  def _finish() -> None:
    dk_out_ref[0], dv_out_ref[0] = dk_ref[...], dv_ref[...]

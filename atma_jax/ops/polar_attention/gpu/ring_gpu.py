"""One device's work in a ring of keys and values, as GPU kernels: the matrix products and layouts of `pallas_gpu`.

Three kernels, each called once a hop of the ring. They add to the sums of the hops before, in place; the positions at which the
segments of queries and of keys start come as an array. Statistics are relative to M in base 2; a query that has seen nothing has
``M = NOTHING``, which lies above every masked logit and below every other, so that L, Q and S stay 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core.pallas import LOG2_E
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.core.tiles import Tile, Tiles, polar_tiles
from atma_jax.ops.polar_attention.gpu import pallas_gpu
from atma_jax.ops.polar_attention.gpu.gpu_grid import Call, Grid, Ref, by_queries, rows_of, three_loops
from atma_jax.ops.polar_attention.gpu.pallas_gpu import RowSum

NOTHING = -(2.0**60)

supports = pallas_gpu.supports


class RingSteps:
  """See `atma_jax.ops.core.streaming.RingSteps`; `tiles` overrides the table, `interpret` runs the kernels without a GPU."""

  def __init__(self, q: jax.Array, k: jax.Array, *, window: int | None, query_starts: Sequence[jax.Array],
               tiles: Tiles | None = None, interpret: bool = False):
    (self._B, T, self._H, self._D), (S, self._K), self._segments = q.shape, k.shape[1:3], len(query_starts)
    tiles = tiles or polar_tiles("gpu", q.dtype.itemsize, self._D, T)
    self._call = Call(T // self._segments, S // self._segments, window, tiles, interpret)
    self._dtype, self._query_starts = q.dtype, query_starts

  def queries(self, q: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
    q = self._cut(q, 1)
    zeros = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return (q, self._rows(scale * LOG2_E)), Statistics(zeros + NOTHING, zeros, zeros, jnp.zeros(q.shape, jnp.float32))

  def keys(self, k: jax.Array, v: jax.Array) -> Any:
    return self._cut(k, 1), self._cut(v, 1)

  def gather(self, rows: Any, statistics: Any, keys: Any, key_starts: Sequence[jax.Array]) -> Any:
    tile, (q, scale) = self._call.tiles.forward, rows
    query, key, head_rows, scalars, grid = by_queries(tile, q, keys[0])
    M, L, Q, S = self._run("ring_attention", _gather_kernel, tile, grid.shape, key_starts, (q, *keys, scale),
                           (query, key, key, head_rows), statistics, (scalars, scalars, scalars, query))
    return Statistics(M, L, Q, S)

  def statistics(self, statistics: Any) -> Statistics:
    M, L, Q = (rows_of(self._uncut(x, 2)) for x in (statistics.M / LOG2_E, statistics.L, statistics.Q))
    return Statistics(M, L, Q, self._uncut(statistics.S, 1))

  def cotangents(self, q: jax.Array, scale: jax.Array, statistics: Any,
                 cotangents: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
    gL, gQ, gS = cotangents
    q, go = self._cut(q, 1), self._cut(gS.astype(self._dtype), 1)
    scalars = self._rows(scale * LOG2_E), statistics.M, self._rows(2 * gQ * scale), self._rows(-gL * scale)
    return (q, go, *scalars), (jnp.zeros(q.shape, jnp.float32), jnp.zeros(statistics.M.shape, jnp.float32))

  def zero_gradients(self, keys: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys)

  def add_gradients(self, rows: Any, dqueries: Any, keys: Any, dkeys: Any,
                    key_starts: Sequence[jax.Array]) -> tuple[Any, Any]:
    q, go, *scalars = rows
    inputs = q, *keys, go, *scalars
    tile = self._call.tiles.dq
    query, key, head_rows, row, grid = by_queries(tile, q, keys[0])
    dqueries = self._run("ring_attention_dq", _dq_kernel, tile, grid.shape, key_starts, inputs,
                         (query, key, key, query, head_rows, row, row, row), dqueries, (query, row))
    tile, members = self._call.tiles.dkv, self._H // self._K
    grid = Grid(self._B, self._K, keys[0].shape[1] // tile.k)
    query = grid.spec((None, q.shape[1], members, self._D), lambda b, h, j: (b, 0, h, 0))
    key = grid.spec((None, tile.k, None, self._D), lambda b, h, j: (b, j, h, 0))
    head_rows = grid.spec((members, q.shape[1]), lambda b, h, j: (h, 0))
    row = grid.spec((None, members, q.shape[1]), lambda b, h, j: (b, h, 0))
    dkeys = self._run("ring_attention_dkv", _dkv_kernel, tile, grid.shape, key_starts, inputs,
                      (query, key, key, query, head_rows, row, row, row), dkeys, (key, key))
    return dqueries, dkeys

  def query_gradients(self, dqueries: Any) -> tuple[jax.Array, jax.Array]:
    dq, total = dqueries
    return self._uncut(dq, 1), rows_of(self._uncut(total, 2))

  def key_gradients(self, dkeys: Any) -> tuple[jax.Array, jax.Array]:
    dk, dv = (self._uncut(x, 1) for x in dkeys)
    return dk, dv

  def _run(self, name: str, kernel: Callable[..., None], tile: Tile, grid: tuple[int, ...], key_starts: Sequence[jax.Array],
           inputs: Sequence[jax.Array], specs: Sequence[pl.BlockSpec], sums: Any, sum_specs: Sequence[pl.BlockSpec]) -> Any:
    """One `pallas_call` that adds to `sums` in place."""
    starts = jnp.stack([jnp.asarray(x, jnp.int32) for x in (*self._query_starts, *key_starts)])
    whole = pl.BlockSpec(starts.shape, lambda h, b, i: (0,))
    first, lengths = 1 + len(inputs), tuple(x.shape[1] // self._segments for x in inputs[:2])
    return tuple(pl.pallas_call(
      functools.partial(kernel, call=self._call, segments=self._segments, lengths=lengths), name=name, grid=grid,
      interpret=self._call.interpret, in_specs=[whole, *specs, *sum_specs], out_specs=list(sum_specs),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums],
      input_output_aliases={first + i: i for i in range(len(sums))},
      compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    )(starts, *inputs, *sums))

  def _rows(self, x: jax.Array) -> jax.Array:
    return self._cut(rows_of(x), x.ndim - 1)

  def _cut(self, x: jax.Array, axis: int) -> jax.Array:
    """Each segment along `axis` padded to whole blocks."""
    x = self._call.pad(x.reshape(*x.shape[:axis], self._segments, -1, *x.shape[axis + 1 :]), axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def _uncut(self, x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = x.reshape(*x.shape[:axis], self._segments, -1, *x.shape[axis + 1 :])
    x = lax.slice_in_dim(x, 0, self._call.queries, axis=axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _over_keys(call: Call, tile: Tile, segments: int, starts_ref: Ref, row: jax.Array, lengths: tuple[int, int],
               step: Callable[..., Any], carry: Any) -> Any:
  """Folds ``step(keys, visible, carry)`` over the blocks of keys that `tile.q` queries from `row` on see.

  `lengths`, here and below, are the padded lengths of a segment of queries and of keys; `visible` is as for `pallas_gpu.fold`.
  """
  length_q, length_k = lengths
  position = starts_ref[lax.div(row, length_q)] + lax.rem(row, length_q)
  ragged = call.keys < length_k  # keys past the end of a segment have positions that queries may see

  def segment(index: Any, carry: Any) -> Any:
    row = position - starts_ref[segments + index]
    first, full, full_end, end = call.key_blocks(row, tile, -(-call.keys // tile.k))
    if ragged:
      full_end = jnp.clip(call.keys // tile.k, full, full_end)

    def body(masked: bool, j: jax.Array, carry: Any) -> Any:
      def visible() -> jax.Array:
        key = j * tile.k + jnp.arange(tile.k)[None, :]
        seen = call.sees(row + jnp.arange(tile.q)[:, None] - key)
        return seen & (key < call.keys) if ragged else seen

      return step(pl.ds(index * length_k + j * tile.k, tile.k), masked and visible, carry)

    return three_loops((first, full, full_end, end), body, carry)

  return lax.fori_loop(0, segments, segment, carry) if segments > 1 else segment(0, carry)


def _gather_kernel(starts_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, scale_ref: Ref, m_ref: Ref, L_ref: Ref, Q_ref: Ref,
                   S_ref: Ref, m_out_ref: Ref, L_out_ref: Ref, Q_out_ref: Ref, S_out_ref: Ref, *, call: Call, segments: int,
                   lengths: tuple[int, int]) -> None:
  tile, q, scale = call.tiles.forward, q_ref[...], scale_ref[...]
  row = Grid.first_row(tile)

  def step(keys: pallas_gpu.Slice, visible: pallas_gpu.Visible, carry: Any) -> Any:
    return pallas_gpu.fold(call, q, scale, k_ref, v_ref, keys, visible, carry)

  carry = m_ref[...], L_ref[...], Q_ref[...], S_ref[...]
  m, L, Q, S = _over_keys(call, tile, segments, starts_ref, row, lengths, step, carry)
  m_out_ref[...], L_out_ref[...], Q_out_ref[...], S_out_ref[...] = m, L, Q, S


def _dq_kernel(starts_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, go_ref: Ref, scale_ref: Ref, m_ref: Ref, twice_ref: Ref,
               delta_ref: Ref, dq_ref: Ref, total_ref: Ref, dq_out_ref: Ref, total_out_ref: Ref, *, call: Call, segments: int,
               lengths: tuple[int, int]) -> None:
  tile, q, go = call.tiles.dq, q_ref[...], go_ref[...]
  row = Grid.first_row(tile)
  scalars = scale_ref[...], m_ref[...], twice_ref[...], delta_ref[...]

  def step(keys: pallas_gpu.Slice, visible: pallas_gpu.Visible, carry: Any) -> Any:
    return pallas_gpu.add_dq(call, q, go, *scalars, k_ref, v_ref, keys, visible, carry)

  carry = dq_ref[...], RowSum.zero(tile.q, q.dtype)
  dq_out_ref[...], total = _over_keys(call, tile, segments, starts_ref, row, lengths, step, carry)
  total_out_ref[...] = total_ref[...] + RowSum.of(total)


def _dkv_kernel(starts_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, go_ref: Ref, scale_ref: Ref, m_ref: Ref, twice_ref: Ref,
                delta_ref: Ref, dk_ref: Ref, dv_ref: Ref, dk_out_ref: Ref, dv_out_ref: Ref, *, call: Call, segments: int,
                lengths: tuple[int, int]) -> None:
  tile, k, v = call.tiles.dkv, k_ref[...], v_ref[...]
  length_q, length_k = lengths
  key = pl.program_id(1) * tile.k
  position = starts_ref[segments + lax.div(key, length_k)] + lax.rem(key, length_k)
  queries = q_ref, go_ref, scale_ref, m_ref, twice_ref, delta_ref

  def head(h: jax.Array, carry: Any) -> Any:
    def segment(index: Any, carry: Any) -> Any:
      row = position - starts_ref[index]  # of the query at the first key's position

      def step(masked: bool, i: jax.Array, carry: Any) -> Any:
        def visible() -> jax.Array:
          return call.sees(i * tile.q + jnp.arange(tile.q)[None, :] - (row + jnp.arange(tile.k)[:, None]))

        rows = pl.ds(index * length_q + i * tile.q, tile.q)
        return pallas_gpu.add_dkv(call, k, v, *queries, h, rows, masked and visible, carry)

      return three_loops(call.query_blocks(row, tile, length_q // tile.q), step, carry)

    return lax.fori_loop(0, segments, segment, carry) if segments > 1 else segment(0, carry)

  dk_out_ref[...], dv_out_ref[...] = lax.fori_loop(0, q_ref.shape[1], head, (dk_ref[...], dv_ref[...]))

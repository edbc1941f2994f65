"""Cached attention of a chunk of queries a row as a GPU kernel, for prefill: the sums of `polar_attention.gpu.pallas_gpu`.

A program takes a block of one head's queries over the slots that its row has filled, and then over the chunk's own keys up to
its last query.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas, visibility
from atma_jax.ops.core.pallas import LOG2_E, cdiv
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.core.tiles import Tiles, polar_tiles
from atma_jax.ops.polar_attention.cached.api import tokens_since
from atma_jax.ops.polar_attention.gpu.gpu_grid import Call, Grid, Ref, by_queries, rows_of, three_loops
from atma_jax.ops.polar_attention.gpu.pallas_gpu import fold


def supports(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, scale: jax.Array,
             pages: jax.Array | None) -> str | None:
  """Why the kernel cannot serve this call, or None if it can."""
  if keys.dtype != q.dtype:
    return f"takes keys of the queries' dtype {q.dtype} for several new tokens a row, not {keys.dtype}"
  if pages is not None:
    return "takes rings, not pages, for several new tokens a row"
  if scale.dtype != jnp.float32:
    return f"gathers in float32, not {scale.dtype}"
  return pallas.refusal("gpu", q, k, v)


def cached_statistics(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
                      scale: jax.Array, *, window: int | None, layer: int, tiles: Tiles | None = None,
                      interpret: bool = False) -> Statistics:
  """See `atma_jax.ops.polar_attention.cached.api`; keys and values are those of all layers, `tiles` overrides the table."""
  (B, T, H, D), K, R = q.shape, k.shape[2], keys.shape[3]
  tiles = tiles or polar_tiles("gpu", q.dtype.itemsize, D, T)
  call, tile = Call(T, T, window, tiles, interpret), tiles.forward
  if R % tile.k:  # a ring of less than a block of slots
    keys, values = (jnp.pad(x[layer : layer + 1], ((0, 0),) * 3 + ((0, -R % tile.k), (0, 0))) for x in (keys, values))
    layer = 0
  q, k, v, scale = (call.pad(x, 1) for x in (q, k, v, scale))
  query, new, _, rows, grid = by_queries(tile, q, k)
  ring = grid.spec((None, None, None, keys.shape[3], D), lambda b, h, i: (layer, b, lax.div(h, H // K), 0, 0))
  scalars = jax.ShapeDtypeStruct((B, H, q.shape[1]), jnp.float32)
  *statistics, S = pl.pallas_call(
    functools.partial(_kernel, call=call, slots=R, window=window), name="cached_attention_chunk",
    out_shape=[*[scalars] * 3, jax.ShapeDtypeStruct(q.shape, jnp.float32)],
    in_specs=[grid.spec((None,), lambda b, h, i: (b,)), rows, query, ring, ring, new, new],
    out_specs=[*[rows] * 3, query], grid=grid.shape, interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(lengths, rows_of(scale) * LOG2_E, q, keys, values, k, v)
  M, L, Q = (rows_of(x)[:, :T] for x in statistics)
  return Statistics(M / LOG2_E, L, Q, S[:, :T])


def _kernel(length_ref: Ref, scale_ref: Ref, q_ref: Ref, keys_ref: Ref, values_ref: Ref, k_ref: Ref, v_ref: Ref, M_ref: Ref,
            L_ref: Ref, Q_ref: Ref, S_ref: Ref, *, call: Call, slots: int, window: int | None) -> None:
  tile, q, scale, length = call.tiles.forward, q_ref[...], scale_ref[...], length_ref[...]
  row = Grid.first_row(tile)
  held = jnp.minimum(length, slots)

  def past(masked: bool, j: jax.Array, carry: Any) -> Any:
    def visible() -> jax.Array:
      slot = j * tile.k + jnp.arange(tile.k)[None, :]
      if window is None:
        return slot < held
      query = row + jnp.arange(tile.q)[:, None]
      return (slot < held) & visibility.within(query + 1 + tokens_since(slot, length, slots), window)

    return fold(call, q, scale, keys_ref, values_ref, pl.ds(j * tile.k, tile.k), masked and visible, carry)

  def own(masked: bool, j: jax.Array, carry: Any) -> Any:
    def visible() -> jax.Array:
      return call.sees(row + jnp.arange(tile.q)[:, None] - (j * tile.k + jnp.arange(tile.k)[None, :]))

    return fold(call, q, scale, k_ref, v_ref, pl.ds(j * tile.k, tile.k), masked and visible, carry)

  zeros, end = jnp.zeros((tile.q,), jnp.float32), cdiv(held, tile.k)
  carry = zeros - jnp.inf, zeros, zeros, jnp.zeros(q.shape, jnp.float32)
  carry = three_loops((0, 0, lax.div(held, tile.k), end) if window is None else (0, end, end, end), past, carry)
  M, L, Q, S = three_loops(call.key_blocks(row, tile, k_ref.shape[0] // tile.k), own, carry)
  M_ref[...], L_ref[...], Q_ref[...], S_ref[...] = M, L, Q, S

"""Polar attention as GPU kernels: Pallas through Triton, forward and backward, O(T) residuals, no atomics.

Notation, for one query and the keys it sees, logits in base 2 (arXiv 2606.25156):
  lse       log2 of the sum of 2^logit;   p_j = 2^(logit_j - lse), the softmax over real keys
  o         sum_j p_j v_j
  crowding  sum_j p_j^2, the inverse of the participation ratio n_eff
These three do not depend on the running maximum, which makes them safe to store and to differentiate. With cotangents
``go`` of o and ``2 gc`` of p_j^2 the gradient of a logit is ``p_j (go.v_j + 2 gc p_j - delta)``, one number delta per
query: the matrix products are those of softmax attention. Keys after a query are masked by causality, so sequences are
padded at their end to whole blocks and no other mask is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops import kernels
from atma_jax.ops import tiles as table
from atma_jax.ops.kernels import LOG2_E, MASKED, cdiv, dot
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.tiles import Tile, Tiles


def supports(q: jax.Array, k: jax.Array, v: jax.Array, **parameters) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  del parameters
  return kernels.refusal("gpu", q, k, v)


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    tiles: Tiles | None = None, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.polar_attention`; `tiles` overrides the table, `interpret` runs the kernels without a GPU."""
  (T, D), S = (q.shape[1], q.shape[3]), k.shape[1]
  tiles = tiles or table.polar("gpu", q.dtype.itemsize, D, T)
  temp, null = formula.positional_logits(null_base, null_slope, len_gain, queries=T, keys=S, window=window)
  window = S if window is None else min(window, S)
  call = Call(T, S, window, window < S, tiles, interpret)
  direction, lse, crowding = _attend(q, k, v, temp.astype(jnp.float32), null.astype(jnp.float32),
                                     v_null.astype(jnp.float32), call)
  return direction, formula.magnitude(1 / crowding, jax.nn.sigmoid(lse - null), mag_beta)


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static about a call."""

  queries: int
  keys: int
  window: int
  windowed: bool  # else no query has more than `window` keys before it
  tiles: Tiles
  interpret: bool

  @property
  def offset(self) -> int:
    """Position of the first query."""
    return self.keys - self.queries

  def visible(self, distance: jax.Array) -> jax.Array:
    """Whether a query so many positions after a key sees it."""
    return (distance >= 0) & (distance < self.window) if self.windowed else distance >= 0

  def pad(self, x: jax.Array, axis: int) -> jax.Array:
    """Zeros at the end of `axis`, to a whole number of blocks of every kernel."""
    tiles = (self.tiles.forward, self.tiles.dq, self.tiles.dkv)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % max(max(tile.q, tile.k) for tile in tiles))
    return jnp.pad(x, padding) if padding[axis][1] else x

  def key_blocks(self, position: jax.Array, tile: Tile, blocks: int) -> tuple[jax.Array, ...]:
    """Blocks of keys, of so many, that `tile.q` queries from a position on see: (first, first unmasked, first masked, end)."""
    end = jnp.clip(cdiv(position + tile.q, tile.k), 0, blocks)
    full_end = jnp.clip(lax.div(position + 1, tile.k), 0, end)
    if not self.windowed:
      return 0, 0, full_end, end
    first = jnp.minimum(lax.div(jnp.maximum(position - self.window + 1, 0), tile.k), end)
    full = jnp.clip(cdiv(jnp.maximum(position + tile.q - self.window, 0), tile.k), first, end)
    return first, full, jnp.maximum(full, full_end), end

  def query_blocks(self, row: jax.Array, tile: Tile, blocks: int) -> tuple[jax.Array, ...]:
    """Blocks of queries, of so many, that see any of `tile.k` keys of which the first has the position of query `row`."""
    first = jnp.minimum(lax.div(jnp.maximum(row, 0), tile.q), blocks)
    full = jnp.clip(cdiv(jnp.maximum(row + tile.k - 1, 0), tile.q), first, blocks)
    if not self.windowed:
      return first, full, blocks, blocks
    end = jnp.clip(cdiv(jnp.maximum(row + tile.k - 1 + self.window, 0), tile.q), first, blocks)
    full = jnp.minimum(full, end)
    return first, full, jnp.clip(lax.div(jnp.maximum(row + self.window, 0), tile.q), full, end), end

  def scaled_exp2(self, x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """``2^(x scale - shift)``: two instructions an element, where `jnp.exp2` takes care of denormal numbers with five more."""
    if self.interpret:
      return jnp.exp2(x * scale - shift)
    return _assembly("{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }", x, scale, -shift)

  def fma(self, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """``x y + z`` as one instruction: the compiler would round the product by itself."""
    return x * y + z if self.interpret else _assembly("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


def _assembly(code: str, *arguments: jax.Array) -> jax.Array:
  shape = jnp.broadcast_shapes(*(x.shape for x in arguments))
  result, = plgpu.elementwise_inline_asm(code, args=[jnp.broadcast_to(x, shape) for x in arguments], pack=1,
                                         constraints=",".join(["=f", *"f" * len(arguments)]),
                                         result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)])
  return result


def three_loops(bounds: tuple[jax.Array, ...], body, carry):
  """Runs ``body(masked, index, carry)`` over [b0, b1) masked, [b1, b2) unmasked and [b2, b3) masked."""
  for lower, upper, masked in zip(bounds[:-1], bounds[1:], (True, False, True)):
    if lower is not upper:
      carry = lax.fori_loop(lower, upper, functools.partial(body, masked), carry)
  return carry


def rows_of(array: jax.Array) -> jax.Array:
  """(..., T, H) to (..., H, T), the layout in which a kernel reads a block of queries' scalars."""
  return jnp.swapaxes(array, -1, -2)


def by_queries(tile: Tile, q: jax.Array, k: jax.Array) -> tuple[Any, ...]:
  """Blocks of queries, of whole keys, of scalars a head (H, T) and a row (B, H, T); and the grid, the longest rows first."""
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  blocks = T // tile.q
  query = pl.BlockSpec((None, tile.q, None, D), lambda h, b, i: (b, blocks - 1 - i, h, 0))
  key = pl.BlockSpec((None, S, None, D), lambda h, b, i: (b, 0, h // (H // K), 0))
  head_rows = pl.BlockSpec((None, tile.q), lambda h, b, i: (h, blocks - 1 - i))
  rows = pl.BlockSpec((None, None, tile.q), lambda h, b, i: (b, h, blocks - 1 - i))
  return query, key, head_rows, rows, (H, B, blocks)


# What a block of keys, or of queries, adds to the sums of each kernel; `visible` makes the mask, and is false where all see all.


def fold(call: Call, q, scale, k_ref, v_ref, keys, visible, carry):
  """Statistics m, the largest logit in base 2, L, Q and S of a block of queries."""
  m, L, Q, S = carry
  scores = dot(q, k_ref[keys, :], (1, 1))
  if visible:
    scores = jnp.where(visible(), scores, MASKED)
  m_next = jnp.maximum(m, jnp.max(scores, axis=1) * scale)  # the scale is positive
  p, shrink = call.scaled_exp2(scores, scale[:, None], m_next[:, None]), call.scaled_exp2(m, jnp.ones_like(m), m_next)
  L = L * shrink + jnp.sum(p, axis=1)
  Q = Q * (shrink * shrink) + jnp.sum(p * p, axis=1)
  v = v_ref[keys, :]
  return m_next, L, Q, S * shrink[:, None] + dot(p.astype(v.dtype), v)


def add_dq(call: Call, q, go, scale, lse, twice, delta, k_ref, v_ref, keys, visible, carry):
  """dq of a block of queries, and the sum of a query's dlogit, times its scale."""
  (dq, total), natural, k = carry, scale / LOG2_E, k_ref[keys, :]
  p = call.scaled_exp2(dot(q, k, (1, 1)), scale[:, None], lse[:, None])
  if visible:
    p = jnp.where(visible(), p, 0)
  ds = p * call.fma(dot(go, v_ref[keys, :], (1, 1)), natural[:, None],
                    call.fma(p, twice[:, None], -delta[:, None]))
  ds = ds.astype(k.dtype)
  return dq + dot(ds, k), total + jnp.sum(ds.astype(jnp.float32), axis=1)


def add_dkv(call: Call, k, v, q_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref, h, rows, visible, carry):
  """dk and dv of a block of keys, from queries of head h of the group."""
  dk, dv = carry
  q, go, scale = q_ref[rows, h, :], go_ref[rows, h, :], scale_ref[h, rows]
  p = call.scaled_exp2(dot(k, q, (1, 1)), scale[None, :], lse_ref[h, rows][None, :])
  if visible:
    p = jnp.where(visible(), p, 0)
  dv = dv + dot(p.astype(go.dtype), go)
  natural = (scale / LOG2_E)[None, :]
  ds = p * call.fma(dot(v, go, (1, 1)), natural,
                    call.fma(p, twice_ref[h, rows][None, :], -delta_ref[h, rows][None, :]))
  return dk + dot(ds.astype(q.dtype), q), dv


# Forward.


def _forward_kernel(q_ref, k_ref, v_ref, scale_ref, null_ref, v_null_ref, direction_ref, lse_ref, crowding_ref,
                    norm_ref, *, call: Call):
  tile = call.tiles.forward
  row = (pl.num_programs(2) - 1 - pl.program_id(2)) * tile.q  # the longest first
  q, scale = q_ref[...], scale_ref[...]

  def step(masked, j, carry):
    visible = masked and functools.partial(_visible, call, row, j * tile.k, tile)
    return fold(call, q, scale, k_ref, v_ref, pl.ds(j * tile.k, tile.k), visible, carry)

  zeros = jnp.zeros((tile.q,), jnp.float32)
  carry = zeros - jnp.inf, zeros, zeros, jnp.zeros((tile.q, q.shape[1]), jnp.float32)
  m, L, Q, S = three_loops(call.key_blocks(row + call.offset, tile, k_ref.shape[0] // tile.k), step, carry)

  lse, null = m + jnp.log2(L), null_ref[...]
  w_key, w_null = 1 / (1 + jnp.exp2(null - lse)), 1 / (1 + jnp.exp2(lse - null))
  attended = (w_key / L)[:, None] * S + w_null[:, None] * v_null_ref[...][None, :]
  norm = jnp.sqrt(jnp.sum(attended * attended, axis=1))
  direction_ref[...] = (attended / jnp.maximum(norm, formula.NORM_FLOOR)[:, None]).astype(direction_ref.dtype)
  lse_ref[...], crowding_ref[...], norm_ref[...] = lse, Q / (L * L), norm


def _visible(call: Call, row: jax.Array, key: jax.Array, tile: Tile) -> jax.Array:
  return call.visible(row + jnp.arange(tile.q)[:, None] + call.offset - (key + jnp.arange(tile.k)[None, :]))


def _forward(q, k, v, temp, null, v_null, call: Call):
  """Direction (B, T, H, D); lse in base 2, crowding, norm of the attended vector (B, H, T)."""
  scale = call.pad(rows_of(temp) * (LOG2_E * q.shape[3] ** -0.5), 1)
  q, k, v, null = call.pad(q, 1), call.pad(k, 1), call.pad(v, 1), call.pad(rows_of(null) * LOG2_E, 1)
  (B, T, H, D), tile = q.shape, call.tiles.forward
  query, key, head_rows, rows, grid = by_queries(tile, q, k)
  scalars = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
  outputs = pl.pallas_call(
    functools.partial(_forward_kernel, call=call), name="polar_attention",
    out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), scalars, scalars, scalars],
    in_specs=[query, key, key, head_rows, head_rows, pl.BlockSpec((None, D), lambda h, b, i: (h, 0))],
    out_specs=[query, rows, rows, rows], grid=grid, interpret=call.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(q, k, v, scale, null, v_null)
  return outputs[0][:, : call.queries], *(x[..., : call.queries] for x in outputs[1:])


# Backward: one kernel for dq, one for dk and dv, each recomputing p.


def _dq_kernel(q_ref, k_ref, v_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref, dq_ref, q_dq_ref,
               total_ref, *, call: Call):
  tile = call.tiles.dq
  row = (pl.num_programs(2) - 1 - pl.program_id(2)) * tile.q
  q, go, scale = q_ref[...], go_ref[...], scale_ref[...]
  scalars = scale, lse_ref[...], twice_ref[...], delta_ref[...]

  def step(masked, j, carry):
    visible = masked and functools.partial(_visible, call, row, j * tile.k, tile)
    return add_dq(call, q, go, *scalars, k_ref, v_ref, pl.ds(j * tile.k, tile.k), visible, carry)

  zeros = jnp.zeros(q.shape, jnp.float32), jnp.zeros((tile.q,), jnp.float32)
  dq, total = three_loops(call.key_blocks(row + call.offset, tile, k_ref.shape[0] // tile.k), step, zeros)
  dq_ref[...] = dq.astype(dq_ref.dtype)
  q_dq_ref[...], total_ref[...] = jnp.sum(dq * q.astype(jnp.float32), axis=1), total


def _dkv_kernel(q_ref, k_ref, v_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref, dk_ref, dv_ref, *,
                call: Call):
  tile = call.tiles.dkv
  key = pl.program_id(2) * tile.k
  k, v = k_ref[...], v_ref[...]
  bounds = call.query_blocks(key - call.offset, tile, q_ref.shape[0] // tile.q)
  queries = q_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref

  def head(h, carry):
    def step(masked, i, carry):
      def visible():
        query = i * tile.q + jnp.arange(tile.q)[None, :]
        return call.visible(query + call.offset - (key + jnp.arange(tile.k)[:, None]))

      return add_dkv(call, k, v, *queries, h, pl.ds(i * tile.q, tile.q), masked and visible, carry)
    return three_loops(bounds, step, carry)

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
  dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


def _backward(q, k, v, go, temp, lse, twice, delta, call: Call):
  """Gradients of q, k, v; ``q.dq`` and the sum of a query's dlogit (B, H, T); from `go` (B, T, H, D) and (B, H, T) scalars."""
  natural = rows_of(temp) * q.shape[3] ** -0.5
  scale = call.pad(natural * LOG2_E, 1)
  twice, delta = (x * natural for x in (twice, delta))
  lse, twice, delta = (call.pad(x, 2) for x in (lse, twice, delta))
  q, k, v, go = (call.pad(x, 1) for x in (q, k, v, go))
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  arguments = q, k, v, go, scale, lse, twice, delta

  tile = call.tiles.dq
  query, key, head_rows, rows, grid = by_queries(tile, q, k)
  scalars = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
  dq, q_dq, total = pl.pallas_call(
    functools.partial(_dq_kernel, call=call), name="polar_attention_dq",
    out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), scalars, scalars],
    in_specs=[query, key, key, query, head_rows, rows, rows, rows],
    out_specs=[query, rows, rows], grid=grid, interpret=call.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(*arguments)

  tile = call.tiles.dkv
  query = pl.BlockSpec((None, T, H // K, D), lambda h, b, j: (b, 0, h, 0))
  key = pl.BlockSpec((None, tile.k, None, D), lambda h, b, j: (b, j, h, 0))
  head_rows = pl.BlockSpec((H // K, T), lambda h, b, j: (h, 0))
  rows = pl.BlockSpec((None, H // K, T), lambda h, b, j: (b, h, 0))
  dk, dv = pl.pallas_call(
    functools.partial(_dkv_kernel, call=call), name="polar_attention_dkv",
    out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    in_specs=[query, key, key, query, head_rows, rows, rows, rows],
    out_specs=[key, key], grid=(K, B, S // tile.k), interpret=call.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(*arguments)
  dq, dk, dv = dq[:, : call.queries], dk[:, : call.keys], dv[:, : call.keys]
  q_dq, total = q_dq[..., : call.queries], total[..., : call.queries] / natural
  return dq, dk, dv, q_dq, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, temp, null, v_null, call: Call):
  """Direction (B, T, H, D), and natural log-sum-exp and crowding (B, T, H), from temp and null (T, H)."""
  return _attend_forward(q, k, v, temp, null, v_null, call)[0]


def _attend_forward(q, k, v, temp, null, v_null, call: Call):
  direction, lse, crowding, norm = checkpoint_name(_forward(q, k, v, temp, null, v_null, call), "polar_attention")
  residuals = q, k, v, temp, null, v_null, direction, lse, crowding, norm
  return (direction, rows_of(lse) / LOG2_E, rows_of(crowding)), residuals


def _attend_backward(call: Call, residuals, cotangents):
  q, k, v, temp, null, v_null, direction, lse, crowding, norm = residuals
  natural_lse, crowding = rows_of(lse) / LOG2_E, rows_of(crowding)
  through = formula.through_null(cotangents, direction, natural_lse - null, crowding, rows_of(norm), v_null)
  dq, dk, dv, q_dq, total = _backward(q, k, v, through.go.astype(q.dtype), temp, lse, rows_of(through.twice),
                                      rows_of(through.delta), call)
  dtemp = formula.temperature_gradient(rows_of(q_dq), rows_of(total), through.d_lse, natural_lse, crowding, temp)
  return dq, dk, dv, jnp.sum(dtemp, axis=0), through.d_null, through.d_v_null


_attend.defvjp(_attend_forward, _attend_backward)

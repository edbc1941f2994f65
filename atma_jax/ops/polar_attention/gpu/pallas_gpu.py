"""Polar attention as GPU kernels: Pallas through Triton, forward and backward, O(T) residuals, no atomics.

Notation, for one query and the keys it sees, logits in base 2 (arXiv 2606.25156):
  lse       log2 of the sum of 2^logit;   p_j = 2^(logit_j - lse), the softmax over real keys
  o         sum_j p_j v_j
  sum_p2    sum_j p_j^2, the inverse of the participation ratio n_eff
These three do not depend on the running maximum, which makes them safe to store and to differentiate. With cotangents
``go`` of o and ``2 gc`` of p_j^2 the gradient of a logit is ``p_j (go.v_j + 2 gc p_j - delta)``, one number delta per
query: the matrix products are those of softmax attention. Arrays are read and written as callers have them: where a sequence
ends within a block, rows past its end are read as zeros, which causality masks as keys and which add nothing as queries.

Everything that goes over arrays of (B, T, H, D) happens in the three kernels: the forward kernel also makes the magnitude, and
that of dq also takes the gradients of the outputs back to o, the log-sum-exp and sum_p2, and sums the gradients of the
parameters over its block of queries. What the scalars and counts of a query come to is `formula.per_query`, called in the
kernels; they know neither how many scalars there are nor what the formula makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch, pallas, visibility
from atma_jax.ops.core.pallas import LOG2_E, MASKED, dot
from atma_jax.ops.core.tiles import Tile, Tiles, polar_tiles
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.formula import Counts, PerQuery
from atma_jax.ops.polar_attention.gpu.gpu_grid import Call, Grid, Ref, by_queries, rows_where, three_loops
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams, Scalars

Slice = pl.Slice | slice
Visible = Callable[[], jax.Array] | Literal[False]  # makes the mask of a pair of blocks; False where every query sees every key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counted:
  """`Counts` of the queries, and where their documents start; arrays, or references to a block of them.

  Attributes:
    counts: (features, rows), or (B, features, rows) where rows pack documents.
    starts: (B, rows) int32 positions before which each query sees no key; None is 0.
  """

  counts: Any
  starts: Any = None

  def first_keys(self) -> jax.Array | None:
    """In a kernel: the block of `starts`."""
    return None if self.starts is None else self.starts[...]


def supports(q: jax.Array, k: jax.Array, v: jax.Array, *_: Any, **__: Any) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  return pallas.refusal("gpu", q, k, v)


def attend(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], params: PolarParams,
           spec: AttentionSpec, *, starts: Int[Array, "B T"] | None = None, tiles: Tiles | None = None,
           interpret: bool = False) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """See `atma_jax.ops.polar_attention.api`; `tiles` overrides the table, `interpret` runs the kernels without a GPU."""
  (T, D), S = (q.shape[1], q.shape[3]), k.shape[1]
  tiles = tiles or polar_tiles("gpu", q.dtype.itemsize, D, T)
  window = None if spec.window is None or spec.window >= S else spec.window
  scalars = jnp.stack(params.scalars(), axis=-1).astype(jnp.float32)
  return _attend(q, k, v, scalars, params.v_null.astype(jnp.float32), starts, Call(T, S, window, tiles, interpret), spec)


# What a block of keys, or of queries, adds to the sums of each kernel; `visible` makes the mask, and is False where all see all.


def fold(call: Call, q: jax.Array, scale: jax.Array, k_ref: Ref, v_ref: Ref, keys: Slice, visible: Visible,
         carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Adds a block of keys to the statistics of a block of queries: m, the largest logit in base 2, L, Q and S."""
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


def add_dq(call: Call, q: jax.Array, go: jax.Array, scale: jax.Array, lse: jax.Array, twice: jax.Array, delta: jax.Array,
           k_ref: Ref, v_ref: Ref, keys: Slice, visible: Visible, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
  """Adds a block of keys to dq of a block of queries, and to each query's sum of dlogit (a `RowSum`), times its scale."""
  (dq, total), natural, k = carry, scale / LOG2_E, k_ref[keys, :]
  p = call.scaled_exp2(dot(q, k, (1, 1)), scale[:, None], lse[:, None])
  if visible:
    p = jnp.where(visible(), p, 0)
  ds = p * call.fma(dot(go, v_ref[keys, :], (1, 1)), natural[:, None], call.fms(p, twice[:, None], delta[:, None]))
  ds = ds.astype(k.dtype)
  return dq + dot(ds, k), RowSum.add(total, ds)


class RowSum:
  """Running sums over the keys of each query's terms (rows, keys).

  Terms in bfloat16 are summed by a product with ones, into equal columns: to add rounded terms one by one would take more
  instructions than everything else that is done to them.
  """

  COLUMNS = 16

  @classmethod
  def zero(cls, rows: int, dtype: jnp.dtype) -> jax.Array:
    """Sums over no keys, for terms of `dtype`."""
    return jnp.zeros((rows, cls.COLUMNS) if dtype == jnp.bfloat16 else (rows,), jnp.float32)

  @classmethod
  def add(cls, total: jax.Array, terms: jax.Array) -> jax.Array:
    """The sums with the terms of a block of keys added."""
    if total.ndim == 1:
      return total + jnp.sum(terms, axis=1)
    return total + dot(terms, jnp.ones((terms.shape[1], cls.COLUMNS), terms.dtype))

  @classmethod
  def of(cls, total: jax.Array) -> jax.Array:
    """The sums as one number per row."""
    return total if total.ndim == 1 else jnp.sum(total, axis=1) / cls.COLUMNS


def add_dkv(call: Call, k: jax.Array, v: jax.Array, q_ref: Ref, go_ref: Ref, scale_ref: Ref, lse_ref: Ref, twice_ref: Ref,
            delta_ref: Ref, h: jax.Array, rows: Slice, visible: Visible,
            carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Adds a block of queries of head h of the group to dk and dv of a block of keys."""
  dk, dv = carry
  q, go, scale = q_ref[rows, h, :], go_ref[rows, h, :], scale_ref[h, rows]
  p = call.scaled_exp2(dot(k, q, (1, 1)), scale[None, :], lse_ref[h, rows][None, :])
  if visible:
    p = jnp.where(visible(), p, 0)
  dv = dv + dot(p.astype(go.dtype), go)
  natural = (scale / LOG2_E)[None, :]
  ds = p * call.fma(dot(v, go, (1, 1)), natural, call.fms(p, twice_ref[h, rows][None, :], delta_ref[h, rows][None, :]))
  return dk + dot(ds.astype(q.dtype), q), dv


# The formula, inside the kernels.


def _read(scalars_ref: Ref, counted: Counted) -> tuple[Scalars, Counts]:
  """The head's scalars and the counts of a block of queries, a row of numbers each."""
  counts = Counts(*(counted.counts[i, :] for i in range(len(Counts._fields))))
  ones = jnp.ones_like(counts.log)
  return Scalars(*(scalars_ref[i] * ones for i in range(len(Scalars._fields)))), counts


def _count_features(call: Call, spec: AttentionSpec, starts: jax.Array | None) -> Counted:
  """The `Counts` and starts of every query; rows past the last query repeat it."""
  positions = jnp.minimum(call.offset + jnp.arange(call.rows), call.keys - 1)
  if starts is not None:
    starts = jnp.pad(starts.astype(jnp.int32), ((0, 0), (0, call.rows - call.queries)), mode="edge")
    positions = positions - starts
  return Counted(jnp.stack(formula.count_features(spec.visible_keys(positions).astype(jnp.float32), spec), axis=-2), starts)


def _specs(tile: Tile, q: jax.Array, k: jax.Array, length: int, documents: bool) -> tuple[Any, ...]:
  """Blocks of queries, of whole keys, of (B, H, T), of (B, T, H), of a head's scalars, of counts and of v_null; and the grid."""
  query, key, _, rows, grid = by_queries(tile, q, k, length)
  tokens = grid.spec((None, tile.q, None), lambda b, h, i: (b, i, h))
  scalars = grid.spec((None, len(Scalars._fields)), lambda b, h, i: (h, 0))
  counts = Counted(grid.spec((len(Counts._fields), tile.q), lambda b, h, i: (0, i)))
  if documents:
    counts = Counted(grid.spec((None, len(Counts._fields), tile.q), lambda b, h, i: (b, 0, i)),
                     grid.spec((None, tile.q), lambda b, h, i: (b, i)))
  return query, key, rows, tokens, scalars, counts, grid.spec((None, q.shape[3]), lambda b, h, i: (h, 0)), grid


def _mask(call: Call, row: jax.Array, starts: jax.Array | None, key: jax.Array, tile: Tile) -> jax.Array:
  visible = call.sees(row + jnp.arange(tile.q)[:, None] + call.offset - (key + jnp.arange(tile.k)[None, :]))
  return visible if starts is None else visible & (key + jnp.arange(tile.k)[None, :] >= starts[:, None])


# Forward.


def _forward_kernel(q_ref: Ref, k_ref: Ref, v_ref: Ref, scalars_ref: Ref, counted: Counted, v_null_ref: Ref,
                    direction_ref: Ref, magnitude_ref: Ref, lse_ref: Ref, sum_p2_ref: Ref, norm_ref: Ref, *, call: Call,
                    spec: AttentionSpec) -> None:
  tile, row = call.tiles.forward, Grid.first_row(call.tiles.forward)
  left, ragged = call.queries - row, call.rows > call.queries
  q_ref, direction_ref, magnitude_ref = rows_where(ragged, left, q_ref, direction_ref, magnitude_ref)
  q, per_query = q_ref[:, :], formula.per_query(*_read(scalars_ref, counted), spec, multiply_add=call.fma)
  starts = counted.first_keys()
  scale = per_query.temp * (LOG2_E * q.shape[1] ** -0.5)

  def step(masked: bool, j: jax.Array, carry: Any) -> Any:
    k, v = rows_where(masked and call.keys % tile.k > 0, call.keys, k_ref, v_ref)
    visible = masked and functools.partial(_mask, call, row, starts, j * tile.k, tile)
    return fold(call, q, scale, k, v, pl.ds(j * tile.k, tile.k), visible, carry)

  zeros = jnp.zeros((tile.q,), jnp.float32)
  carry = zeros - jnp.inf, zeros, zeros, jnp.zeros((tile.q, q.shape[1]), jnp.float32)
  m, L, Q, S = three_loops(call.key_blocks(row + call.offset, tile, pl.cdiv(call.keys, tile.k), starts), step, carry)

  lse, null = m + jnp.log2(L), per_query.null * LOG2_E
  w_key, w_null = 1 / (1 + jnp.exp2(null - lse)), 1 / (1 + jnp.exp2(lse - null))
  attended = call.fma(S, (w_key / L)[:, None], w_null[:, None] * v_null_ref[...][None, :])
  norm = jnp.sqrt(jnp.sum(attended * attended, axis=1))
  direction_ref[:, :] = (attended * (1 / jnp.maximum(norm, formula.NORM_FLOOR))[:, None]).astype(q.dtype)
  sum_p2 = Q / (L * L)
  magnitude_ref[:,] = formula.magnitude(1 / sum_p2, w_key, per_query.curve)
  if ragged:  # the backward pass reads the scalars of queries that do not exist, too
    exists = jnp.arange(tile.q) < left
    lse, sum_p2, norm = (jnp.where(exists, x, 1) for x in (lse, sum_p2, norm))
  lse_ref[...], sum_p2_ref[...], norm_ref[...] = lse, sum_p2, norm


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, v_null: jax.Array, starts: jax.Array | None,
             call: Call, spec: AttentionSpec) -> list[jax.Array]:
  """Direction (B, T, H, D), magnitude (B, T, H); lse in base 2, sum_p2 and norm of the attended vector, (B, H, rows) each."""
  (B, T, H, _), tile = q.shape, call.tiles.forward
  query, key, rows, tokens, of_head, counts, vector, grid = _specs(tile, q, k, call.rows, starts is not None)
  per_row = jax.ShapeDtypeStruct((B, H, call.rows), jnp.float32)
  return pl.pallas_call(
    functools.partial(_forward_kernel, call=call, spec=spec), name="polar_attention",
    out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, T, H), jnp.float32), *[per_row] * 3],
    in_specs=[query, key, key, of_head, counts, vector], out_specs=[query, tokens, rows, rows, rows], grid=grid.shape,
    interpret=call.interpret, compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(q, k, v, scalars, _count_features(call, spec, starts), v_null)


# Backward: one kernel for dq, one for dk and dv, each recomputing p.


def _dq_kernel(q_ref: Ref, k_ref: Ref, v_ref: Ref, g_ref: Ref, direction_ref: Ref, g_magnitude_ref: Ref, scalars_ref: Ref,
               counted: Counted, v_null_ref: Ref, lse_ref: Ref, sum_p2_ref: Ref, norm_ref: Ref, dq_ref: Ref, go_ref: Ref,
               scale_ref: Ref, twice_ref: Ref, delta_ref: Ref, d_v_null_ref: Ref, d_scalars_ref: Ref, *, call: Call,
               spec: AttentionSpec) -> None:
  tile, row = call.tiles.dq, Grid.first_row(call.tiles.dq)
  ragged = call.rows > call.queries
  q_ref, g_ref, direction_ref, g_magnitude_ref, dq_ref, go_ref = rows_where(
    ragged, call.queries - row, q_ref, g_ref, direction_ref, g_magnitude_ref, dq_ref, go_ref)
  q, lse, sum_p2 = q_ref[:, :], lse_ref[...], sum_p2_ref[...]
  temp, null, curve = formula.per_query(*_read(scalars_ref, counted), spec, multiply_add=call.fma)
  starts = counted.first_keys()
  log_odds = lse / LOG2_E - null

  def magnitude(sum_p2: jax.Array, log_odds: jax.Array, curve: formula.Curve) -> jax.Array:
    return formula.magnitude(1 / sum_p2, jax.nn.sigmoid(log_odds), curve)

  _, pull = jax.vjp(magnitude, sum_p2, log_odds, curve)
  g_sum_p2, g_lse, d_curve = pull(g_magnitude_ref[:,])
  through = formula.through_null_of_rows((g_ref[:, :], g_lse, g_sum_p2), direction_ref[:, :], log_odds, sum_p2, norm_ref[...],
                                         v_null_ref[...][None, :])
  d_v_null_ref[...] = jnp.sum(through.d_v_null, axis=0)
  go = through.go.astype(q.dtype)
  go_ref[:, :] = go
  natural = temp * q.shape[1] ** -0.5
  scale, twice, delta = temp * (LOG2_E * q.shape[1] ** -0.5), through.twice * natural, through.delta * natural
  scale_ref[...], twice_ref[...], delta_ref[...] = scale, twice, delta

  def step(masked: bool, j: jax.Array, carry: Any) -> Any:
    k, v = rows_where(masked and call.keys % tile.k > 0, call.keys, k_ref, v_ref)
    visible = masked and functools.partial(_mask, call, row, starts, j * tile.k, tile)
    return add_dq(call, q, go, scale, lse, twice, delta, k, v, pl.ds(j * tile.k, tile.k), visible, carry)

  zeros = jnp.zeros(q.shape, jnp.float32), RowSum.zero(tile.q, q.dtype)
  dq, total = three_loops(call.key_blocks(row + call.offset, tile, pl.cdiv(call.keys, tile.k), starts), step, zeros)
  dq_ref[:, :] = dq.astype(q.dtype)
  d_temp = formula.temperature_gradient(jnp.sum(dq * q.astype(jnp.float32), axis=1), RowSum.of(total) / natural, through.d_lse,
                                        lse / LOG2_E, sum_p2, temp)
  scalars, counts = _read(scalars_ref, counted)
  _, pull = jax.vjp(lambda scalars: formula.per_query(scalars, counts, spec, multiply_add=call.differentiable_fma), scalars)
  d_scalars, = pull(PerQuery(d_temp, -through.d_lse, d_curve))  # the log-sum-exp counts from the null's logit
  for i, gradient in enumerate(d_scalars):
    d_scalars_ref[i] = jnp.sum(gradient)


def _dkv_kernel(q_ref: Ref, k_ref: Ref, v_ref: Ref, go_ref: Ref, scale_ref: Ref, lse_ref: Ref, twice_ref: Ref, delta_ref: Ref,
                ends_ref: Ref | None, dk_ref: Ref, dv_ref: Ref, *, call: Call) -> None:
  tile = call.tiles.dkv
  key = pl.program_id(1) * tile.k
  ragged = call.keys % tile.k > 0
  k_ref, v_ref, dk_ref, dv_ref = rows_where(ragged, call.keys - key, k_ref, v_ref, dk_ref, dv_ref)
  k, v = k_ref[:, :], v_ref[:, :]
  ends = None if ends_ref is None else ends_ref[...]
  bounds = call.query_blocks(key - call.offset, tile, pl.cdiv(call.queries, tile.q), ends)
  if call.queries % tile.q:  # the last block has fewer queries
    first, full, full_end, end = bounds
    bounds = first, full, jnp.clip(call.queries // tile.q, full, full_end), end

  def head(h: jax.Array, carry: Any) -> Any:
    def step(masked: bool, i: jax.Array, carry: Any) -> Any:
      def visible() -> jax.Array:
        query = i * tile.q + jnp.arange(tile.q)[None, :]
        seen = call.sees(query + call.offset - (key + jnp.arange(tile.k)[:, None]))
        return seen if ends is None else seen & (query <= ends[:, None])

      queries, cotangents = rows_where(masked and call.queries % tile.q > 0, call.queries, q_ref, go_ref)
      return add_dkv(call, k, v, queries, cotangents, scale_ref, lse_ref, twice_ref, delta_ref, h, pl.ds(i * tile.q, tile.q),
                     masked and visible, carry)
    return three_loops(bounds, step, carry)

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
  dk_ref[:, :], dv_ref[:, :] = dk.astype(k.dtype), dv.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, v_null: jax.Array, starts: jax.Array | None, call: Call,
            spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
  """Direction (B, T, H, D) and magnitude (B, T, H), from the transformed scalars of each head (H, scalars) and v_null (H, D)."""
  return _attend_forward(q, k, v, scalars, v_null, starts, call, spec)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, v_null: jax.Array, starts: jax.Array | None,
                    call: Call, spec: AttentionSpec) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  outputs = _forward(q, k, v, scalars, v_null, starts, call, spec)
  direction, magnitude, *rows = checkpoint_name(outputs, dispatch.POLAR_ATTENTION)
  return (direction, magnitude), (q, k, v, scalars, v_null, starts, direction, *rows)


def _attend_backward(call: Call, spec: AttentionSpec, residuals: tuple[Any, ...],
                     cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
  q, k, v, scalars, v_null, starts, direction, lse, sum_p2, norm = residuals
  g_direction, g_magnitude = cotangents
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  per_row = jax.ShapeDtypeStruct((B, H, call.rows), jnp.float32)

  tile = call.tiles.dq
  query, key, rows, tokens, of_head, counts, vector, grid = _specs(tile, q, k, call.rows, starts is not None)
  sums = [grid.spec((None, None, None, n), lambda b, h, i: (b, i, h, 0)) for n in (D, scalars.shape[-1])]
  dq, go, scale, twice, delta, d_v_null, d_scalars = pl.pallas_call(
    functools.partial(_dq_kernel, call=call, spec=spec), name="polar_attention_dq",
    out_shape=[*[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 2, *[per_row] * 3,
               *(jax.ShapeDtypeStruct((B, grid.blocks, H, n), jnp.float32) for n in (D, scalars.shape[-1]))],
    in_specs=[query, key, key, query, query, tokens, of_head, counts, vector, rows, rows, rows],
    out_specs=[query, query, rows, rows, rows, *sums], grid=grid.shape, interpret=call.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(q, k, v, g_direction, direction, g_magnitude, scalars, _count_features(call, spec, starts), v_null, lse, sum_p2, norm)

  tile = call.tiles.dkv
  grid = Grid(B, K, pl.cdiv(S, tile.k))
  query = grid.spec((None, pl.cdiv(T, tile.q) * tile.q, H // K, D), lambda b, h, j: (b, 0, h, 0))
  key = grid.spec((None, tile.k, None, D), lambda b, h, j: (b, j, h, 0))
  rows = grid.spec((None, H // K, call.rows), lambda b, h, j: (b, h, 0))
  ends, of_keys = None, None
  if starts is not None:
    ends = jnp.pad(visibility.document_ends(starts).astype(jnp.int32), ((0, 0), (0, -S % tile.k)), mode="edge")
    of_keys = grid.spec((None, tile.k), lambda b, h, j: (b, j))
  dk, dv = pl.pallas_call(
    functools.partial(_dkv_kernel, call=call), name="polar_attention_dkv",
    out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    in_specs=[query, key, key, query, rows, rows, rows, rows, of_keys],
    out_specs=[key, key], grid=grid.shape, interpret=call.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(q, k, v, go, scale, lse, twice, delta, ends)
  return dq, dk, dv, jnp.sum(d_scalars, axis=(0, 1)), jnp.sum(d_v_null, axis=(0, 1)), None


_attend.defvjp(_attend_forward, _attend_backward)

"""Polar attention as GPU kernels: Pallas through Triton, forward and backward, O(T) residuals, no atomics.

Notation, for one query and the keys it sees, logits in base 2 (arXiv 2606.25156):
  lse       log2 of the sum of 2^logit;   p_j = 2^(logit_j - lse), the softmax over real keys
  o         sum_j p_j v_j
  crowding  sum_j p_j^2, the inverse of the participation ratio n_eff
These three do not depend on the running maximum, which makes them safe to store and to differentiate. With cotangents
``go`` of o and ``2 gc`` of p_j^2 the gradient of a logit is ``p_j (go.v_j + 2 gc p_j - delta)``, one number delta per
query: the matrix products are those of softmax attention. Arrays are read and written as callers have them: where a sequence
ends within a block, rows past its end are read as zeros, which causality masks as keys and which add nothing as queries.

All that goes over arrays of (B, T, H, D) is done by the three kernels: that of the forward pass also makes the magnitude,
and that of dq also takes the gradients of the outputs back to o, the log-sum-exp and the crowding, and sums the
gradients of the parameters of its block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.core import tiles as table
from atma_jax.ops.core.pallas import LOG2_E, MASKED, cdiv, dot
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.polar_attention import formula

NULL_BASE, NULL_SLOPE, LEN_GAIN, MAG_BETA = range(4)  # places of a head's numbers, all but the first after softplus
LOG, ROOT, HELD, SHARE = range(4)  # places of a count's numbers


def supports(q: jax.Array, k: jax.Array, v: jax.Array, **parameters) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  del parameters
  return kernels.refusal("gpu", q, k, v)


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    null_length: int | None = None, count_length: int | None = None, tiles: Tiles | None = None,
                    interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.polar_attention`; `tiles` overrides the table, `interpret` runs the kernels without a GPU."""
  (T, D), S = (q.shape[1], q.shape[3]), k.shape[1]
  tiles = tiles or table.polar("gpu", q.dtype.itemsize, D, T)
  window = S if window is None else min(window, S)
  call = Call(T, S, window, window < S, tiles, interpret, null_length, count_length)
  heads = null_base, *map(jax.nn.softplus, (null_slope, len_gain, mag_beta))
  return _attend(q, k, v, jnp.stack(heads, axis=-1).astype(jnp.float32), v_null.astype(jnp.float32), call)


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static about a call."""

  queries: int
  keys: int
  window: int
  windowed: bool  # else no query has more than `window` keys before it
  tiles: Tiles
  interpret: bool
  null_length: int | None = None
  count_length: int | None = None

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

  @property
  def rows(self) -> int:
    """Queries in whole blocks of every kernel: how many have scalars in memory."""
    return pl.cdiv(self.queries, rows := max(self.tiles.forward.q, self.tiles.dq.q, self.tiles.dkv.q)) * rows

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
    return _assembly("{ .reg .f32 t; neg.f32 t, $3; fma.rn.f32 t, $1, $2, t; ex2.approx.ftz.f32 $0, t; }", x, scale, shift)

  def fms(self, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """``x y - z`` as one instruction, the sign taken within: before it, it would be an instruction an element."""
    return x * y - z if self.interpret else _assembly("{ .reg .f32 t; neg.f32 t, $3; fma.rn.f32 $0, $1, $2, t; }", x, y, z)

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


@dataclasses.dataclass(frozen=True)
class Grid:
  """One program a batch row, head and block of rows.

  Programs start in the order of the grid's axes, the first changing fastest: a group of heads, a block, a group. Few heads
  are in a group, so that what its programs read again and again stays in the L2 cache; of blocks the longest come first.
  """

  batch: int
  heads: int
  blocks: int
  descending: bool = False  # the last block is the longest

  @property
  def group(self) -> int:
    """Least number of heads, of all batch rows, with two programs for every multiprocessor."""
    pairs = self.batch * self.heads
    return next(n for n in range(1, pairs + 1) if pairs % n == 0 and (n * self.blocks >= 256 or n == pairs))

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.group, self.blocks, self.batch * self.heads // self.group

  def spec(self, shape: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
    """Blocks of this shape, at ``place(batch row, head, block)``."""
    def index(x, y, z):
      pair = z * self.group + x
      return place(lax.div(pair, self.heads), lax.rem(pair, self.heads), self.blocks - 1 - y if self.descending else y)

    return pl.BlockSpec(shape, index)

  @staticmethod
  def first_row(tile: Tile) -> jax.Array:
    """Row at which the program's block of queries starts, with blocks descending."""
    return (pl.num_programs(1) - 1 - pl.program_id(1)) * tile.q


def by_queries(tile: Tile, q: jax.Array, k: jax.Array, length: int | None = None) -> tuple[Any, ...]:
  """Blocks of queries, of whole keys, of scalars a head (H, T) and a row (B, H, T); and the grid, the longest rows first.

  `length` is that of scalars, in whole blocks, where q has fewer queries.
  """
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  grid = Grid(B, H, (length or T) // tile.q, descending=True)
  query = grid.spec((None, tile.q, None, D), lambda b, h, i: (b, i, h, 0))
  key = grid.spec((None, pl.cdiv(S, tile.k) * tile.k, None, D), lambda b, h, i: (b, 0, lax.div(h, H // K), 0))
  head_rows = grid.spec((None, tile.q), lambda b, h, i: (h, i))
  rows = grid.spec((None, None, tile.q), lambda b, h, i: (b, h, i))
  return query, key, head_rows, rows, grid


@dataclasses.dataclass(frozen=True)
class Rows:
  """A ref of rows along its first axis, of which `count` from its first are there; others are read as 0 and not written."""

  ref: Any
  count: jax.Array | int

  def __getitem__(self, index: tuple[Any, ...]) -> jax.Array:
    ref = self.ref.at[index]
    return plgpu.load(ref, mask=self._there(index[0], ref.shape), other=0)

  def __setitem__(self, index: tuple[Any, ...], value: jax.Array) -> None:
    ref = self.ref.at[index]
    plgpu.store(ref, value, mask=self._there(index[0], ref.shape))

  def _there(self, rows: Any, shape: tuple[int, ...]) -> jax.Array:
    start = 0 if isinstance(rows, slice) else rows.start
    return jnp.broadcast_to(start + lax.broadcasted_iota(jnp.int32, (shape[0], *(1,) * (len(shape) - 1)), 0) < self.count, shape)


def rows_where(ragged: bool, count: jax.Array | int, *refs: Any) -> tuple[Any, ...]:
  """The refs, as `Rows` if some of their rows may not be there."""
  return tuple(Rows(ref, count) for ref in refs) if ragged else refs


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
  """dq of a block of queries, and the sum of a query's dlogit as `Total` has it, times its scale."""
  (dq, total), natural, k = carry, scale / LOG2_E, k_ref[keys, :]
  p = call.scaled_exp2(dot(q, k, (1, 1)), scale[:, None], lse[:, None])
  if visible:
    p = jnp.where(visible(), p, 0)
  ds = p * call.fma(dot(go, v_ref[keys, :], (1, 1)), natural[:, None], call.fms(p, twice[:, None], delta[:, None]))
  ds = ds.astype(k.dtype)
  return dq + dot(ds, k), Total.add(total, ds)


class Total:
  """Sums of a query's terms (rows, keys) from block to block.

  Of bfloat16, the sums are a product with ones, in equal columns: to add rounded terms up one by one takes more instructions
  than the rest of what is done to them.
  """

  COLUMNS = 16

  @classmethod
  def zero(cls, rows: int, dtype: jnp.dtype) -> jax.Array:
    return jnp.zeros((rows, cls.COLUMNS) if dtype == jnp.bfloat16 else (rows,), jnp.float32)

  @classmethod
  def add(cls, total: jax.Array, terms: jax.Array) -> jax.Array:
    if total.ndim == 1:
      return total + jnp.sum(terms, axis=1)
    return total + dot(terms, jnp.ones((terms.shape[1], cls.COLUMNS), terms.dtype))

  @classmethod
  def of(cls, total: jax.Array) -> jax.Array:
    return total if total.ndim == 1 else jnp.sum(total, axis=1) / cls.COLUMNS


def add_dkv(call: Call, k, v, q_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref, h, rows, visible, carry):
  """dk and dv of a block of keys, from queries of head h of the group."""
  dk, dv = carry
  q, go, scale = q_ref[rows, h, :], go_ref[rows, h, :], scale_ref[h, rows]
  p = call.scaled_exp2(dot(k, q, (1, 1)), scale[None, :], lse_ref[h, rows][None, :])
  if visible:
    p = jnp.where(visible(), p, 0)
  dv = dv + dot(p.astype(go.dtype), go)
  natural = (scale / LOG2_E)[None, :]
  ds = p * call.fma(dot(v, go, (1, 1)), natural, call.fms(p, twice_ref[h, rows][None, :], delta_ref[h, rows][None, :]))
  return dk + dot(ds.astype(q.dtype), q), dv


# Forward.


def _forward_kernel(q_ref, k_ref, v_ref, heads_ref, counts_ref, v_null_ref, direction_ref, magnitude_ref, lse_ref,
                    crowding_ref, norm_ref, *, call: Call):
  tile, row = call.tiles.forward, Grid.first_row(call.tiles.forward)
  left, ragged = call.queries - row, call.rows > call.queries
  q_ref, direction_ref, magnitude_ref = rows_where(ragged, left, q_ref, direction_ref, magnitude_ref)
  q, (temp, _, _, null) = q_ref[:, :], _temperature(call, heads_ref, counts_ref)
  scale = temp * (LOG2_E * q.shape[1] ** -0.5)

  def step(masked, j, carry):
    keys = rows_where(masked and call.keys % tile.k > 0, call.keys, k_ref, v_ref)
    visible = masked and functools.partial(_visible, call, row, j * tile.k, tile)
    return fold(call, q, scale, *keys, pl.ds(j * tile.k, tile.k), visible, carry)

  zeros = jnp.zeros((tile.q,), jnp.float32)
  carry = zeros - jnp.inf, zeros, zeros, jnp.zeros((tile.q, q.shape[1]), jnp.float32)
  m, L, Q, S = three_loops(call.key_blocks(row + call.offset, tile, pl.cdiv(call.keys, tile.k)), step, carry)

  lse, null = m + jnp.log2(L), null * LOG2_E
  w_key, w_null = 1 / (1 + jnp.exp2(null - lse)), 1 / (1 + jnp.exp2(lse - null))
  attended = call.fma(S, (w_key / L)[:, None], w_null[:, None] * v_null_ref[...][None, :])
  norm = jnp.sqrt(jnp.sum(attended * attended, axis=1))
  direction_ref[:, :] = (attended * (1 / jnp.maximum(norm, formula.NORM_FLOOR))[:, None]).astype(q.dtype)
  crowding = Q / (L * L)
  magnitude_ref[:,] = formula.magnitude(1 / crowding, w_key, heads_ref[MAG_BETA] * _share(call, counts_ref))
  if ragged:  # scalars of queries that are not there are read, too
    there = jnp.arange(tile.q) < left
    lse, crowding, norm = (jnp.where(there, x, 1) for x in (lse, crowding, norm))
  lse_ref[...], crowding_ref[...], norm_ref[...] = lse, crowding, norm


def _temperature(call: Call, heads_ref: Any, counts_ref: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Of a block of queries: the temperature, the same in every kernel to the last bit; the one in the null's logit; that logit
  over it, but for what it grows by past count_length; and the logit."""
  log, root = counts_ref[LOG, :], counts_ref[ROOT, :]
  ones = jnp.ones_like(log)
  temp, null = call.fma(log, heads_ref[LEN_GAIN] * ones, ones), heads_ref[NULL_BASE] + heads_ref[NULL_SLOPE] * root
  if call.count_length is None:
    return temp, temp, null, temp * null
  held = call.fma(counts_ref[HELD, :], heads_ref[LEN_GAIN] * ones, ones)
  return temp, held, null, held * null + (log - counts_ref[HELD, :])


def _share(call: Call, counts_ref: Any) -> jax.Array | float:
  return 1.0 if call.count_length is None else counts_ref[SHARE, :]


def _visible(call: Call, row: jax.Array, key: jax.Array, tile: Tile) -> jax.Array:
  return call.visible(row + jnp.arange(tile.q)[:, None] + call.offset - (key + jnp.arange(tile.k)[None, :]))


def _specs(tile: Tile, q: jax.Array, k: jax.Array, length: int) -> tuple[Any, ...]:
  """Those of `by_queries` but of (H, T), with blocks of (B, T, H), what is known of a head and of a count, and v_null."""
  query, key, _, rows, grid = by_queries(tile, q, k, length)
  tokens = grid.spec((None, tile.q, None), lambda b, h, i: (b, i, h))
  head = grid.spec((None, 4), lambda b, h, i: (h, 0))
  counts = grid.spec((4, tile.q), lambda b, h, i: (0, i))
  return query, key, rows, tokens, head, counts, grid.spec((None, q.shape[3]), lambda b, h, i: (h, 0)), grid


def _counts(call: Call) -> jax.Array:
  """(4, T) features of how many keys each query sees, as `formula.Counts`, queries in whole blocks."""
  visible = jnp.minimum(call.offset + 1 + jnp.arange(call.rows), call.window)
  return jnp.stack(formula.count_features(visible.astype(jnp.float32), call.null_length, call.count_length))


def _forward(q, k, v, heads, v_null, call: Call):
  """Direction (B, T, H, D), magnitude (B, T, H); lse in base 2, crowding, norm of the attended vector, a row (B, H)."""
  (B, T, H, _), tile = q.shape, call.tiles.forward
  query, key, rows, tokens, head, counts, vector, grid = _specs(tile, q, k, call.rows)
  scalars = jax.ShapeDtypeStruct((B, H, call.rows), jnp.float32)
  return pl.pallas_call(
    functools.partial(_forward_kernel, call=call), name="polar_attention",
    out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, T, H), jnp.float32), *[scalars] * 3],
    in_specs=[query, key, key, head, counts, vector], out_specs=[query, tokens, rows, rows, rows], grid=grid.shape,
    interpret=call.interpret, compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(q, k, v, heads, _counts(call), v_null)


# Backward: one kernel for dq, one for dk and dv, each recomputing p.


def _dq_kernel(q_ref, k_ref, v_ref, g_ref, direction_ref, g_magnitude_ref, heads_ref, counts_ref, v_null_ref, lse_ref,
               crowding_ref, norm_ref, dq_ref, go_ref, scale_ref, twice_ref, delta_ref, d_v_null_ref, d_heads_ref, *, call: Call):
  tile, row = call.tiles.dq, Grid.first_row(call.tiles.dq)
  ragged = call.rows > call.queries
  q_ref, g_ref, direction_ref, g_magnitude_ref, dq_ref, go_ref = rows_where(
    ragged, call.queries - row, q_ref, g_ref, direction_ref, g_magnitude_ref, dq_ref, go_ref)
  q, lse, crowding = q_ref[:, :], lse_ref[...], crowding_ref[...]
  temp, held, null_over_held, null = _temperature(call, heads_ref, counts_ref)
  log_odds, share = lse / LOG2_E - null, _share(call, counts_ref)

  def magnitude(crowding, log_odds, beta):
    return formula.magnitude(1 / crowding, jax.nn.sigmoid(log_odds), beta * share)

  _, pull = jax.vjp(magnitude, crowding, log_odds, heads_ref[MAG_BETA] * jnp.ones_like(lse))
  g_crowding, g_lse, d_beta = pull(g_magnitude_ref[:,])
  through = formula.through_null_of_rows((g_ref[:, :], g_lse, g_crowding), direction_ref[:, :], log_odds, crowding,
                                         norm_ref[...], v_null_ref[...][None, :])
  d_v_null_ref[...] = jnp.sum(through.d_v_null, axis=0)
  go = through.go.astype(q.dtype)
  go_ref[:, :] = go
  natural = temp * q.shape[1] ** -0.5
  scale, twice, delta = temp * (LOG2_E * q.shape[1] ** -0.5), through.twice * natural, through.delta * natural
  scale_ref[...], twice_ref[...], delta_ref[...] = scale, twice, delta

  def step(masked, j, carry):
    keys = rows_where(masked and call.keys % tile.k > 0, call.keys, k_ref, v_ref)
    visible = masked and functools.partial(_visible, call, row, j * tile.k, tile)
    return add_dq(call, q, go, scale, lse, twice, delta, *keys, pl.ds(j * tile.k, tile.k), visible, carry)

  zeros = jnp.zeros(q.shape, jnp.float32), Total.zero(tile.q, q.dtype)
  dq, total = three_loops(call.key_blocks(row + call.offset, tile, pl.cdiv(call.keys, tile.k)), step, zeros)
  dq_ref[:, :] = dq.astype(q.dtype)
  d_temp = formula.temperature_gradient(jnp.sum(dq * q.astype(jnp.float32), axis=1), Total.of(total) / natural, through.d_lse,
                                        lse / LOG2_E, crowding, temp)
  d_null, d_held = -through.d_lse * held, -through.d_lse * null_over_held  # the log-sum-exp counts from the null's logit
  d_gain = (d_temp + d_held) * counts_ref[LOG, :] if call.count_length is None else (
    d_temp * counts_ref[LOG, :] + d_held * counts_ref[HELD, :])
  gradients = {NULL_BASE: d_null, NULL_SLOPE: d_null * counts_ref[ROOT, :], LEN_GAIN: d_gain, MAG_BETA: d_beta}
  for place, gradient in gradients.items():
    d_heads_ref[place] = jnp.sum(gradient)


def _dkv_kernel(q_ref, k_ref, v_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref, dk_ref, dv_ref, *,
                call: Call):
  tile = call.tiles.dkv
  key = pl.program_id(1) * tile.k
  ragged = call.keys % tile.k > 0
  k_ref, v_ref, dk_ref, dv_ref = rows_where(ragged, call.keys - key, k_ref, v_ref, dk_ref, dv_ref)
  k, v = k_ref[:, :], v_ref[:, :]
  bounds = call.query_blocks(key - call.offset, tile, pl.cdiv(call.queries, tile.q))
  if call.queries % tile.q:  # queries are missing from the last block
    first, full, full_end, end = bounds
    bounds = first, full, jnp.clip(call.queries // tile.q, full, full_end), end

  def head(h, carry):
    def step(masked, i, carry):
      def visible():
        query = i * tile.q + jnp.arange(tile.q)[None, :]
        return call.visible(query + call.offset - (key + jnp.arange(tile.k)[:, None]))

      queries = rows_where(masked and call.queries % tile.q > 0, call.queries, q_ref, go_ref)
      return add_dkv(call, k, v, *queries, scale_ref, lse_ref, twice_ref, delta_ref, h, pl.ds(i * tile.q, tile.q),
                     masked and visible, carry)
    return three_loops(bounds, step, carry)

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
  dk_ref[:, :], dv_ref[:, :] = dk.astype(k.dtype), dv.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, heads, v_null, call: Call):
  """Direction (B, T, H, D) and magnitude (B, T, H), from the four numbers of each head (H, 4) and v_null (H, D)."""
  return _attend_forward(q, k, v, heads, v_null, call)[0]


def _attend_forward(q, k, v, heads, v_null, call: Call):
  direction, magnitude, *rows = checkpoint_name(_forward(q, k, v, heads, v_null, call), "polar_attention")
  return (direction, magnitude), (q, k, v, heads, v_null, direction, *rows)


def _attend_backward(call: Call, residuals, cotangents):
  q, k, v, heads, v_null, direction, lse, crowding, norm = residuals
  g_direction, g_magnitude = cotangents
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  scalars = jax.ShapeDtypeStruct((B, H, call.rows), jnp.float32)

  tile = call.tiles.dq
  query, key, rows, tokens, head, counts, vector, grid = _specs(tile, q, k, call.rows)
  sums = [grid.spec((None, None, None, n), lambda b, h, i: (b, i, h, 0)) for n in (D, 4)]
  dq, go, scale, twice, delta, d_v_null, d_heads = pl.pallas_call(
    functools.partial(_dq_kernel, call=call), name="polar_attention_dq",
    out_shape=[*[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 2, *[scalars] * 3,
               *(jax.ShapeDtypeStruct((B, grid.blocks, H, n), jnp.float32) for n in (D, 4))],
    in_specs=[query, key, key, query, query, tokens, head, counts, vector, rows, rows, rows],
    out_specs=[query, query, rows, rows, rows, *sums], grid=grid.shape, interpret=call.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(q, k, v, g_direction, direction, g_magnitude, heads, _counts(call), v_null, lse, crowding, norm)

  tile = call.tiles.dkv
  grid = Grid(B, K, pl.cdiv(S, tile.k))
  query = grid.spec((None, pl.cdiv(T, tile.q) * tile.q, H // K, D), lambda b, h, j: (b, 0, h, 0))
  key = grid.spec((None, tile.k, None, D), lambda b, h, j: (b, j, h, 0))
  rows = grid.spec((None, H // K, call.rows), lambda b, h, j: (b, h, 0))
  dk, dv = pl.pallas_call(
    functools.partial(_dkv_kernel, call=call), name="polar_attention_dkv",
    out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    in_specs=[query, key, key, query, rows, rows, rows, rows],
    out_specs=[key, key], grid=grid.shape, interpret=call.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
  )(q, k, v, go, scale, lse, twice, delta)
  return dq, dk, dv, jnp.sum(d_heads, axis=(0, 1)), jnp.sum(d_v_null, axis=(0, 1))


_attend.defvjp(_attend_forward, _attend_backward)

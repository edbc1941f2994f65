"""Polar attention as TPU kernels: Pallas through Mosaic, forward and backward, O(T) residuals.

The notation and the residuals are those of `atma_jax.ops.polar_attention.pallas_gpu`: base-2 log-sum-exp over real keys,
crowding ``sum p^2``, and one number delta a query. What differs is how the work is laid out:

* A program owns the query heads of one key/value head for a block of queries, stacked as ``rows = G * block_q`` of one matrix
  product: keys and values are read once a group. The last grid axis walks the other operand's blocks, only those that the
  causal order and the window leave; the pipeline brings the next one while the current one is used.
* Scores are kept transposed, (keys, rows): what there is one of a query lies along lanes, so that sums over keys run over
  sublanes and nothing has to be turned before the end of a block.
* Arrays are (B, K, G, T, D): a program's rows lie together, and XLA lets their makers write that order. (Compiled for v5e,
  forward and backward of 8 x 2048 with H=8, K=2, D=128 then move 0.37 GB; taking slices of (B, T, H * D) they moved 1.79.)

Keys after a query are masked by causality, so sequences are padded at their end to whole blocks and no other mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from atma_jax.ops import dispatch
from atma_jax.ops import tiles as table
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.tiles import Tile, Tiles

HEAD_SIZES = (64, 128)
LANES = 128
LOG2_E = math.log2(math.e)
MASKED = -(2.0**100)  # a score; finite, so that a block without a visible key makes no NaN, and exact under any scale


def supports(q: jax.Array, k: jax.Array, v: jax.Array, **parameters) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  del parameters
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"takes q, k and v all in bfloat16 or all in float32, not {q.dtype}, {k.dtype}, {v.dtype}"
  if q.shape[-1] not in HEAD_SIZES:
    return f"takes head sizes {' and '.join(map(str, HEAD_SIZES))}, not {q.shape[-1]}"
  if dispatch.platform() != "tpu":
    return f"needs a TPU, and this runs on {dispatch.platform()}"
  if dispatch.undivided():
    return "takes what lies on one device: on a mesh of several it must be called inside shard_map"
  return None


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    tiles: Tiles | None = None, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.polar_attention`; `tiles` overrides the table, `interpret` runs the kernels without a TPU."""
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  tiles = tiles or table.polar("tpu", q.dtype.itemsize, D, T)
  temp, null = formula.positional_logits(null_base, null_slope, len_gain, queries=T, keys=S, window=window)
  call = _Call(B, T, S, K, H // K, D, S if window is None else min(window, S), tiles, interpret)
  direction, lse, crowding = _attend(q, k, v, temp.astype(jnp.float32), null.astype(jnp.float32),
                                     v_null.astype(jnp.float32), call)
  return direction, formula.magnitude(1 / crowding, jax.nn.sigmoid(lse - null), mag_beta)


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is static about a call, and the plan of its grids."""

  batch: int
  queries: int
  keys: int
  groups: int  # K
  members: int  # G, query heads of a group
  dim: int
  window: int  # at most `keys`, which then means none
  tiles: Tiles
  interpret: bool

  @property
  def offset(self) -> int:
    """Position of the first query."""
    return self.keys - self.queries

  def blocks(self, tile: Tile) -> tuple[int, int]:
    """Queries and keys of a block; multiples of the lanes, no larger than the padded sequences."""
    block_q = min(max(tile.q // self.members // LANES, 1) * LANES, _up(self.queries, LANES))
    return block_q, min(tile.k, _up(self.keys, LANES))

  def counts(self, tile: Tile) -> tuple[int, int]:
    """Blocks of queries and of keys."""
    block_q, block_k = self.blocks(tile)
    return -(-self.queries // block_q), -(-self.keys // block_k)

  def key_blocks(self, i: Any, tile: Tile) -> tuple[Any, Any]:
    """First and one past the last block of keys that query block i sees; works on numbers and on traced values."""
    block_q, block_k = self.blocks(tile)
    position = self.offset + i * block_q
    end = _least((position + block_q + block_k - 1) // block_k, self.counts(tile)[1])
    return _most(position - self.window + 1, 0) // block_k, end

  def query_blocks(self, j: Any, tile: Tile) -> tuple[Any, Any]:
    """First and one past the last block of queries that see key block j."""
    block_q, block_k = self.blocks(tile)
    count = self.counts(tile)[0]
    row = j * block_k - self.offset  # of the query at the first key's position
    end = _least(_most(row + block_k + self.window - 2, -1) // block_q + 1, count)
    return _least(_most(row, 0) // block_q, count - 1), end

  def steps(self, ranges: Callable[[Any, Tile], tuple[Any, Any]], count: int, tile: Tile) -> int:
    """The longest of all ranges, which is the size of the grid's last axis."""
    return max(end - first for first, end in (ranges(index, tile) for index in range(count)))

  def mask(self, i: Any, j: Any, tile: Tile) -> jax.Array:
    """(keys, rows) whether a row's query sees a key."""
    block_q, block_k = self.blocks(tile)
    shape = (block_k, self.members * block_q)
    query = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 1), block_q) + (self.offset + i * block_q)
    distance = query - (lax.broadcasted_iota(jnp.int32, shape, 0) + j * block_k)
    visible = distance >= 0
    return visible & (distance < self.window) if self.window < self.keys else visible

  def whole(self, i: Any, j: Any, tile: Tile) -> jax.Array:
    """Whether every query of block i sees every key of block j."""
    block_q, block_k = self.blocks(tile)
    position, key = self.offset + i * block_q, j * block_k
    return (key + block_k - 1 <= position) & (position + block_q - 1 - key < self.window)

  def array(self, x: jax.Array, block: int) -> jax.Array:
    """x (B, T, heads, D) as a kernel takes it: (B, K, heads / K, T padded to whole blocks, D)."""
    B, T, N, D = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, 0))) if T % block else x
    return jnp.swapaxes(x, 1, 2).reshape(B, self.groups, N // self.groups, -1, D)

  def spec(self, heads: int, block: int, index: Callable[..., Any]) -> pl.BlockSpec:
    """Blocks (heads / K, block, D) of such an array; `index` maps the grid's last two indices to a block."""
    return pl.BlockSpec((None, None, heads // self.groups, block, self.dim), lambda b, h, i, s: (b, h, 0, index(i, s), 0))

  def shape(self, heads: int, length: int) -> tuple[int, ...]:
    """Shape of such an array."""
    return self.batch, self.groups, heads // self.groups, length, self.dim

  def unarray(self, x: jax.Array, heads: int, length: int) -> jax.Array:
    """The inverse of `array`: (B, length, heads, D)."""
    return jnp.swapaxes(x.reshape(self.batch, heads, -1, self.dim)[:, :, :length], 1, 2)

  def rows(self, x: jax.Array, block: int) -> jax.Array:
    """(..., T, H) as (..., K, G, T), padded to whole blocks: a number a query along lanes."""
    x = jnp.swapaxes(x, -1, -2)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    return x.reshape(*x.shape[:-2], self.groups, self.members, -1)

  def unrows(self, x: jax.Array) -> jax.Array:
    """(B, K, G, T padded) as (B, T, H)."""
    return jnp.swapaxes(x.reshape(self.batch, self.groups * self.members, -1)[..., : self.queries], 1, 2)

  def row_spec(self, block: int, index: Callable[..., Any], batched: bool) -> pl.BlockSpec:
    """Blocks (G, block) of such an array."""
    if batched:
      return pl.BlockSpec((None, None, self.members, block), lambda b, h, i, s: (b, h, 0, index(i, s)))
    return pl.BlockSpec((None, self.members, block), lambda b, h, i, s: (h, 0, index(i, s)))

  def run(self, name: str, kernel: Callable[..., None], grid: tuple[int, ...], inputs: list[tuple[jax.Array, pl.BlockSpec]],
          outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]], scratch: list[Any], products: int) -> list[jax.Array]:
    """One `pallas_call`; `products` matrix products a pair of a query head and a key."""
    pairs = self.window * (self.keys - self.window) + self.window * (self.window + 1) // 2
    pairs = min(pairs, self.queries * self.keys) * self.batch * self.groups * self.members
    arrays = [array for array, _ in inputs] + [shape for shape, _ in outputs]
    cost = pl.CostEstimate(flops=2 * products * self.dim * pairs, transcendentals=pairs,
                           bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays))
    return pl.pallas_call(
      kernel, name=name, grid=grid, in_specs=[spec for _, spec in inputs], out_specs=[spec for _, spec in outputs],
      out_shape=[shape for shape, _ in outputs], scratch_shapes=scratch, interpret=self.interpret, cost_estimate=cost,
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                                           vmem_limit_bytes=table.vmem_bytes(table.generation())),
    )(*(array for array, _ in inputs))


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _least(a: Any, b: int) -> Any:
  return min(a, b) if isinstance(a, int) else jnp.minimum(a, b)


def _most(a: Any, b: int) -> Any:
  return max(a, b) if isinstance(a, int) else jnp.maximum(a, b)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Matrix product accumulated in float32; of float32 operands it is exact to float32."""
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32,
                         precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT)


def _stack(ref: Any) -> jax.Array:
  """(G, block, D) as (G * block, D)."""
  return ref[...].reshape(-1, ref.shape[2])


def _line(ref: Any) -> jax.Array:
  """(G, block) as (1, G * block)."""
  return jnp.concatenate([ref[g : g + 1, :] for g in range(ref.shape[0])], axis=1) if ref.shape[0] > 1 else ref[...]


def _when_visible(call: _Call, tile: Tile, active: Any, i: Any, j: Any, body: Callable[[bool], None]) -> None:
  """Runs ``body(masked)`` on a pair of blocks that meet."""
  whole = call.whole(i, j, tile)
  pl.when(active & whole)(lambda: body(False))
  pl.when(active & jnp.logical_not(whole))(lambda: body(True))


# Forward.


def _forward_kernel(q_ref, k_ref, v_ref, scale_ref, null_ref, v_null_ref, direction_ref, lse_ref, crowding_ref, norm_ref,
                    rows_ref, scales_ref, m_ref, L_ref, Q_ref, S_ref, *, call: _Call, steps: int):
  tile, i, step = call.tiles.forward, pl.program_id(2), pl.program_id(3)
  first, end = call.key_blocks(i, tile)

  @pl.when(step == 0)
  def _():
    rows_ref[...], scales_ref[...] = _stack(q_ref), _line(scale_ref)
    m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, jnp.float32)
    for ref in (L_ref, Q_ref, S_ref):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  def body(masked):
    v, m, scale = v_ref[0], m_ref[...], scales_ref[...]
    scores = _dot(k_ref[0], rows_ref[...], (1, 1))
    if masked:
      scores = jnp.where(call.mask(i, first + step, tile), scores, MASKED)
    m_next = jnp.maximum(m, jnp.max(scores, axis=0, keepdims=True) * scale)  # the scale is positive
    p, shrink = jnp.exp2(scores * scale - m_next), jnp.exp2(m - m_next)
    m_ref[...] = m_next
    L_ref[...] = L_ref[...] * shrink + jnp.sum(p, axis=0, keepdims=True)
    Q_ref[...] = Q_ref[...] * (shrink * shrink) + jnp.sum(p * p, axis=0, keepdims=True)
    S_ref[...] = S_ref[...] * shrink + _dot(v, p.astype(v.dtype), (0, 0))

  _when_visible(call, tile, first + step < end, i, first + step, body)

  @pl.when(step == steps - 1)
  def _():
    L, null = L_ref[...], _line(null_ref)
    lse = m_ref[...] + jnp.log2(L)
    w_key, w_null = 1 / (1 + jnp.exp2(null - lse)), 1 / (1 + jnp.exp2(lse - null))
    share, crowding = w_key / L, Q_ref[...] / (L * L)
    block = lse_ref.shape[1]
    for g in range(call.members):
      at = slice(g * block, (g + 1) * block)
      attended = share[:, at] * S_ref[:, at] + w_null[:, at] * v_null_ref[:, g : g + 1]
      norm = jnp.sqrt(jnp.sum(attended * attended, axis=0, keepdims=True))
      direction = (attended / jnp.maximum(norm, formula.NORM_FLOOR)).T
      direction_ref[g] = direction.astype(direction_ref.dtype)
      lse_ref[g : g + 1, :], crowding_ref[g : g + 1, :], norm_ref[g : g + 1, :] = lse[:, at], crowding[:, at], norm


def _forward(q, k, v, temp, null, v_null, call: _Call):
  """Direction (B, T, H, D); lse in base 2, crowding, norm of the attended vector (B, T, H)."""
  tile, K, G, D = call.tiles.forward, call.groups, call.members, call.dim
  (block_q, block_k), (count_q, _), H = call.blocks(tile), call.counts(tile), K * G
  steps = call.steps(call.key_blocks, count_q, tile)

  def own(i, s):
    return i

  def other(i, s):
    first, end = call.key_blocks(i, tile)
    return jnp.minimum(first + s, end - 1)

  rows, length = G * block_q, count_q * block_q
  line = pltpu.VMEM((1, rows), jnp.float32)
  scalars = jax.ShapeDtypeStruct((call.batch, K, G, length), jnp.float32)
  direction, *statistics = call.run(
    "polar_attention", functools.partial(_forward_kernel, call=call, steps=steps), (call.batch, K, count_q, steps),
    [(call.array(q, block_q), call.spec(H, block_q, own)), (call.array(k, block_k), call.spec(K, block_k, other)),
     (call.array(v, block_k), call.spec(K, block_k, other)),
     (call.rows(temp * (LOG2_E * D**-0.5), block_q), call.row_spec(block_q, own, False)),
     (call.rows(null * LOG2_E, block_q), call.row_spec(block_q, own, False)),
     (jnp.swapaxes(v_null.reshape(K, G, D), 1, 2), pl.BlockSpec((None, D, G), lambda b, h, i, s: (h, 0, 0)))],
    [(jax.ShapeDtypeStruct(call.shape(H, length), q.dtype), call.spec(H, block_q, own)),
     *[(scalars, call.row_spec(block_q, own, True))] * 3],
    [pltpu.VMEM((rows, D), q.dtype), line, line, line, line, pltpu.VMEM((D, rows), jnp.float32)], products=2)
  return call.unarray(direction, H, call.queries), *map(call.unrows, statistics)


# Backward: one kernel for dq, one for dk and dv, each recomputing p.


def _dq_kernel(q_ref, k_ref, v_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref, dq_ref, q_dq_ref,
               total_ref, q_rows_ref, go_rows_ref, sum_ref, totals_ref, *, call: _Call, steps: int):
  tile, i, step = call.tiles.dq, pl.program_id(2), pl.program_id(3)
  first, end = call.key_blocks(i, tile)

  @pl.when(step == 0)
  def _():
    q_rows_ref[...], go_rows_ref[...] = _stack(q_ref), _stack(go_ref)
    sum_ref[...], totals_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32), jnp.zeros(totals_ref.shape, jnp.float32)

  def body(masked):
    k, scale = k_ref[0], _line(scale_ref)
    p = jnp.exp2(_dot(k, q_rows_ref[...], (1, 1)) * scale - _line(lse_ref))
    if masked:
      p = jnp.where(call.mask(i, first + step, tile), p, 0)
    dp = _dot(v_ref[0], go_rows_ref[...], (1, 1))
    ds = (p * (dp * (scale / LOG2_E) + (p * _line(twice_ref) - _line(delta_ref)))).astype(k.dtype)
    totals_ref[...] += jnp.sum(ds.astype(jnp.float32), axis=0, keepdims=True)
    sum_ref[...] += _dot(k, ds, (0, 0))

  _when_visible(call, tile, first + step < end, i, first + step, body)

  @pl.when(step == steps - 1)
  def _():
    block = q_dq_ref.shape[1]
    for g in range(call.members):
      at = slice(g * block, (g + 1) * block)
      dq = sum_ref[:, at]
      q = q_ref[g].astype(jnp.float32).T
      q_dq_ref[g : g + 1, :], total_ref[g : g + 1, :] = jnp.sum(dq * q, axis=0, keepdims=True), totals_ref[:, at]
      dq_ref[g] = dq.T.astype(dq_ref.dtype)


def _dkv_kernel(q_ref, k_ref, v_ref, go_ref, scale_ref, lse_ref, twice_ref, delta_ref, dk_ref, dv_ref, dk_sum_ref,
                dv_sum_ref, *, call: _Call, steps: int):
  tile, j, step = call.tiles.dkv, pl.program_id(2), pl.program_id(3)
  first, end = call.query_blocks(j, tile)

  @pl.when(step == 0)
  def _():
    for ref in (dk_sum_ref, dv_sum_ref):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  def body(masked):
    q, go, scale = _stack(q_ref), _stack(go_ref), _line(scale_ref)
    p = jnp.exp2(_dot(k_ref[0], q, (1, 1)) * scale - _line(lse_ref))
    if masked:
      p = jnp.where(call.mask(first + step, j, tile), p, 0)
    dv_sum_ref[...] += _dot(p.astype(go.dtype), go, (1, 0))
    dp = _dot(v_ref[0], go, (1, 1))
    ds = p * (dp * (scale / LOG2_E) + (p * _line(twice_ref) - _line(delta_ref)))
    dk_sum_ref[...] += _dot(ds.astype(q.dtype), q, (1, 0))

  _when_visible(call, tile, first + step < end, first + step, j, body)

  @pl.when(step == steps - 1)
  def _():
    dk_ref[0], dv_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype), dv_sum_ref[...].astype(dv_ref.dtype)


def _backward(q, k, v, go, temp, lse, twice, delta, call: _Call):
  """Gradients of q, k, v; ``q.dq`` and the sum of a query's dlogit (B, T, H); from `go` (B, T, H, D) and (B, T, H) scalars."""
  K, G, D = call.groups, call.members, call.dim
  H, natural = K * G, temp * D**-0.5

  def own(i, s):
    return i

  def inputs(tile, queries, keys):
    block_q, block_k = call.blocks(tile)
    key, row = call.spec(K, block_k, keys), call.row_spec(block_q, queries, True)
    query = call.spec(H, block_q, queries)
    return [
      (call.array(q, block_q), query), (call.array(k, block_k), key), (call.array(v, block_k), key),
      (call.array(go, block_q), query), (call.rows(natural * LOG2_E, block_q), call.row_spec(block_q, queries, False)),
      *((call.rows(x, block_q), row) for x in (lse, twice * natural, delta * natural)),
    ]

  tile = call.tiles.dq
  (block_q, _), (count_q, _) = call.blocks(tile), call.counts(tile)
  steps, rows = call.steps(call.key_blocks, count_q, tile), G * block_q

  def key_block(i, s):
    first, end = call.key_blocks(i, tile)
    return jnp.minimum(first + s, end - 1)

  scalars = jax.ShapeDtypeStruct((call.batch, K, G, count_q * block_q), jnp.float32)
  dq, *sums = call.run(
    "polar_attention_dq", functools.partial(_dq_kernel, call=call, steps=steps), (call.batch, K, count_q, steps),
    inputs(tile, own, key_block),
    [(jax.ShapeDtypeStruct(call.shape(H, count_q * block_q), q.dtype), call.spec(H, block_q, own)),
     *[(scalars, call.row_spec(block_q, own, True))] * 2],
    [pltpu.VMEM((rows, D), q.dtype), pltpu.VMEM((rows, D), q.dtype), pltpu.VMEM((D, rows), jnp.float32),
     pltpu.VMEM((1, rows), jnp.float32)], products=3)

  tile_kv = call.tiles.dkv
  (_, block_k), (_, count_k) = call.blocks(tile_kv), call.counts(tile_kv)
  steps = call.steps(call.query_blocks, count_k, tile_kv)

  def query_block(j, s):
    first, end = call.query_blocks(j, tile_kv)
    return jnp.clip(first + s, 0, jnp.maximum(end - 1, first))

  shape, spec = call.shape(K, count_k * block_k), call.spec(K, block_k, own)
  dk, dv = call.run(
    "polar_attention_dkv", functools.partial(_dkv_kernel, call=call, steps=steps), (call.batch, K, count_k, steps),
    inputs(tile_kv, query_block, own),
    [(jax.ShapeDtypeStruct(shape, k.dtype), spec), (jax.ShapeDtypeStruct(shape, v.dtype), spec)],
    [pltpu.VMEM((block_k, D), jnp.float32)] * 2, products=4)
  dk, dv = (call.unarray(x, K, call.keys) for x in (dk, dv))
  q_dq, total = map(call.unrows, sums)
  return call.unarray(dq, H, call.queries), dk, dv, q_dq, total / natural


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, temp, null, v_null, call: _Call):
  """Direction (B, T, H, D), and natural log-sum-exp and crowding (B, T, H), from temp and null (T, H)."""
  return _attend_forward(q, k, v, temp, null, v_null, call)[0]


def _attend_forward(q, k, v, temp, null, v_null, call: _Call):
  direction, lse, crowding, norm = checkpoint_name(_forward(q, k, v, temp, null, v_null, call), "polar_attention")
  return (direction, lse / LOG2_E, crowding), (q, k, v, temp, null, v_null, direction, lse, crowding, norm)


def _attend_backward(call: _Call, residuals, cotangents):
  q, k, v, temp, null, v_null, direction, lse, crowding, norm = residuals
  through = formula.through_null(cotangents, direction, lse / LOG2_E - null, crowding, norm, v_null)
  dq, dk, dv, q_dq, total = _backward(q, k, v, through.go.astype(q.dtype), temp, lse, through.twice, through.delta, call)
  dtemp = formula.temperature_gradient(q_dq, total, through.d_lse, lse / LOG2_E, crowding, temp)
  return dq, dk, dv, jnp.sum(dtemp, axis=0), through.d_null, through.d_v_null


_attend.defvjp(_attend_forward, _attend_backward)

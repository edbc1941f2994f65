"""Polar attention as TPU kernels: Pallas through Mosaic, forward and backward, O(T) residuals.

Notation and residuals are those of `atma_jax.ops.polar_attention.gpu.pallas_gpu`: the base-2 log-sum-exp over real keys,
``sum_p2 = sum_j p_j^2``, and one number delta per query. What differs is how the work is laid out:

* A program owns the query heads of one key/value head for a block of queries, stacked as the ``rows = G * block_q`` of one
  matrix product: keys and values are read once per group. The last grid axis walks the other operand's blocks, only those that
  the causal order and the window leave; the pipeline fetches the next one while the current one is used.
* Scores are kept transposed, (keys, rows): numbers of a query lie along lanes, so that sums over keys run over sublanes and
  nothing has to be transposed before the end of a block.
* Arrays are (B, K, G, T, D): a program's rows are contiguous, and XLA lets the producers write that order. (Compiled for v5e,
  forward and backward of 8 x 2048 with H=8, K=2, D=128 then move 0.37 GB; with slices of (B, T, H * D) they moved 1.79.)

Keys after a query are masked by causality, so sequences are padded at their end to whole blocks and no other mask is needed.
Where rows pack documents, a pair of blocks that no document spans is skipped, though the pipeline still fetches its keys.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch, pallas, visibility
from atma_jax.ops.core.pallas import LOG2_E, MASKED, dot
from atma_jax.ops.core.tiles import Tile, Tiles, polar_tiles
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams
from atma_jax.ops.polar_attention.tpu.tpu_grid import Call, Index, Ref, Starts, line, stack, steps_of

Mask = jax.Array | None  # (keys, rows); None where every query sees every key


def supports(q: jax.Array, k: jax.Array, v: jax.Array, *_: Any, **__: Any) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  return pallas.refusal("tpu", q, k, v)


def attend(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], params: PolarParams,
           spec: AttentionSpec, *, starts: Int[Array, "B T"] | None = None, tiles: Tiles | None = None,
           interpret: bool = False) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """See `atma_jax.ops.polar_attention.api`; `tiles` overrides the table, `interpret` runs the kernels without a TPU."""
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  tiles = tiles or polar_tiles("tpu", q.dtype.itemsize, D, T)
  positions = formula.last_positions(T, S)
  temp, null, curve = formula.of_positions(params, positions if starts is None else positions - starts, spec)
  window = None if spec.window is None or spec.window >= S else spec.window
  call = Call(B, T, S, K, H // K, D, window, tiles, interpret)
  starts = None if starts is None else starts.astype(jnp.float32)  # of which a kernel can take the least and the largest
  outputs: Any = _attend(q, k, v, temp.astype(jnp.float32), null.astype(jnp.float32), params.v_null.astype(jnp.float32), starts,
                         call)
  direction, lse, sum_p2 = outputs
  return direction, formula.magnitude(1 / sum_p2, jax.nn.sigmoid(lse - null), curve)


def _starts(call: Call) -> Starts:
  """The queries are the last of the keys' positions."""
  return Starts((call.keys - call.queries,), (0,))


def _pairs(call: Call) -> int:
  return visibility.visible_pairs(call.queries, call.keys, call.window)


def _longest(ranges: Callable[..., list[tuple[int, int]]], count: int, tile: Tile, starts: Starts) -> int:
  """How many blocks the longest walk from any of `count` blocks has: the size of the grid's last axis."""
  return max(steps_of(ranges(index, tile, starts)) for index in range(count))


def when_visible(call: Call, tile: Tile, starts: Starts, active: jax.Array, i: Index, j: Index,
                 body: Callable[[Mask], None], documents: Ref | None = None) -> None:
  """Runs ``body(mask)`` on a pair of blocks if it is `active`.

  `documents` (1, block_q), if given, are the positions at which the documents of the queries start, float32.
  """
  whole = call.whole(i, j, tile, starts)
  first = None
  if documents is not None:
    first, key = documents[...], call.key_position(j, tile, starts)
    whole &= jnp.max(first).astype(jnp.int32) <= key
    active &= jnp.min(first).astype(jnp.int32) < key + call.blocks(tile)[1]

  def mask() -> jax.Array:
    visible = call.mask(i, j, tile, starts)
    return visible if first is None else visible & call.in_documents(first, j, tile, starts)

  pl.when(active & whole)(lambda: body(None))
  pl.when(active & jnp.logical_not(whole))(lambda: body(mask()))


# What a pair of blocks adds to the sums of each kernel. Sums are named for what they hold; all are transposed.


def fold(mask: Mask, k: jax.Array, v: jax.Array, rows: jax.Array, scale: jax.Array, m_ref: Ref, L_ref: Ref, Q_ref: Ref,
         S_ref: Ref) -> None:
  """Adds a block of keys to the statistics of rows of queries: m, the largest logit in base 2, L, Q (1, rows) and S (D, rows)."""
  m = m_ref[...]
  scores = dot(k, rows, (1, 1))
  if mask is not None:
    scores = jnp.where(mask, scores, MASKED)
  m_next = jnp.maximum(m, jnp.max(scores, axis=0, keepdims=True) * scale)  # the scale is positive
  p, shrink = jnp.exp2(scores * scale - m_next), jnp.exp2(m - m_next)
  m_ref[...] = m_next
  L_ref[...] = L_ref[...] * shrink + jnp.sum(p, axis=0, keepdims=True)
  Q_ref[...] = Q_ref[...] * (shrink * shrink) + jnp.sum(p * p, axis=0, keepdims=True)
  S_ref[...] = S_ref[...] * shrink + dot(v, p.astype(v.dtype), (0, 0))


def add_dq(mask: Mask, k: jax.Array, v: jax.Array, q: jax.Array, go: jax.Array, scale: jax.Array, lse: jax.Array,
           twice: jax.Array, delta: jax.Array, dq_ref: Ref, total_ref: Ref) -> None:
  """Adds a block of keys to dq (D, rows) and to each query's sum of dlogit, times its scale (1, rows)."""
  p = jnp.exp2(dot(k, q, (1, 1)) * scale - lse)
  if mask is not None:
    p = jnp.where(mask, p, 0)
  dp = dot(v, go, (1, 1))
  ds = (p * (dp * (scale / LOG2_E) + (p * twice - delta))).astype(k.dtype)
  total_ref[...] += jnp.sum(ds.astype(jnp.float32), axis=0, keepdims=True)
  dq_ref[...] += dot(k, ds, (0, 0))


def add_dkv(mask: Mask, k: jax.Array, v: jax.Array, q: jax.Array, go: jax.Array, scale: jax.Array, lse: jax.Array,
            twice: jax.Array, delta: jax.Array, dk_ref: Ref, dv_ref: Ref) -> None:
  """Adds rows of queries to dk and dv (keys, D)."""
  p = jnp.exp2(dot(k, q, (1, 1)) * scale - lse)
  if mask is not None:
    p = jnp.where(mask, p, 0)
  dv_ref[...] += dot(p.astype(go.dtype), go, (1, 0))
  dp = dot(v, go, (1, 1))
  ds = p * (dp * (scale / LOG2_E) + (p * twice - delta))
  dk_ref[...] += dot(ds.astype(q.dtype), q, (1, 0))


# Forward.


def _forward_kernel(documents: Ref | None, q_ref: Ref, k_ref: Ref, v_ref: Ref, scale_ref: Ref, null_ref: Ref, v_null_ref: Ref,
                    direction_ref: Ref, lse_ref: Ref, sum_p2_ref: Ref, norm_ref: Ref, rows_ref: Ref, scales_ref: Ref, m_ref: Ref,
                    L_ref: Ref, Q_ref: Ref, S_ref: Ref, *, call: Call, steps: int) -> None:
  tile, starts, i, step = call.tiles.forward, _starts(call), pl.program_id(2), pl.program_id(3)
  j, active = call.key_block(i, step, tile, starts)

  @pl.when(step == 0)
  def _start() -> None:
    rows_ref[...], scales_ref[...] = stack(q_ref), line(scale_ref)
    m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, jnp.float32)
    for ref in (L_ref, Q_ref, S_ref):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  def body(mask: Mask) -> None:
    fold(mask, k_ref[0], v_ref[0], rows_ref[...], scales_ref[...], m_ref, L_ref, Q_ref, S_ref)

  when_visible(call, tile, starts, active, i, j, body, documents)

  @pl.when(step == steps - 1)
  def _finish() -> None:
    L, null = L_ref[...], line(null_ref)
    lse = m_ref[...] + jnp.log2(L)
    w_key, w_null = 1 / (1 + jnp.exp2(null - lse)), 1 / (1 + jnp.exp2(lse - null))
    share, sum_p2 = w_key / L, Q_ref[...] / (L * L)
    block = lse_ref.shape[1]
    for g in range(call.members):
      at = slice(g * block, (g + 1) * block)
      attended = share[:, at] * S_ref[:, at] + w_null[:, at] * v_null_ref[:, g : g + 1]
      norm = jnp.sqrt(jnp.sum(attended * attended, axis=0, keepdims=True))
      direction = (attended / jnp.maximum(norm, formula.NORM_FLOOR)).T
      direction_ref[g] = direction.astype(direction_ref.dtype)
      lse_ref[g : g + 1, :], sum_p2_ref[g : g + 1, :], norm_ref[g : g + 1, :] = lse[:, at], sum_p2[:, at], norm


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, temp: jax.Array, null: jax.Array, v_null: jax.Array,
             documents: jax.Array | None, call: Call) -> tuple[jax.Array, ...]:
  """Direction (B, T, H, D); lse in base 2, sum_p2 and norm of the attended vector, (B, T, H) each."""
  tile, K, G, D = call.tiles.forward, call.groups, call.members, call.dim
  (block_q, block_k), (count_q, _), H = call.blocks(tile), call.counts(tile), K * G
  starts = _starts(call)
  steps = _longest(call.key_blocks, count_q, tile, starts)

  def own(i: Index, s: Index) -> Index:
    return i

  def other(i: Index, s: Index) -> Index:
    return call.key_block(i, s, tile, starts)[0]

  rows, length = G * block_q, count_q * block_q
  vector = pltpu.VMEM((1, rows), jnp.float32)
  scalars = jax.ShapeDtypeStruct((call.batch, K, G, length), jnp.float32)
  direction, *statistics = call.run(
    "polar_attention", functools.partial(_forward_kernel, call=call, steps=steps), (call.batch, K, count_q, steps),
    [call.documents(documents, block_q, own),
     (call.array(q, block_q), call.spec(H, block_q, own)), (call.array(k, block_k), call.spec(K, block_k, other)),
     (call.array(v, block_k), call.spec(K, block_k, other)),
     (call.rows(temp * (LOG2_E * D**-0.5), block_q), call.row_spec(block_q, own, temp.ndim == 3)),
     (call.rows(null * LOG2_E, block_q), call.row_spec(block_q, own, null.ndim == 3)),
     (jnp.swapaxes(v_null.reshape(K, G, D), 1, 2), pl.BlockSpec((None, D, G), lambda b, h, i, s: (h, 0, 0)))],
    [(jax.ShapeDtypeStruct(call.shape(H, length), q.dtype), call.spec(H, block_q, own)),
     *[(scalars, call.row_spec(block_q, own, True))] * 3],
    [pltpu.VMEM((rows, D), q.dtype), vector, vector, vector, vector, pltpu.VMEM((D, rows), jnp.float32)], products=2,
    pairs=_pairs(call))
  return call.unarray(direction, H, call.queries), *map(call.unrows, statistics)


# Backward: one kernel for dq, one for dk and dv, each recomputing p.


def _dq_kernel(documents: Ref | None, q_ref: Ref, k_ref: Ref, v_ref: Ref, go_ref: Ref, scale_ref: Ref, lse_ref: Ref,
               twice_ref: Ref, delta_ref: Ref, dq_ref: Ref, q_dq_ref: Ref, total_ref: Ref, q_rows_ref: Ref, go_rows_ref: Ref,
               sum_ref: Ref, totals_ref: Ref, *, call: Call, steps: int) -> None:
  tile, starts, i, step = call.tiles.dq, _starts(call), pl.program_id(2), pl.program_id(3)
  j, active = call.key_block(i, step, tile, starts)

  @pl.when(step == 0)
  def _start() -> None:
    q_rows_ref[...], go_rows_ref[...] = stack(q_ref), stack(go_ref)
    sum_ref[...], totals_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32), jnp.zeros(totals_ref.shape, jnp.float32)

  def body(mask: Mask) -> None:
    add_dq(mask, k_ref[0], v_ref[0], q_rows_ref[...], go_rows_ref[...], line(scale_ref), line(lse_ref), line(twice_ref),
           line(delta_ref), sum_ref, totals_ref)

  when_visible(call, tile, starts, active, i, j, body, documents)

  @pl.when(step == steps - 1)
  def _finish() -> None:
    block = q_dq_ref.shape[1]
    for g in range(call.members):
      at = slice(g * block, (g + 1) * block)
      dq = sum_ref[:, at]
      q = q_ref[g].astype(jnp.float32).T
      q_dq_ref[g : g + 1, :], total_ref[g : g + 1, :] = jnp.sum(dq * q, axis=0, keepdims=True), totals_ref[:, at]
      dq_ref[g] = dq.T.astype(dq_ref.dtype)


def _dkv_kernel(documents: Ref | None, q_ref: Ref, k_ref: Ref, v_ref: Ref, go_ref: Ref, scale_ref: Ref, lse_ref: Ref,
                twice_ref: Ref, delta_ref: Ref, dk_ref: Ref, dv_ref: Ref, dk_sum_ref: Ref, dv_sum_ref: Ref, *, call: Call,
                steps: int) -> None:
  tile, starts, j, step = call.tiles.dkv, _starts(call), pl.program_id(2), pl.program_id(3)
  i, active = call.query_block(j, step, tile, starts)

  @pl.when(step == 0)
  def _start() -> None:
    for ref in (dk_sum_ref, dv_sum_ref):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  def body(mask: Mask) -> None:
    add_dkv(mask, k_ref[0], v_ref[0], stack(q_ref), stack(go_ref), line(scale_ref), line(lse_ref), line(twice_ref),
            line(delta_ref), dk_sum_ref, dv_sum_ref)

  when_visible(call, tile, starts, active, i, j, body, documents)

  @pl.when(step == steps - 1)
  def _finish() -> None:
    dk_ref[0], dv_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype), dv_sum_ref[...].astype(dv_ref.dtype)


def _backward(q: jax.Array, k: jax.Array, v: jax.Array, go: jax.Array, temp: jax.Array, lse: jax.Array, twice: jax.Array,
              delta: jax.Array, documents: jax.Array | None, call: Call) -> tuple[jax.Array, ...]:
  """Gradients of q, k and v, ``q.dq`` and each query's sum of dlogit (B, T, H); go is (B, T, H, D), temp (T, H) or (B, T, H), the
  rest (B, T, H)."""
  K, G, D = call.groups, call.members, call.dim
  H, natural, starts = K * G, temp * D**-0.5, _starts(call)

  def own(i: Index, s: Index) -> Index:
    return i

  def inputs(tile: Tile, queries: Callable[..., Index], keys: Callable[..., Index]) -> list[Any]:
    block_q, block_k = call.blocks(tile)
    key, row = call.spec(K, block_k, keys), call.row_spec(block_q, queries, True)
    query = call.spec(H, block_q, queries)
    return [
      call.documents(documents, block_q, queries),
      (call.array(q, block_q), query), (call.array(k, block_k), key), (call.array(v, block_k), key),
      (call.array(go, block_q), query),
      (call.rows(natural * LOG2_E, block_q), call.row_spec(block_q, queries, natural.ndim == 3)),
      *((call.rows(x, block_q), row) for x in (lse, twice * natural, delta * natural)),
    ]

  tile = call.tiles.dq
  (block_q, _), (count_q, _) = call.blocks(tile), call.counts(tile)
  steps, rows = _longest(call.key_blocks, count_q, tile, starts), G * block_q

  def key_block(i: Index, s: Index) -> Index:
    return call.key_block(i, s, tile, starts)[0]

  scalars = jax.ShapeDtypeStruct((call.batch, K, G, count_q * block_q), jnp.float32)
  dq, *sums = call.run(
    "polar_attention_dq", functools.partial(_dq_kernel, call=call, steps=steps), (call.batch, K, count_q, steps),
    inputs(tile, own, key_block),
    [(jax.ShapeDtypeStruct(call.shape(H, count_q * block_q), q.dtype), call.spec(H, block_q, own)),
     *[(scalars, call.row_spec(block_q, own, True))] * 2],
    [pltpu.VMEM((rows, D), q.dtype), pltpu.VMEM((rows, D), q.dtype), pltpu.VMEM((D, rows), jnp.float32),
     pltpu.VMEM((1, rows), jnp.float32)], products=3, pairs=_pairs(call))

  tile_kv = call.tiles.dkv
  (_, block_k), (_, count_k) = call.blocks(tile_kv), call.counts(tile_kv)
  steps = _longest(call.query_blocks, count_k, tile_kv, starts)

  def query_block(j: Index, s: Index) -> Index:
    return call.query_block(j, s, tile_kv, starts)[0]

  shape, spec = call.shape(K, count_k * block_k), call.spec(K, block_k, own)
  dk, dv = call.run(
    "polar_attention_dkv", functools.partial(_dkv_kernel, call=call, steps=steps), (call.batch, K, count_k, steps),
    inputs(tile_kv, query_block, own),
    [(jax.ShapeDtypeStruct(shape, k.dtype), spec), (jax.ShapeDtypeStruct(shape, v.dtype), spec)],
    [pltpu.VMEM((block_k, D), jnp.float32)] * 2, products=4, pairs=_pairs(call))
  dk, dv = (call.unarray(x, K, call.keys) for x in (dk, dv))
  q_dq, total = map(call.unrows, sums)
  return call.unarray(dq, H, call.queries), dk, dv, q_dq, total / natural


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, temp: jax.Array, null: jax.Array, v_null: jax.Array,
            documents: jax.Array | None, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Direction (B, T, H, D), natural log-sum-exp and sum_p2 (B, T, H), from temp and null (T, H), or (B, T, H) with the starts of
  `documents` (B, T), float32."""
  return _attend_forward(q, k, v, temp, null, v_null, documents, call)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, temp: jax.Array, null: jax.Array, v_null: jax.Array,
                    documents: jax.Array | None, call: Call) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[Any, ...]]:
  outputs = checkpoint_name(_forward(q, k, v, temp, null, v_null, documents, call), dispatch.POLAR_ATTENTION)
  direction, lse, sum_p2, norm = outputs
  return (direction, lse / LOG2_E, sum_p2), (q, k, v, temp, null, v_null, documents, direction, lse, sum_p2, norm)


def _attend_backward(call: Call, residuals: tuple[Any, ...],
                     cotangents: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
  q, k, v, temp, null, v_null, documents, direction, lse, sum_p2, norm = residuals
  through = formula.through_null(cotangents, direction, lse / LOG2_E - null, sum_p2, norm, v_null, shared_null=documents is None)
  dq, dk, dv, q_dq, total = _backward(q, k, v, through.go.astype(q.dtype), temp, lse, through.twice, through.delta, documents,
                                      call)
  dtemp = formula.temperature_gradient(q_dq, total, through.d_lse, lse / LOG2_E, sum_p2, temp)
  if documents is None:
    dtemp = jnp.sum(dtemp, axis=0)
  return dq, dk, dv, dtemp, through.d_null, through.d_v_null, None


_attend.defvjp(_attend_forward, _attend_backward)

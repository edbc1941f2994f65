"""Polar attention in XLA: key blocks are streamed within query blocks, nothing of size T x S is kept."""

from __future__ import annotations

import jax

from atma_jax.ops.core import streaming
from atma_jax.ops.polar_attention import formula


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    null_length: int | None = None, count_length: int | None = None, block_q: int | None = None,
                    block_k: int | None = None) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.polar_attention`; saves q, k, v and the statistics for the backward pass."""
  numbers = null_base, null_slope, len_gain, mag_beta
  statistics, null, rate = _statistics(q, k, v, numbers, window, null_length, count_length, block_q, block_k)
  direction, magnitude = jax.checkpoint(formula.finalise)(statistics, null, v_null, rate)
  return direction.astype(q.dtype), magnitude


def polar_statistics(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                     null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                     null_length: int | None = None, count_length: int | None = None) -> dict[str, jax.Array]:
  """See `atma_jax.ops.polar_statistics`."""
  del v_null
  numbers = null_base, null_slope, len_gain, mag_beta
  statistics, null, _ = _statistics(q, k, v, numbers, window, null_length, count_length, None, None)
  return {"n_eff": statistics.L**2 / statistics.Q, "w_null": 1 - formula.weight_found(statistics, null)}


def _statistics(q, k, v, numbers, window, null_length, count_length, block_q, block_k):
  temp, null, rate = formula.per_query(*numbers, queries=q.shape[1], keys=k.shape[1], window=window, null_length=null_length,
                                       count_length=count_length)
  dtype = formula.accumulator(q)
  scale = temp.astype(dtype) * q.shape[-1]**-0.5
  statistics = streaming.attention_statistics(q, k, v, scale, window=window, block_q=block_q, block_k=block_k)
  return statistics, null.astype(dtype), rate.astype(dtype)

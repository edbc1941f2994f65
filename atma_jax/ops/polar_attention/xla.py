"""Polar attention in O(block) memory: streamed statistics, the null folded in last (arXiv 2606.25156)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops import streaming
from atma_jax.ops.polar_attention import formula


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    block: int = streaming.BLOCK) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.polar_attention`; `block` bounds the scores in memory."""
  stats, null = _statistics(q, k, v, null_base, null_slope, len_gain, window, block)
  return finalise(stats, null, v_null, mag_beta, q.dtype)


def polar_statistics(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                     null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array,
                     window: int | None = None) -> dict[str, jax.Array]:
  """See `atma_jax.ops.polar_statistics`."""
  del v_null, mag_beta
  stats, null = _statistics(q, k, v, null_base, null_slope, len_gain, window, streaming.BLOCK)
  _, w_null = _null_share(stats, null)
  return {"n_eff": stats.L**2 / stats.Q, "w_null": w_null}


def finalise(stats: streaming.Statistics, null: jax.Array, v_null: jax.Array, mag_beta: jax.Array,
             dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
  """Direction (B, T, H, D) in `dtype` and magnitude (B, T, H) from statistics over all visible keys.

  Args:
    stats: see `streaming.Statistics`.
    null: (T, H) the null's logit.
    v_null: (H, D); mag_beta: (H,).
  """
  w_key, w_null = _null_share(stats, null)
  attended = (w_key / stats.L)[..., None] * stats.S + w_null[..., None] * v_null.astype(w_null.dtype)
  direction = formula.normalize(attended, formula.NORM_FLOOR).astype(dtype)
  return direction, formula.magnitude(stats.L**2 / stats.Q, w_key, mag_beta)


def _null_share(stats: streaming.Statistics, null: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Weight of all real keys together, and of the null: (B, T, H) each."""
  log_odds = null - jax.lax.stop_gradient(stats.M) - jnp.log(stats.L)
  return jax.nn.sigmoid(-log_odds), jax.nn.sigmoid(log_odds)


def _statistics(q, k, v, null_base, null_slope, len_gain, window, block):
  temp, null = formula.positional_logits(null_base, null_slope, len_gain, queries=q.shape[1], keys=k.shape[1],
                                         window=window)
  wide = formula.accumulator(q)
  temp, null = temp.astype(wide), null.astype(wide)
  stats = streaming.statistics(q, k, v, temp, scale=q.shape[-1] ** -0.5, window=window, block=block)
  return stats, null

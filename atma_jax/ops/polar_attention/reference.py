"""Polar attention as the paper writes it (arXiv 2606.25156), every score in memory: the oracle of the other files."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops.polar_attention import formula


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    null_length: int | None = None, count_length: int | None = None) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.polar_attention`; computed in float32 or wider, differentiable any number of times."""
  numbers = null_base, null_slope, len_gain, mag_beta
  weights, w_null, n_eff, rate = _weights(q, k, numbers, window, null_length, count_length)
  v = _repeat(v.astype(weights.dtype), q.shape[2])
  attended = jnp.einsum("bhts,bshd->bthd", weights, v) + w_null[..., None] * v_null.astype(weights.dtype)
  direction = formula.normalize(attended, formula.NORM_FLOOR).astype(q.dtype)
  return direction, formula.magnitude(n_eff, 1 - w_null, rate)


def polar_statistics(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                     null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                     null_length: int | None = None, count_length: int | None = None) -> dict[str, jax.Array]:
  """See `atma_jax.ops.polar_statistics`."""
  del v, v_null
  numbers = null_base, null_slope, len_gain, mag_beta
  _, w_null, n_eff, _ = _weights(q, k, numbers, window, null_length, count_length)
  return {"n_eff": n_eff, "w_null": w_null}


def _weights(q, k, numbers, window, null_length, count_length) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Weights on keys (B, H, T, S), weight of the null (B, T, H), participation ratio (B, T, H), the magnitude's rate.

  The softmax over keys and null is taken in two steps, keys first, so that nothing is 0/0 where the null takes all.
  """
  (_, T, H, D), S = q.shape, k.shape[1]
  dtype = formula.accumulator(q)
  temp, null, rate = formula.per_query(*numbers, queries=T, keys=S, window=window, null_length=null_length,
                                       count_length=count_length)
  temp, null = temp.T.astype(dtype), null.T.astype(dtype)  # (H, T)
  scores = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), _repeat(k.astype(dtype), H)) * D**-0.5
  distance = jnp.arange(S - T, S)[:, None] - jnp.arange(S)
  visible = (distance >= 0) & (distance < (S if window is None else window))
  logits = jnp.where(visible, temp[..., None] * scores, -jnp.inf)
  keys = jax.nn.softmax(logits, axis=-1)
  w_null = jax.nn.sigmoid(null - jax.nn.logsumexp(logits, axis=-1))
  n_eff = 1 / jnp.sum(keys * keys, axis=-1)
  return keys * (1 - w_null)[..., None], jnp.swapaxes(w_null, 1, 2), jnp.swapaxes(n_eff, 1, 2), rate


def _repeat(x: jax.Array, heads: int) -> jax.Array:
  return jnp.repeat(x, heads // x.shape[2], axis=2)

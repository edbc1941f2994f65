"""Plain causal softmax attention for the matched baselines, in O(block) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops import dispatch, streaming


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float,
                      window: int | None = None) -> jax.Array:
  """``softmax(scale q.k_j) v`` over the visible keys.

  Args:
    q: (B, T, H, D) queries, the last T of the S positions.
    k, v: (B, S, K, D); H is a multiple of K.
    scale: factor on the scores.
    window: keys a query may see, itself included; None is all up to its own.

  Returns:
    (B, T, H, D) in q's dtype.

  Raises:
    ValueError: shapes or window do not fit together.
  """
  dispatch.check_attention("softmax_attention", q, k, v, window)
  temp = jnp.ones((q.shape[1], q.shape[2]), jnp.result_type(jnp.float32, q))
  stats = streaming.statistics(q, k, v, temp, scale=scale, window=window)
  return (stats.S / stats.L[..., None]).astype(q.dtype)

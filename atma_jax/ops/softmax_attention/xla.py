"""Softmax attention in XLA, on the streaming engine of polar attention."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import streaming


def softmax_attention(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], *, scale: float,
                      window: int | None = None, starts: Int[Array, "B T"] | None = None, block_q: int | None = None,
                      block_k: int | None = None) -> Float[Array, "B T H D"]:
  """Streams key blocks within query blocks: O(block) memory forward and backward."""
  scales = jnp.full((q.shape[1], q.shape[2]), scale, jnp.result_type(jnp.float32, q))
  gathered = streaming.attention_statistics(q, k, v, scales, window=window, starts=starts, block_q=block_q,
                                            block_k=block_k)
  return (gathered.S / gathered.L[..., None]).astype(q.dtype)

"""Causal softmax attention, the matched baseline of polar attention, on the same streaming engine."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch, streaming

OP = dispatch.Op("softmax_attention", {
  "xla": dispatch.Implementation(f"{__name__}:xla"),
  "reference": dispatch.Implementation(f"{__name__}:reference", platforms=()),
})


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None = None,
                      implementation: str = "auto") -> jax.Array:
  """Causal attention with grouped heads.

  Args:
    q: (B, T, H, D) queries, the last T of the S positions.
    k, v: (B, S, K, D); H is a multiple of K, and query head h reads key head ``h // (H // K)``.
    scale: positive factor of the scores.
    window: keys a query may see, itself included; None is all up to its own.
    implementation: one of `dispatch.NAMES`.

  Returns:
    (B, T, H, D) in q's dtype.

  Raises:
    ValueError: shapes or window do not fit together.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  dispatch.check_attention("softmax_attention", q, k, v, window)
  return OP(implementation, q, k, v, scale=scale, window=window)


def xla(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None = None,
        block_q: int | None = None, block_k: int | None = None) -> jax.Array:
  """Streams key blocks within query blocks: O(block) memory forward and backward."""
  scales = jnp.full((q.shape[1], q.shape[2]), scale, jnp.result_type(jnp.float32, q))
  gathered = streaming.attention_statistics(q, k, v, scales, window=window, block_q=block_q, block_k=block_k)
  return (gathered.S / gathered.L[..., None]).astype(q.dtype)


def reference(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None = None) -> jax.Array:
  """Every score in memory, in float32 or wider: the oracle."""
  (_, T, H, _), (_, S, K, _) = q.shape, k.shape
  dtype = jnp.result_type(jnp.float32, q)
  k, v = (jnp.repeat(x.astype(dtype), H // K, axis=2) for x in (k, v))
  distance = jnp.arange(S - T, S)[:, None] - jnp.arange(S)
  visible = (distance >= 0) & (distance < (S if window is None else window))
  logits = jnp.where(visible, scale * jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k), -jnp.inf)
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v).astype(q.dtype)

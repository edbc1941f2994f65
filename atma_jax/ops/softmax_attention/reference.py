"""Softmax attention with every score in memory: the oracle of all other implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import visibility


def softmax_attention(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], *, scale: float,
                      window: int | None = None, starts: Int[Array, "B T"] | None = None) -> Float[Array, "B T H D"]:
  """See `atma_jax.ops.softmax_attention.api`; computed in float32 or wider, differentiable any number of times."""
  (_, T, H, _), (_, S, K, _) = q.shape, k.shape
  dtype = jnp.result_type(jnp.float32, q)
  k, v = (jnp.repeat(x.astype(dtype), H // K, axis=2) for x in (k, v))
  visible = visibility.sees(jnp.arange(S - T, S)[:, None] - jnp.arange(S), window)
  if starts is not None:
    visible &= (jnp.arange(S) >= starts[..., None])[:, None]
  logits = jnp.where(visible, scale * jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k), -jnp.inf)
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v).astype(q.dtype)

"""Residual sum and RMS norm as plain arithmetic: the oracle of the kernels, and what XLA runs elsewhere."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from atma_jax.ops.core import dispatch


def sum_and_norm(x: jax.Array, terms: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array,
                 eps: float) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.sum_and_norm`."""
  dtype = jnp.result_type(jnp.float32, x)
  if terms:
    total = sum((y.astype(dtype) for y in terms), x.astype(dtype))
    x = checkpoint_name((total + bias).astype(x.dtype), dispatch.SUM_AND_NORM)
  s = x.astype(dtype)
  mean = checkpoint_name(jnp.mean(s * s, -1, keepdims=True), dispatch.SUM_AND_NORM)
  return x, (s * jax.lax.rsqrt(mean + eps) * weight).astype(x.dtype)

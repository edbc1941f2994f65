"""Depthwise causal convolution with a few taps, as a sum of shifted products (which fuses on every backend)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def short_conv(x: jax.Array, weight: jax.Array, *, history: jax.Array | None = None) -> jax.Array:
  """``y_t = sum_i weight[taps - 1 - i] * x_{t - i}``, accumulated in float32 or wider.

  Args:
    x: (B, T, C).
    weight: (taps, C); the last tap multiplies the current step.
    history: (B, taps - 1, C) steps before the first; None is zeros.

  Returns:
    (B, T, C) in x's dtype.
  """
  (B, T, C), taps = x.shape, weight.shape[0]
  if weight.shape != (taps, C):
    raise ValueError(f"short_conv: weight {weight.shape} is not (taps, C) for x {x.shape}")
  if history is None:
    history = jnp.zeros((B, taps - 1, C), x.dtype)
  elif history.shape != (B, taps - 1, C):
    raise ValueError(f"short_conv: history {history.shape} is not (B, taps - 1, C) = {(B, taps - 1, C)}")
  dtype = jnp.result_type(jnp.float32, x)
  padded = jnp.concatenate([history.astype(x.dtype), x], axis=1).astype(dtype)
  weight = weight.astype(dtype)
  return sum(weight[i] * padded[:, i : i + T] for i in range(taps)).astype(x.dtype)

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


@jax.custom_vjp
def gated_short_conv(gate: jax.Array, output_gate: jax.Array, x: jax.Array, weight: jax.Array) -> jax.Array:
  """``output_gate * short_conv(gate * x, weight)``; all (B, T, C) but weight (taps, C), the result in x's dtype.

  The products are formed again at every tap, and the backward pass is written so that one pass over the four arrays makes
  all gradients but the weight's, because XLA would store each of the intermediate products.
  """
  return (output_gate * _filtered(gate, x, weight)).astype(x.dtype)


def _gated_fwd(gate, output_gate, x, weight):
  return gated_short_conv(gate, output_gate, x, weight), (gate, output_gate, x, weight)


def _gated_bwd(inputs, dy):
  gate, output_gate, x, weight = inputs
  wide, taps = jnp.result_type(jnp.float32, x), weight.shape[0]
  dz = dy.astype(wide) * output_gate
  dweight = [jnp.sum(dz * _shifted(gate, i) * _shifted(x, i), axis=(0, 1)) for i in reversed(range(taps))]
  doutput_gate = dy * _filtered(gate, x, weight)
  du = sum(weight[taps - 1 - i].astype(wide) * _shifted(dy, -i).astype(wide) * _shifted(output_gate, -i) for i in range(taps))
  gradients = (du * x).astype(gate.dtype), doutput_gate.astype(output_gate.dtype), (du * gate).astype(x.dtype)
  return *jax.lax.optimization_barrier(gradients), jnp.stack(dweight).astype(weight.dtype)


gated_short_conv.defvjp(_gated_fwd, _gated_bwd)


def _filtered(gate: jax.Array, x: jax.Array, weight: jax.Array) -> jax.Array:
  """``short_conv(gate * x, weight)`` in float32 or wider, without the product as an array."""
  wide, taps = jnp.result_type(jnp.float32, x), weight.shape[0]
  return sum(weight[i].astype(wide) * _shifted(gate, taps - 1 - i).astype(wide) * _shifted(x, taps - 1 - i)
             for i in range(taps))


def _shifted(x: jax.Array, steps: int) -> jax.Array:
  """x (B, T, C) as it was `steps` before, or will be after -steps; zeros beyond its ends."""
  T = x.shape[1]
  padded = jnp.pad(x, ((0, 0), (max(steps, 0), max(-steps, 0)), (0, 0)))
  return padded[:, max(-steps, 0) :][:, :T]

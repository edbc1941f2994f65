"""Depthwise causal convolution with a few taps, as a sum of shifted products (which fuses on every backend)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

GATED = dispatch.Op("gated_short_conv", {
  "pallas_gpu": dispatch.Implementation("atma_jax.ops.short_conv.pallas_gpu:gated_short_conv", platforms=("gpu",),
                                        supports="supports"),
  "xla": dispatch.Implementation("atma_jax.ops.short_conv.api:shifted_products"),
})


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


def gated_short_conv(projected: Sequence[jax.Array], weight: jax.Array, bias: jax.Array | None = None, *,
                     implementation: str = "auto") -> jax.Array:
  """``output_gate * short_conv(gate * x, weight)``.

  Args:
    projected: gate, output gate and x, (B, T, C) each, or one array (B, T, 3 C) that has them side by side.
    weight: (taps, C), as for `short_conv`.
    bias: (3, C), added to gate, output gate and x first, which a kernel does as it reads them; None is zeros.
    implementation: one of `dispatch.NAMES`.

  Returns:
    (B, T, C) in the dtype of x.

  Raises:
    ValueError: shapes do not fit together.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  shapes, C = [z.shape for z in projected], weight.shape[-1]
  whole = (*shapes[0][:2], C if len(shapes) == 3 else 3 * C)
  if len(shapes) not in (1, 3) or set(shapes) != {whole} or weight.ndim != 2 or (bias is not None and bias.shape != (3, C)):
    raise ValueError(f"gated_short_conv: projected {shapes}, weight {weight.shape}, bias {None if bias is None else bias.shape} "
                     "are not (B, T, C) three times or (B, T, 3 C) once, (taps, C), (3, C)")
  return GATED(implementation, projected, weight, bias)


def shifted_products(projected: Sequence[jax.Array], weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """See `gated_short_conv`.

  The products are formed again at every tap, and the backward pass is written so that one pass over the four arrays makes
  all gradients but the weight's, because XLA would store each of the intermediate products.
  """
  arrays = projected if len(projected) == 3 else jnp.split(projected[0], 3, axis=-1)
  if bias is not None:
    arrays = [z + b.astype(z.dtype) for z, b in zip(arrays, bias, strict=True)]
  return _gated(*arrays, weight)


@jax.custom_vjp
def _gated(gate, output_gate, x, weight):
  return (output_gate * _filtered(gate, x, weight)).astype(x.dtype)


def _gated_fwd(gate, output_gate, x, weight):
  return _gated(gate, output_gate, x, weight), (gate, output_gate, x, weight)


def _gated_bwd(inputs, dy):
  gate, output_gate, x, weight = inputs
  wide, taps = jnp.result_type(jnp.float32, x), weight.shape[0]
  dz = dy.astype(wide) * output_gate
  dweight = [jnp.sum(dz * _shifted(gate, i) * _shifted(x, i), axis=(0, 1)) for i in reversed(range(taps))]
  doutput_gate = dy * _filtered(gate, x, weight)
  du = sum(weight[taps - 1 - i].astype(wide) * _shifted(dy, -i).astype(wide) * _shifted(output_gate, -i) for i in range(taps))
  gradients = (du * x).astype(gate.dtype), doutput_gate.astype(output_gate.dtype), (du * gate).astype(x.dtype)
  return *jax.lax.optimization_barrier(gradients), jnp.stack(dweight).astype(weight.dtype)


_gated.defvjp(_gated_fwd, _gated_bwd)


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

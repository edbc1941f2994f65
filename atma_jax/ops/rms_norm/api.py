"""The residual stream's sum with what a layer adds to it, and the root-mean-square norm of the sum."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

OP = dispatch.Op("sum_and_norm", {
  "pallas_gpu": dispatch.Implementation("atma_jax.ops.rms_norm.pallas_gpu:sum_and_norm", platforms=("gpu",), supports="supports"),
  "xla": dispatch.Implementation("atma_jax.ops.rms_norm.api:formula"),
})


def sum_and_norm(x: jax.Array, added: Sequence[jax.Array], bias: jax.Array, weight: jax.Array, *, eps: float,
                 implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """``s = x + sum(added) + bias`` and ``weight * s / sqrt(mean(s^2) + eps)``, in float32 and rounded at the end to x's dtype.

  Args:
    x: (B, T, C); without `added`, s is x, and the bias is not.
    added: of x's shape and dtype each.
    bias, weight: (C,).
    eps: of the mean of squares.
    implementation: one of `dispatch.NAMES`.

  Raises:
    ValueError: shapes do not fit together.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  if any(y.shape != x.shape for y in added) or not bias.shape == weight.shape == x.shape[-1:]:
    raise ValueError(f"sum_and_norm: x {x.shape}, added {[y.shape for y in added]}, bias {bias.shape}, weight {weight.shape} "
                     "are not (B, T, C), as often as there are summands, and (C,) twice")
  return OP(implementation, x, tuple(added), bias, weight, eps)


def formula(x: jax.Array, added: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array,
            eps: float) -> tuple[jax.Array, jax.Array]:
  """See `sum_and_norm`."""
  wide = jnp.result_type(jnp.float32, x)
  if added:
    x = checkpoint_name((sum((y.astype(wide) for y in added), x.astype(wide)) + bias).astype(x.dtype), dispatch.SUM_AND_NORM)
  s = x.astype(wide)
  mean = checkpoint_name(jnp.mean(s * s, -1, keepdims=True), dispatch.SUM_AND_NORM)
  return x, (s * jax.lax.rsqrt(mean + eps) * weight).astype(x.dtype)

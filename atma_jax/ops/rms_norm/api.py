"""Residual sum and RMS norm in one op: the public function and its table of implementations."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from atma_jax.ops.core import dispatch

_PACKAGE = "atma_jax.ops.rms_norm"
OP = dispatch.Op("sum_and_norm", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:sum_and_norm", platforms=("gpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.reference:sum_and_norm"),
  **dispatch.served_by(f"{_PACKAGE}.reference:sum_and_norm", "reference", "pallas_tpu"),
})


def sum_and_norm(x: Float[Array, "B T C"], terms: Sequence[Float[Array, "B T C"]], bias: Float[Array, " C"],
                 weight: Float[Array, " C"], *, eps: float,
                 implementation: str = "auto") -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
  """Computes ``s = x + sum(terms) + bias`` and its RMS norm ``weight * s / sqrt(mean(s^2) + eps)``.

  Both are computed in float32 or wider, and the sum is rounded to x's dtype before it is normed.

  Args:
    x: the residual stream.
    terms: what layers add to the stream, each in x's dtype. If there are none, s is x, and the bias is ignored.
    bias: added to the sum.
    weight: scale of the norm.
    eps: added to the mean of squares.
    implementation: one of `dispatch.NAMES`.

  Returns:
    The sum and its norm, in x's dtype.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: the implementation asked for by name cannot serve the call.
  """
  if any(y.shape != x.shape for y in terms) or not bias.shape == weight.shape == x.shape[-1:]:
    raise ValueError(f"sum_and_norm: x {x.shape}, terms {[y.shape for y in terms]}, bias {bias.shape}, weight {weight.shape} "
                     "must be (B, T, C), any number of (B, T, C), (C,) and (C,)")
  return OP(implementation, x, tuple(terms), bias, weight, eps)

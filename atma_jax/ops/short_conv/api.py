"""Depthwise causal convolutions of a few taps, plain and gated: the public functions and their table of implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch, visibility
from atma_jax.ops.short_conv.xla import reached

_PACKAGE = "atma_jax.ops.short_conv"
GATED = dispatch.Op("gated_short_conv", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:gated_short_conv", platforms=("gpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:gated_short_conv"),
  **dispatch.served_by(f"{_PACKAGE}.xla:gated_short_conv", "reference", "pallas_tpu"),
})


def short_conv(x: Float[Array, "B T C"], weight: Float[Array, "taps C"], *,
               history: Float[Array, "B taps-1 C"] | None = None,
               starts: Int[Array, "B T"] | None = None) -> Float[Array, "B T C"]:
  """Convolves every channel over time, ``y_t = sum_i weight[taps - 1 - i] * x_{t - i}``, accumulating in float32 or wider.

  It is a sum of shifted products, which XLA fuses on every backend.

  Args:
    x: the sequence.
    weight: one filter per channel; the last tap multiplies the current step.
    history: the steps before the first; None is zeros.
    starts: for rows that pack documents: the position at which each token's document starts (`document_starts`), before which no
      tap reads; one that goes on from the `history` has a start below 0. None is the start of the history.

  Returns:
    The filtered sequence in x's dtype.

  Raises:
    ValueError: the shapes do not fit together.
  """
  (B, T, C), taps = x.shape, weight.shape[0]
  if weight.shape != (taps, C):
    raise ValueError(f"short_conv: weight {weight.shape} must be (taps, C) for x {x.shape}")
  if history is None:
    history = jnp.zeros((B, taps - 1, C), x.dtype)
  elif history.shape != (B, taps - 1, C):
    raise ValueError(f"short_conv: history {history.shape} must be (B, taps - 1, C) = {(B, taps - 1, C)}")
  dtype = jnp.result_type(jnp.float32, x)
  padded = jnp.concatenate([history.astype(x.dtype), x], axis=1).astype(dtype)
  weight = weight.astype(dtype)
  visibility.check_starts("short_conv", starts, (B, T))
  y: Any = sum(weight[i] * reached(padded[:, i : i + T], starts, taps - 1 - i) for i in range(taps))
  return y.astype(x.dtype)


def gated_short_conv(projected: Sequence[Float[Array, "B T C"]] | Sequence[Float[Array, "B T 3*C"]],
                     weight: Float[Array, "taps C"], bias: Float[Array, "3 C"] | None = None, *,
                     starts: Int[Array, "B T"] | None = None, implementation: str = "auto") -> Float[Array, "B T C"]:
  """Computes ``output_gate * short_conv(gate * x, weight)``.

  Args:
    projected: gate, output gate and x as three arrays (B, T, C), or as one array (B, T, 3 C) that concatenates them.
    weight: one filter per channel, as for `short_conv`.
    bias: added to gate, output gate and x first, which a kernel does as it reads them; None is zeros.
    starts: where each token's document starts, as for `short_conv`.
    implementation: one of `dispatch.NAMES`.

  Returns:
    The result in x's dtype.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: the implementation asked for by name cannot serve the call.
  """
  shapes, C = [z.shape for z in projected], weight.shape[-1]
  expected = (*shapes[0][:2], C if len(shapes) == 3 else 3 * C)
  if len(shapes) not in (1, 3) or set(shapes) != {expected} or weight.ndim != 2 or (bias is not None and bias.shape != (3, C)):
    raise ValueError(f"gated_short_conv: projected {shapes}, weight {weight.shape}, bias {None if bias is None else bias.shape} "
                     "must be three times (B, T, C) or once (B, T, 3 C), (taps, C), and (3, C) or None")
  return GATED(implementation, projected, weight, bias, **visibility.check_starts("gated_short_conv", starts, shapes[0][:2]))

"""Causal softmax attention, the matched baseline of polar attention."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch, visibility

_PACKAGE = "atma_jax.ops.softmax_attention"
ATTENTION = dispatch.Op("softmax_attention", {
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:softmax_attention"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:softmax_attention", platforms=()),
})


def softmax_attention(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], *, scale: float,
                      window: int | None = None, starts: Int[Array, "B T"] | None = None,
                      implementation: str = "auto") -> Float[Array, "B T H D"]:
  """Causal attention with grouped heads.

  Args:
    q: queries, the last T of the S positions.
    k, v: keys and values; H is a multiple of K, and query head h reads key head ``h // (H // K)``.
    scale: positive factor of the scores.
    window: keys a query may see, its own included; None is all up to its own.
    starts: as for `polar_attention`: where each token's document starts in rows that pack several; None is 0.
    implementation: one of `dispatch.NAMES`.

  Returns:
    The attended values, in q's dtype.

  Raises:
    ValueError: shapes do not fit together, or the window is below 1.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  dispatch.check_attention("softmax_attention", q, k, v)
  visibility.check_window(window)
  documents = visibility.check_starts("softmax_attention", starts, q.shape[:2], k.shape[1])
  return ATTENTION(implementation, q, k, v, scale=scale, window=window, **documents)

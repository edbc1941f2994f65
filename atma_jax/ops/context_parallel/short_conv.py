"""The short convolution over a sequence that is split over devices."""

from __future__ import annotations

from jaxtyping import Array, Float

from atma_jax.ops.context_parallel.layout import halo
from atma_jax.ops.short_conv import api


def short_conv(x: Float[Array, "B T C"], weight: Float[Array, "taps C"], *, axis: str) -> Float[Array, "B T C"]:
  """`atma_jax.ops.short_conv` of a sequence split over mesh axis `axis`."""
  return api.short_conv(x, weight, history=halo(x, weight.shape[0] - 1, axis))

"""The flat forms of before: goes as soon as nothing calls them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from atma_jax.ops.context_parallel import delta, ring_attention
from atma_jax.ops.context_parallel.short_conv import short_conv  # noqa: F401
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

gated_delta = delta.gated_delta


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, params: PolarParams | None = None,
                    spec: AttentionSpec | None = None, *, axis: str, implementation: str = "auto", **flat: Any) -> Any:
  if params is None:
    spec = AttentionSpec(**{f.name: flat.pop(f.name, None) for f in dataclasses.fields(AttentionSpec)})
    params = PolarParams(**flat)
  return ring_attention.polar_attention(q, k, v, params, spec, axis=axis, implementation=implementation)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None = None,
                      spec: AttentionSpec | None = None, axis: str, implementation: str = "auto") -> jax.Array:
  spec = spec or AttentionSpec(window)
  return ring_attention.softmax_attention(q, k, v, scale=scale, spec=spec, axis=axis, implementation=implementation)

"""The ops over a sequence that is split over devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from atma_jax.ops.context_parallel import api
from atma_jax.ops.context_parallel.api import gated_delta, short_conv, unzigzag, zigzag
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

__all__ = ["gated_delta", "polar_attention", "short_conv", "softmax_attention", "unzigzag", "zigzag"]


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, params: PolarParams, spec: AttentionSpec, *, axis: str,
                    implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.polar_attention.api.attend` of a sequence split over mesh axis `axis`."""
  raw: dict[str, Any] = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
  return api.polar_attention(q, k, v, **raw, **dataclasses.asdict(spec), axis=axis, implementation=implementation)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, spec: AttentionSpec, axis: str,
                      implementation: str = "auto") -> jax.Array:
  """`atma_jax.ops.softmax_attention` of a sequence split over mesh axis `axis`."""
  return api.softmax_attention(q, k, v, scale=scale, window=spec.window, axis=axis, implementation=implementation)

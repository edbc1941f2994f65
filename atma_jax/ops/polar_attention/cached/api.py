"""Attention of new tokens over cached keys and over themselves: chunked prefill and decoding, forward only.

Unlike the training ops, every row of the batch stands at a position of its own, known at run time. A cache is a ring of
R slots: position p lies in slot ``p % R``, so the same code serves a cache of everything (R at least the length) and
one of a window (R at least the window). The statistics of two disjoint sets of keys merge exactly (`streaming.merge`),
so cached keys are read where they lie and new ones are written afterwards, once, for all layers.

Keys and values may be kept in int8 with a scale for every token and head (`quantise`). The scales are folded into the
scores and into the weights of the values, so nothing is ever dequantised in memory. Rounding moves an element by at
most 1/254 of the largest of its vector.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch
from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

_PACKAGE = "atma_jax.ops.polar_attention.cached"
OP = dispatch.Op("cached_attention", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:cached_statistics", platforms=("gpu",), supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.pallas_tpu:cached_statistics", platforms=("tpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:cached_statistics"),
})
APPEND = dispatch.Op("cached_append", {
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.pallas_tpu:append", platforms=("tpu",), supports="supports_append"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:append"),
})
BLOCK = 256  # slots of a large ring come in whole blocks
Scales = tuple[jax.Array, jax.Array] | None


def slots_for(capacity: int) -> int:
  """Smallest legal number of slots that is at least `capacity`: whole blocks, or whole eighths of less than one."""
  unit = 8 if capacity <= BLOCK else BLOCK
  return -(-capacity // unit) * unit


def cached_polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array,
                           lengths: jax.Array, params: PolarParams | None = None, spec: AttentionSpec | None = None, *,
                           scales: Scales = None, cache_slots: int | None = None, layer: int | None = None,
                           table: jax.Array | None = None, implementation: str = "auto", reach: int | None = None,
                           **flat: Any) -> tuple[jax.Array, jax.Array]:
  """`polar_attention` of T new tokens that follow the `lengths` cached ones.

  Args:
    q: (B, T, H, D).
    k, v: (B, T, K, D) of the new tokens.
    keys, values: (B, K, R, D) ring of the cached tokens; R a value of `slots_for`.
    lengths: (B,) int32 tokens before the new ones; with fewer slots than that, R is at least `window`.
    v_null, null_base, null_slope, len_gain, mag_beta, window, null_length, count_length: as for `polar_attention`.
    scales, reach, layer, table, implementation: as for `cached_statistics`.

  Returns:
    direction (B, T, H, D) in q's dtype and magnitude (B, T, H), float32 or wider.
  """
  if params is None:  # the form of before: goes as soon as nothing calls it
    lengths_of = {f.name: flat.pop(f.name, None) for f in dataclasses.fields(AttentionSpec)}
    params, spec = PolarParams(**flat), AttentionSpec(**lengths_of)
  reach = cache_slots if reach is None else reach
  null_base, null_slope, len_gain, mag_beta, v_null = (
    params.null_base, params.null_slope, params.len_gain, params.mag_beta, params.v_null)
  window, null_length, count_length = spec.window, spec.null_length, spec.count_length
  visible = lengths[:, None] + 1 + jnp.arange(q.shape[1])
  if window is not None:
    visible = jnp.minimum(visible, window)
  temp, null, rate = formula.of_counts(null_base, null_slope, len_gain, mag_beta, visible, null_length, count_length)
  dtype = formula.accumulator(q)
  scale = temp.astype(dtype) * q.shape[-1]**-0.5
  statistics = cached_statistics(q, k, v, keys, values, lengths, scale, window=window, scales=scales, reach=reach, layer=layer,
                                 table=table, implementation=implementation)
  direction, magnitude = formula.finalise(statistics, null.astype(dtype), v_null, rate.astype(dtype))
  return direction.astype(q.dtype), magnitude


def cached_softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array,
                             lengths: jax.Array, *, scale: float, spec: AttentionSpec = AttentionSpec(),  # noqa: B008
                             scales: Scales = None, cache_slots: int | None = None, layer: int | None = None,
                             table: jax.Array | None = None, implementation: str = "auto", window: int | None = None,
                             reach: int | None = None) -> jax.Array:
  """`softmax_attention` of T new tokens, (B, T, H, D) in q's dtype; arguments as for `cached_polar_attention`."""
  window, reach = window or spec.window, cache_slots if reach is None else reach
  factors = jnp.full(q.shape[:3], scale, formula.accumulator(q))
  statistics = cached_statistics(q, k, v, keys, values, lengths, factors, window=window, scales=scales, reach=reach,
                                 layer=layer, table=table, implementation=implementation)
  return (statistics.S / statistics.L[..., None]).astype(q.dtype)


def cached_statistics(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array,
                      scale: jax.Array, *, window: int | None = None, scales: Scales = None, reach: int | None = None,
                      layer: int | None = None, table: jax.Array | None = None, implementation: str = "auto") -> Statistics:
  """What every new query gathers from the cached keys and from the new ones up to its own.

  Args:
    q, k, v, keys, values, lengths, window: as for `cached_polar_attention`.
    scale: (B, T, H) factor of the scores, in the dtype of the statistics.
    scales: of int8 keys and of int8 values, (B, K, R) each; None where they are kept as numbers.
    reach: slots that are looked at, a value of `slots_for`: the caller knows that no row that counts has used one
      after them. None is all R. An implementation that skips what lies beyond a row's length needs no telling.
    layer: where keys, values and scales are those of several layers, stacked along a first axis: which to read.
    table: (B, N) int32 where the cache is paged: keys and values are then (P, K, R / N, D), scales (P, K, R / N), and a
      row's ring is made up of the N pages that it names. Pages without a token of the row may be anything.
    implementation: one of `dispatch.NAMES`.

  Returns:
    Statistics of shape (B, T, H) and (B, T, H, D).

  Raises:
    ValueError: shapes do not fit together.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  (B, _, H, D), K, (rings, _, R, _) = q.shape, k.shape[2], keys.shape[-4:]
  if table is not None:
    B, R = rings, R * table.shape[1]
  if keys.shape[-4:] != (B, K, keys.shape[-2], D) or keys.ndim != 4 + (layer is not None) or values.shape != keys.shape or (
      slots_for(R) != R or H % K):
    raise ValueError(f"cached attention: q {q.shape}, k {k.shape}, keys {keys.shape}, values {values.shape} are not "
                     "(B, T, H, D), (B, T, K, D), (B, K, R, D) twice with H a multiple of K and R one of slots_for")
  return OP(implementation, q, k, v, keys, values, lengths, scale, window=window, scales=scales, reach=reach, layer=layer,
            table=table)


def skips_unused_slots(keys: jax.ShapeDtypeStruct, heads: int, dtype: jnp.dtype, *, paged: bool = False,
                       implementation: str = "auto") -> bool:
  """Whether decoding with `heads` query heads in `dtype` over such keys (..., B, K, R, D) reads rows to their own length,
  so that a `reach` saves nothing."""
  *_, B, K, _, D = keys.shape
  q, k = (jax.ShapeDtypeStruct((B, 1, n, D), dtype) for n in (heads, K))
  scale = jax.ShapeDtypeStruct((B, 1, heads), jnp.result_type(jnp.float32, dtype))
  table = jax.ShapeDtypeStruct((B, 1), jnp.int32) if paged else None
  return OP.resolve(implementation, q, k, k, keys, keys, None, scale, table=table) != "xla"


def append(ring: jax.Array, new: jax.Array, lengths: jax.Array, counts: jax.Array, table: jax.Array | None = None,
           implementation: str = "auto") -> jax.Array:
  """A ring of several layers once new vectors, or numbers, are in it.

  Args:
    ring: (L, B, K, R, ...), or paged (L, P, K, R / N, ...).
    new: (L, B, K, T, ...) for the positions from `lengths` on; of more than R of them only the last are kept.
    lengths: (B,) int32.
    counts: (B,) int32, how many of a row's T are to be written.
    table: (B, N) int32 of a paged ring.
    implementation: one of `dispatch.NAMES`.
  """
  return APPEND(implementation, ring, new, lengths, counts, table)


def decoding_refusal(device: str, q: jax.Array, k: jax.Array, keys: jax.Array, scale: jax.Array, table: jax.Array | None, *,
                     group: int, page: int) -> str | None:
  """Why the decoding kernel for `device`, "gpu" or "tpu", cannot serve `cached_statistics`, or None if it can; it takes groups
  of at most `group` query heads and pages of multiples of `page` tokens."""
  if q.shape[1] != 1:
    return f"takes one new token a row, not {q.shape[1]}"
  if q.dtype not in (jnp.bfloat16, jnp.float32) or keys.dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
    return f"takes bfloat16 or float32 queries and int8, bfloat16 or float32 keys, not {q.dtype} and {keys.dtype}"
  if scale.dtype != jnp.float32:
    return f"takes a float32 scale, not {scale.dtype}"
  if q.shape[2] // k.shape[2] > group:
    return f"takes groups of at most {group} heads, not {q.shape[2] // k.shape[2]}"
  if table is not None and keys.shape[-2] % page:
    return f"takes pages of a multiple of {page} tokens, not {keys.shape[-2]}"
  return kernels.head_refusal(q) or kernels.elsewhere(device)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x (..., D) as int8 and a float32 scale (...) each vector is to be multiplied by."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale

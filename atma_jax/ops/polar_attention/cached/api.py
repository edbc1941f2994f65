"""Attention of new tokens over cached keys and over themselves: chunked prefill and decoding, forward only.

Unlike in the training ops, every row of the batch stands at a position of its own, known at run time. A cache is a ring of R
slots: position p lies in slot ``p % R``, so the same code serves a cache of everything (R at least the length) and one of a
window (R at least the window). The statistics of two disjoint sets of keys merge exactly (`streaming.merge`), so cached keys are
read where they lie and new ones are written afterwards, once, for all layers.

Keys and values may be kept in int8 with a scale for every token and head (`quantise`). The scales are folded into the scores and
into the weights of the values, so nothing is ever dequantised in memory. Rounding moves an element by at most 1/254 of the
largest of its vector.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch, pallas
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

_PACKAGE = "atma_jax.ops.polar_attention.cached"
ATTENTION = dispatch.Op("cached_attention", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:cached_statistics", platforms=("gpu",), supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.pallas_tpu:cached_statistics", platforms=("tpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:cached_statistics"),
  **dispatch.served_by(f"{_PACKAGE}.xla:cached_statistics", "reference"),
})
APPEND = dispatch.Op("cached_append", {  # of one vector a row; several at once are a scatter, of which there is one form
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.pallas_tpu:append", platforms=("tpu",), supports="supports_append"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:append"),
  **dispatch.served_by(f"{_PACKAGE}.xla:append", "reference", "pallas_gpu"),
})
BLOCK = 256  # slots of a large ring come in whole blocks
Scales = tuple[jax.Array, jax.Array] | None  # of int8 keys and of int8 values
NO_WINDOW = AttentionSpec()


def slots_for(capacity: int) -> int:
  """Smallest legal number of slots that is at least `capacity`: whole blocks, or whole eighths of less than one."""
  unit = 8 if capacity <= BLOCK else BLOCK
  return -(-capacity // unit) * unit


def tokens_since(slot: jax.Array, length: jax.Array, slots: int) -> jax.Array:
  """How many tokens were cached after the one in `slot`, in a used slot of a ring that has seen `length` tokens.

  A query at position `length` lies one more than that behind the slot's token.
  """
  return lax.rem(jnp.maximum(length - 1 - slot, 0), slots)


def cached_polar_attention(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], keys: jax.Array,
                           values: jax.Array, lengths: Int[Array, " B"], params: PolarParams, spec: AttentionSpec, *,
                           scales: Scales = None, cache_slots: int | None = None, layer: int | None = None,
                           table: Int[Array, "B N"] | None = None,
                           implementation: str = "auto") -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """`polar_attention` of T new tokens that follow the `lengths` cached ones.

  Args:
    q, k, v: of the new tokens.
    keys, values: (B, K, R, D) rings of the cached tokens; R is a value of `slots_for`.
    lengths: how many tokens each row has cached; where that is more than R, R is at least the window.
    params, spec: as for `atma_jax.ops.polar_attention.api.attend`.
    scales, cache_slots, layer, table, implementation: as for `cached_statistics`.

  Returns:
    direction in q's dtype and magnitude, float32 or wider.
  """
  positions = lengths[:, None] + jnp.arange(q.shape[1])
  per_query = formula.of_positions(params, positions, spec, formula.accumulator(q))
  statistics = cached_statistics(q, k, v, keys, values, lengths, per_query.temp * q.shape[-1]**-0.5, window=spec.window,
                                 scales=scales, cache_slots=cache_slots, layer=layer, table=table, implementation=implementation)
  direction, magnitude = formula.finalise(statistics, per_query, params.v_null)
  return direction.astype(q.dtype), magnitude


def cached_softmax_attention(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"],
                             keys: jax.Array, values: jax.Array, lengths: Int[Array, " B"], *, scale: float,
                             spec: AttentionSpec = NO_WINDOW, scales: Scales = None, cache_slots: int | None = None,
                             layer: int | None = None, table: Int[Array, "B N"] | None = None,
                             implementation: str = "auto") -> Float[Array, "B T H D"]:
  """`softmax_attention` of T new tokens, in q's dtype; arguments as for `cached_polar_attention`, the window as in `spec`."""
  factors = jnp.full(q.shape[:3], scale, formula.accumulator(q))
  statistics = cached_statistics(q, k, v, keys, values, lengths, factors, window=spec.window, scales=scales,
                                 cache_slots=cache_slots, layer=layer, table=table, implementation=implementation)
  return (statistics.S / statistics.L[..., None]).astype(q.dtype)


def cached_statistics(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], keys: jax.Array,
                      values: jax.Array, lengths: Int[Array, " B"], scale: Float[Array, "B T H"], *, window: int | None = None,
                      scales: Scales = None, cache_slots: int | None = None, layer: int | None = None,
                      table: Int[Array, "B N"] | None = None, implementation: str = "auto") -> Statistics:
  """What every new query gathers from the cached keys and from the new ones up to its own.

  Args:
    q, k, v, keys, values, lengths: as for `cached_polar_attention`.
    scale: factor of the scores, in the dtype of the statistics.
    window: keys a query may see, its own included; None is all up to its own.
    scales: (B, K, R) each for int8 keys and int8 values; None where they are kept as numbers.
    cache_slots: how many slots are looked at, a value of `slots_for`: the caller knows that no row that counts has used one after
      them. None is all R. An implementation that skips what lies beyond a row's length needs no telling.
    layer: which layer to read where keys, values and scales of several layers are stacked along a first axis.
    table: where the cache is paged, the pages of each row: keys and values are then (P, K, R / N, D), scales (P, K, R / N), and
      a row's ring is made up of the N pages that it names. Pages without a token of the row may be anything.
    implementation: one of `dispatch.NAMES`.

  Returns:
    Statistics over all keys that each query sees.

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
  return ATTENTION(implementation, q, k, v, keys, values, lengths, scale, window=window, scales=scales, cache_slots=cache_slots,
                   layer=layer, table=table)


def skips_unused_slots(keys: jax.ShapeDtypeStruct, heads: int, dtype: jnp.dtype, *, paged: bool = False,
                       implementation: str = "auto") -> bool:
  """Whether decoding reads each row up to its own length, so that limiting `cache_slots` would save nothing.

  Args:
    keys: shape and dtype of the cached keys, (..., B, K, R, D).
    heads: query heads.
    dtype: of the queries.
    paged: whether the cache is paged.
    implementation: one of `dispatch.NAMES`.
  """
  *_, B, K, _, D = keys.shape
  q, k = (jax.ShapeDtypeStruct((B, 1, n, D), dtype) for n in (heads, K))
  scale = jax.ShapeDtypeStruct((B, 1, heads), jnp.result_type(jnp.float32, dtype))
  table = jax.ShapeDtypeStruct((B, 1), jnp.int32) if paged else None
  return ATTENTION.resolve(implementation, q, k, k, keys, keys, None, scale, table=table).startswith("pallas")


def append(ring: jax.Array, new: jax.Array, lengths: Int[Array, " B"], counts: Int[Array, " B"],
           table: Int[Array, "B N"] | None = None, implementation: str = "auto") -> jax.Array:
  """Writes new vectors, or numbers, into a ring of several layers.

  Args:
    ring: (L, B, K, R, ...), or paged (L, P, K, R / N, ...).
    new: (L, B, K, T, ...) for the positions from `lengths` on; where a row gets more than R of them, only the last are kept.
    lengths: how many tokens each row has cached.
    counts: how many of a row's T are to be written.
    table: the pages of each row of a paged ring.
    implementation: one of `dispatch.NAMES`, for one vector a row; the scatter of several has only one form.
  """
  if ring.ndim != 5 or new.shape[3] != 1:
    implementation = "xla"
  return APPEND(implementation, ring, new, lengths, counts, table)


def decoding_refusal(device: str, q: jax.Array, k: jax.Array, keys: jax.Array, scale: jax.Array, table: jax.Array | None, *,
                     group: int, page: int) -> str | None:
  """Why the decoding kernel for `device`, "gpu" or "tpu", cannot serve `cached_statistics`, or None if it can.

  It takes groups of at most `group` query heads, and pages of multiples of `page` tokens.
  """
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
  return pallas.head_refusal(q) or pallas.device_refusal(device)


def quantise(x: Float[Array, "*B D"]) -> tuple[Int[Array, "*B D"], Float[Array, "*B"]]:
  """x as int8, and the float32 scales that the vectors are to be multiplied by."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale

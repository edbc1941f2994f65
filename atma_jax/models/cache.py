"""Everything a model remembers of the tokens before: keys and values, memory states and convolution histories.

A `Cache` is one pytree. Its arrays below `layers` are stacked (repetition, B, ...), so that a scanned model scans it,
and rows are gathered, forked and replaced along axis 1 whatever the layer. Saving and restoring is saving its leaves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from atma_jax.config import DTYPES, ModelConfig
from atma_jax.models.parallel import short_conv as whole_short_conv
from atma_jax.ops import short_conv
from atma_jax.ops.polar_attention.cached.api import BLOCK, append, quantise, slots_for

PAGE_LIMIT = BLOCK  # tokens of a page
CACHE_DTYPES = ("int8", *DTYPES)  # of keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
  """Where the T new tokens of a call lie: row b brings `counts[b]` of them, the rest of its T is padding."""

  lengths: jax.Array  # (B,) int32 tokens before
  counts: jax.Array  # (B,) int32 between 0 and T
  table: jax.Array | None = None  # (B, N) int32, of a paged cache

  @property
  def rows(self) -> int:
    """B."""
    return self.counts.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalPast:
  """What a local mixer remembers; without a field, nothing came before and nothing is to be remembered."""

  history: jax.Array | None = None  # (B, taps - 1, C) inputs of the convolution

  def after(self, update: LocalPast, span: Span) -> LocalPast:
    """The past once the new tokens belong to it; all arrays stacked (repetition, B, ...)."""
    del span
    return update

  def at(self, repetition: int) -> LocalPast:
    """What one repetition remembers, of stacked arrays."""
    return LocalPast(self.history[repetition])

  def stepped(self, updates: list[LocalPast]) -> LocalPast:
    """The update of all repetitions, stacked, from those of each."""
    del self
    return jax.tree.map(lambda *x: jnp.stack(x), *updates)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GlobalPast:
  """What a global mixer remembers. In an update, keys and values are those of the T new tokens, (B, K, T, D)."""

  keys: jax.Array | None = None  # (B, K, R, D) ring: position p in slot p % R; for rope, rotated. Paged: (P, K, R / N, D)
  values: jax.Array | None = None  # (B, K, R, D) or (P, K, R / N, D)
  canon_q: jax.Array | None = None  # (B, taps - 1, H D) inputs of the canon convolutions; none for rope
  canon_k: jax.Array | None = None  # (B, taps - 1, K D)
  canon_v: jax.Array | None = None  # (B, taps - 1, K D)
  memory: jax.Array | None = None  # (B, H, D, D) float32 or wider; none without memory
  key_scale: jax.Array | None = None  # (B, K, R) or (P, K, R / N) float32 of int8 keys; none for others, none in an update
  value_scale: jax.Array | None = None
  layer: int | None = dataclasses.field(default=None, metadata={"static": True})  # see `at`

  def after(self, update: GlobalPast, span: Span) -> GlobalPast:
    """As for `LocalPast`; padding is not written, and of more new tokens than slots only the last."""
    def write(ring: jax.Array, new: jax.Array) -> jax.Array:
      return append(ring, new, span.lengths, span.counts, span.table)

    new = {"keys": update.keys, "values": update.values}
    if self.key_scale is not None:
      (new["keys"], new["key_scale"]), (new["values"], new["value_scale"]) = map(quantise, new.values())
    return dataclasses.replace(update, **{name: write(getattr(self, name), x) for name, x in new.items()})

  def at(self, repetition: int) -> GlobalPast:
    """As for `LocalPast`; what is large stays stacked, with `layer` to say where to look and what to update in place."""
    canon = {name: x if (x := getattr(self, name)) is None else x[repetition] for name in ("canon_q", "canon_k", "canon_v")}
    return dataclasses.replace(self, **canon, layer=repetition)

  def stepped(self, updates: list[GlobalPast]) -> GlobalPast:
    """As for `LocalPast`; the memory, already of all repetitions, is that of the last."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(dataclasses.replace(update, memory=None) for update in updates))
    return dataclasses.replace(stacked, memory=updates[-1].memory)

  @property
  def slots(self) -> int:
    """R; of a page where the cache is paged."""
    return self.keys.shape[-2]

  def put(self, rows: jax.Array, other: GlobalPast, pages: jax.Array | None) -> GlobalPast:
    """As `Cache.put` says, of stacked arrays."""
    if pages is None:
      return jax.tree.map(lambda x, y: x.at[:, rows].set(y.astype(x.dtype)), self, other)

    def write(pool: jax.Array, ring: jax.Array) -> jax.Array:  # (L, P, K, page, ...), (L, n, K, R, ...)
      ring = ring.reshape(*ring.shape[:3], pages.shape[1], -1, *ring.shape[4:])
      ring = jnp.moveaxis(ring, 3, 2).reshape(ring.shape[0], -1, *pool.shape[2:])
      return pool.at[:, pages.reshape(-1)].set(ring.astype(pool.dtype), mode="drop")

    pooled = {name: write(x, getattr(other, name)) for name in PAGED if (x := getattr(self, name)) is not None}
    nothing = dict.fromkeys(PAGED)
    rest = dataclasses.replace(self, **nothing).put(rows, dataclasses.replace(other, **nothing), None)
    return dataclasses.replace(rest, **pooled)

  @property
  def scales(self) -> tuple[jax.Array, jax.Array] | None:
    """Of keys and of values, where they are int8."""
    return None if self.key_scale is None else (self.key_scale, self.value_scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RavenPast:
  """What a Raven mixer remembers: slots, whatever the length."""

  slot_keys: jax.Array | None = None  # (B, H, slots, D) float32 or wider
  slot_values: jax.Array | None = None  # (B, H, slots, D)
  memory: jax.Array | None = None  # (B, H, D, D) float32 or wider; none without memory

  def after(self, update: RavenPast, span: Span) -> RavenPast:
    """As for `LocalPast`."""
    del span
    return update

  def at(self, repetition: int) -> RavenPast:
    """As for `LocalPast`."""
    return jax.tree.map(lambda x: x[repetition], self)

  def stepped(self, updates: list[RavenPast]) -> RavenPast:
    """As for `LocalPast`."""
    del self
    return jax.tree.map(lambda *x: jnp.stack(x), *updates)


PAGED = ("keys", "values", "key_scale", "value_scale")  # what of a `GlobalPast` lies in pages
Past = LocalPast | GlobalPast | RavenPast
Layers = dict[str, list[Past]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The state of B sequences, each of a length of its own.

  `layers` holds, for "groups" and "tail" as far as the model has them, the past of each block of the pattern. In a paged
  cache, keys and values of all rows lie in P pages, and `table` says which of them, in order, make up a row's ring; P stands
  for a page that the row does not have, because it will never be as long.
  """

  lengths: jax.Array  # (B,) int32 tokens seen
  layers: Layers
  table: jax.Array | None = None  # (B, N) int32

  @classmethod
  def create(cls, config: ModelConfig, batch: int, capacity: int, dtype: str | None = None, *, page: int = 1,
             pages: int | None = None) -> Cache:
    """An empty cache.

    Args:
      config: of the model.
      batch: B.
      capacity: most tokens a row will hold, rounded up to whole blocks; a window needs and gets no more than itself.
      dtype: of keys and values, one of `CACHE_DTYPES`; None is the activation dtype, in which decoding equals the
        full forward pass. int8 carries a float32 scale a token and head.
      page: capacity is rounded up to whole pages of so many tokens, a power of two of at most `PAGE_LIMIT`, too.
      pages: P of a paged cache; None makes rings that lie by themselves.
    """
    activation = jnp.dtype(config.activation_dtype)
    slots = -(-slots_for(capacity if config.window is None else min(capacity, config.window)) // page) * page
    rings, length = (batch, slots) if pages is None else (pages, page)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim

    def past(kind: str, repeats: int) -> Past:
      def zeros(*shape: int, dtype=activation) -> jax.Array:
        return jnp.zeros((repeats, batch, *shape), dtype)

      if kind == "local":
        return LocalPast(zeros(config.conv_taps - 1, config.width))
      wide = jnp.promote_types(jnp.float32, activation)
      memory = zeros(heads, dim, dim, dtype=wide) if config.memory.enabled else None
      if kind == "raven":
        return RavenPast(*(zeros(heads, config.raven.slots, dim, dtype=wide) for _ in range(2)), memory)
      keys, values = (jnp.zeros((repeats, rings, kv_heads, length, dim), dtype or activation) for _ in range(2))
      canon = [None] * 3 if config.attention == "rope" else [
        zeros(config.canon_taps - 1, n * dim) for n in (heads, kv_heads, kv_heads)]
      scales = [None] * 2 if dtype != "int8" else [
        jnp.zeros((repeats, rings, kv_heads, length), jnp.float32) for _ in range(2)]
      return GlobalPast(keys, values, *canon, memory, *scales)

    pattern = config.block_pattern
    repeats, rest = divmod(config.num_layers, len(pattern))
    layers = {}
    if repeats:
      layers["groups"] = [past(kind, repeats) for kind in pattern]
    if rest:
      layers["tail"] = [past(kind, 1) for kind in pattern[:rest]]
    table = None if pages is None else jnp.full((batch, slots // page), pages, jnp.int32)
    return cls(jnp.zeros(batch, jnp.int32), layers, table)

  @property
  def keys(self) -> jax.Array | None:
    """Of its first global mixer; None without one."""
    return next((past.keys for pasts in self.layers.values() for past in pasts if isinstance(past, GlobalPast)), None)

  def after(self, update: Layers, span: Span) -> Cache:
    """The cache once the new tokens belong to it."""
    layers = {name: [old.after(new, span) for old, new in zip(pasts, update[name], strict=True)]
              for name, pasts in self.layers.items()}
    return Cache(self.lengths + span.counts, layers, self.table)

  def take(self, rows: jax.Array) -> Cache:
    """A cache of these rows (n,), repeated or reordered at will: gather and fork. Not of a paged cache."""
    return Cache(self.lengths[rows], jax.tree.map(lambda x: x[:, rows], self.layers))

  def put(self, rows: jax.Array, other: Cache, pages: jax.Array | None = None) -> Cache:
    """This cache with `rows` (n,) replaced by those of `other`, a cache of n rows and as many slots that is not paged.

    If this one is, `pages` (n, N) are the rows' from now on; slots of pages that a row does not have are left out.
    """
    def put(past: Past, new: Past) -> Past:
      if isinstance(past, GlobalPast):
        return past.put(rows, new, pages)
      return jax.tree.map(lambda x, y: x.at[:, rows].set(y.astype(x.dtype)), past, new)

    layers = {name: [put(past, new) for past, new in zip(pasts, other.layers[name], strict=True)]
              for name, pasts in self.layers.items()}
    table = self.table if pages is None else self.table.at[rows].set(pages)
    return Cache(self.lengths.at[rows].set(other.lengths), layers, table)


def convolve(x: jax.Array, weight: jax.Array, history: jax.Array | None,
             span: Span | None, channels: str) -> tuple[jax.Array, jax.Array | None]:
  """`short_conv` of x (B, T, C) after `history`, and the history after x: the last taps - 1 inputs that count.

  `channels` is the logical axis of C. Without a span x is whole sequences.
  """
  if span is None:
    return whole_short_conv(x, weight, channels=channels), None
  y = short_conv(x, weight, history=history)
  joined = jnp.concatenate([history, x.astype(history.dtype)], axis=1)
  if x.shape[1] == 1:
    return y, jnp.where(span.counts[:, None, None] > 0, joined[:, 1:], joined[:, :-1])
  last = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, history.shape[1]))
  return y, last(joined, span.counts)


def counted(shape: tuple[int, int], span: Span) -> jax.Array:
  """(B, T) bool, false for padding."""
  return jnp.broadcast_to(jnp.arange(shape[1]) < span.counts[:, None], shape)


def nbytes(cache: Any) -> int:
  """Bytes of a cache, abstract (`jax.eval_shape`) or not."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

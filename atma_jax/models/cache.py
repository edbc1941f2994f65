"""The state of a model between calls: keys and values, recurrent states and convolution histories.

A `Cache` is one pytree. Each mixer defines its own part of it, a `LayerCache`, in its own file. Arrays of the layers are stacked
(repetition, B, ...), so that a scanned model scans over them, and rows are gathered, forked and replaced along axis 1 whatever
the layer. Saving and restoring a cache is saving and restoring its leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, Self

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from atma_jax.config import DTYPES, ModelConfig
from atma_jax.models.mixers import mixer_class
from atma_jax.ops.polar_attention.cached.api import BLOCK, slots_for

PAGE_LIMIT = BLOCK  # most tokens of a page
CACHE_DTYPES = ("int8", *DTYPES)  # of keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSpan:
  """Where the T new tokens of a call stand in their sequences: row b brings `counts[b]` of them, the rest of its T is padding.

  Attributes:
    lengths: tokens that came before.
    counts: new tokens, between 0 and T.
    table: the pages of every row, of a paged cache.
    cache_slots: how many slots of keys and values to read; no row with new tokens may have used more. 0 is an empty cache, and
      None is all slots.
    implementation: the model's, by which new keys and values are written.
  """

  lengths: Int[Array, " B"]
  counts: Int[Array, " B"]
  table: Int[Array, "B N"] | None = None
  cache_slots: int | None = dataclasses.field(default=None, metadata={"static": True})
  implementation: str = dataclasses.field(default="auto", metadata={"static": True})

  @property
  def rows(self) -> int:
    """B."""
    return self.counts.shape[0]

  def real(self, T: int) -> Bool[Array, "B T"]:
    """Which of T tokens a row are no padding."""
    return jnp.broadcast_to(jnp.arange(T) < self.counts[:, None], (self.rows, T))


@dataclasses.dataclass(frozen=True)
class Rings:
  """The rings of keys and values that a cache has room for: one a row, or, in a paged cache, one a page.

  Attributes:
    count: B, or the number of pages P.
    slots: R, or the slots of a page.
    dtype: of keys and values, one of `CACHE_DTYPES`.
  """

  count: int
  slots: int
  dtype: str


class LayerCache:
  """What one mixer remembers of the tokens before: the interface that every mixer's cache implements.

  An implementation is a frozen dataclass of arrays, registered with `jax.tree_util.register_dataclass`. It comes in three forms:

  * of one layer, its arrays (B, ...), as `Mixer.init_cache` makes it and a mixer reads it;
  * stacked over the repetitions of the block pattern, (repetition, B, ...), as a `Cache` holds it;
  * as an *update*, which a mixer returns for new tokens; unless `append` says otherwise, it is the cache after them.

  The defaults suit a state whose size does not depend on the length, such as that of a recurrence.
  """

  rings: ClassVar[tuple[str, ...]] = ()
  """Fields (B, K, R, ...) with an entry for every token, position p in slot ``p % R``, the keys first; paged caches keep them in
  pages."""

  memory: Array | None = None  # (B, H, D, D), the state of a gated-delta memory; None without one

  def arrays(self) -> dict[str, Array]:
    """The arrays by the names of their fields."""
    fields: Any = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
    values = {field.name: getattr(self, field.name) for field in fields if not field.metadata.get("static")}
    return {name: x for name, x in values.items() if x is not None}

  def with_arrays(self, arrays: Mapping[str, Array | None]) -> Self:
    """The same cache with other arrays in some of its fields."""
    return dataclasses.replace(self, **arrays)  # pyright: ignore[reportArgumentType]

  def append(self, update: Self, span: TokenSpan) -> Self:
    """The stacked cache once the tokens that a stacked `update` stands for belong to it."""
    del span
    return update

  def select(self, repetition: int) -> Self:
    """The cache of one layer of the stack, as unrolled decoding passes it to the mixer."""
    return jax.tree.map(lambda x: x[repetition], self)

  def carry(self, update: Self) -> Self:
    """The stacked cache as the next layer finds it, after a layer returned `update`: for arrays that are updated in place."""
    del update
    return self

  def stack_updates(self, updates: Sequence[Self]) -> Self:
    """The stacked update, from that of every layer."""
    return jax.tree.map(lambda *x: jnp.stack(x), *updates)

  def put(self, rows: Int[Array, " n"], other: Self, pages: Int[Array, "n N"] | None) -> Self:
    """The stacked cache with `rows` replaced by those of `other`; see `Cache.put`."""
    if pages is None or not self.rings:
      return jax.tree.map(lambda x, y: x.at[:, rows].set(y.astype(x.dtype)), self, other)

    def write(pool: jax.Array, ring: jax.Array) -> jax.Array:  # (L, P, K, page, ...), (L, n, K, R, ...)
      ring = ring.reshape(*ring.shape[:3], pages.shape[1], -1, *ring.shape[4:])
      ring = jnp.moveaxis(ring, 3, 2).reshape(ring.shape[0], -1, *pool.shape[2:])
      return pool.at[:, pages.reshape(-1)].set(ring.astype(pool.dtype), mode="drop")

    none = dict.fromkeys(self.rings)
    rest = self.with_arrays(none).put(rows, other.with_arrays(none), None)
    return rest.with_arrays({name: write(x, getattr(other, name)) for name, x in self.arrays().items() if name in self.rings})


Layers = dict[str, list[LayerCache]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The state of B sequences, each of a length of its own.

  In a paged cache, keys and values of all rows lie in P pages, and `table` says which of them, in order, make up a row's ring;
  the entry P stands for a page that the row does not have, because it will never be as long.

  Attributes:
    lengths: tokens seen.
    layers: for "groups" and "tail", as far as the model has them, the stacked cache of each block of the pattern.
    table: the pages of every row; None where each row has a ring of its own.
  """

  lengths: Int[Array, " B"]
  layers: Layers
  table: Int[Array, "B N"] | None = None

  @classmethod
  def create(cls, config: ModelConfig, batch: int, capacity: int, dtype: str | None = None, *, page: int = 1,
             pages: int | None = None) -> Cache:
    """An empty cache.

    Args:
      config: of the model.
      batch: B.
      capacity: most tokens a row will hold, rounded up to whole blocks; a window needs and gets no more than itself.
      dtype: of keys and values, one of `CACHE_DTYPES`; None is the activation dtype, in which decoding equals the
        full forward pass. int8 carries a float32 scale for every token and head.
      page: tokens of a page, a power of two of at most `PAGE_LIMIT`; capacity is rounded up to whole pages.
      pages: P of a paged cache; None gives every row a ring of its own.
    """
    slots = -(-slots_for(capacity if config.window is None else min(capacity, config.window)) // page) * page
    rings = Rings(*((batch, slots) if pages is None else (pages, page)), dtype or config.activation_dtype)

    def stacked(kind: str, repeats: int) -> LayerCache:
      single = mixer_class(kind).init_cache(config, batch, rings)
      return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), single)

    pattern = config.block_pattern
    repeats, rest = divmod(config.num_layers, len(pattern))
    layers = {}
    if repeats:
      layers["groups"] = [stacked(kind, repeats) for kind in pattern]
    if rest:
      layers["tail"] = [stacked(kind, 1) for kind in pattern[:rest]]
    table = None if pages is None else jnp.full((batch, slots // page), pages, jnp.int32)
    return cls(jnp.zeros(batch, jnp.int32), layers, table)

  @property
  def keys(self) -> Array | None:
    """The stacked keys of the first mixer that keeps any; None where no mixer does."""
    return next((getattr(layer, layer.rings[0]) for caches in self.layers.values() for layer in caches if layer.rings), None)

  def append(self, update: Layers, span: TokenSpan) -> Cache:
    """The cache once the new tokens belong to it; `update` holds the stacked updates of all layers."""
    layers = {name: [old.append(new, span) for old, new in zip(caches, update[name], strict=True)]
              for name, caches in self.layers.items()}
    return Cache(self.lengths + span.counts, layers, self.table)

  def take(self, rows: Int[Array, " n"]) -> Cache:
    """A cache of these rows, repeated or reordered at will: gather and fork. Not of a paged cache."""
    return Cache(self.lengths[rows], jax.tree.map(lambda x: x[:, rows], self.layers))

  def put(self, rows: Int[Array, " n"], other: Cache, pages: Int[Array, "n N"] | None = None) -> Cache:
    """This cache with `rows` replaced by those of `other`, a cache of n rows and as many slots that is not paged.

    If this one is paged, `pages` are those of the rows from now on; what lies in slots of pages that a row does not have is
    dropped.
    """
    chex.assert_rank(rows, 1)
    layers = {name: [old.put(rows, new, pages) for old, new in zip(caches, other.layers[name], strict=True)]
              for name, caches in self.layers.items()}
    table = self.table if self.table is None or pages is None else self.table.at[rows].set(pages)
    return Cache(self.lengths.at[rows].set(other.lengths), layers, table)


def nbytes(cache: Any) -> int:
  """Bytes of a cache, or of any pytree of arrays, abstract (`jax.eval_shape`) or not."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

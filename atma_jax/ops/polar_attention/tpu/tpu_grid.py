"""The plan of the TPU kernels of polar attention: blocks, grids, masks and layouts; `pallas_tpu` has the kernels."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from atma_jax.ops.core import devices, visibility
from atma_jax.ops.core.tiles import Tile, Tiles

LANES = 128
Ref = Any  # a Pallas reference
Index = Any  # a Python int or a traced integer


class Starts(NamedTuple):
  """Positions at which the segments of queries and of keys start."""

  queries: tuple[Index, ...]
  keys: tuple[Index, ...]


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static about a call, and the plan of its grids.

  Queries, and keys, are one segment of consecutive positions or, in a ring (`ring_tpu`), two. Block indices count through all
  segments.

  Attributes:
    batch: B.
    queries: T, of one segment.
    keys: S, of one segment.
    groups: K.
    members: query heads of a group, H / K.
    dim: D.
    window: keys a query may see; None where no query has more than that before it.
    tiles: block sizes of the kernels.
    interpret: whether the kernels run without a TPU.
    segments: how many segments there are.
    padded: in a ring, the lengths to which segments of queries and of keys are padded; None is whole blocks.
  """

  batch: int
  queries: int
  keys: int
  groups: int
  members: int
  dim: int
  window: int | None
  tiles: Tiles
  interpret: bool
  segments: int = 1
  padded: tuple[int, int] | None = None

  def blocks(self, tile: Tile) -> tuple[int, int]:
    """Queries and keys of a block: multiples of the lanes, no larger than the padded sequences."""
    block_q = min(max(tile.q // self.members // LANES, 1) * LANES, up(self.queries, LANES))
    return block_q, min(tile.k, up(self.keys, LANES))

  def counts(self, tile: Tile) -> tuple[int, int]:
    """How many blocks of queries and of keys a segment has."""
    block_q, block_k = self.blocks(tile)
    if self.padded is not None:
      return self.padded[0] // block_q, self.padded[1] // block_k
    return -(-self.queries // block_q), -(-self.keys // block_k)

  def query_position(self, i: Index, tile: Tile, starts: Starts) -> Index:
    """Position of the first query of block i."""
    segment, i = self._split(i, self.counts(tile)[0])
    return _pick(starts.queries, segment) + i * self.blocks(tile)[0]

  def key_position(self, j: Index, tile: Tile, starts: Starts) -> Index:
    """Position of the first key of block j."""
    segment, j = self._split(j, self.counts(tile)[1])
    return _pick(starts.keys, segment) + j * self.blocks(tile)[1]

  def _split(self, index: Index, count: int) -> tuple[Index, Index]:
    """Segment and index within it of a block."""
    return (0, index) if self.segments == 1 else (index // count, index % count)

  def key_blocks(self, i: Index, tile: Tile, starts: Starts) -> list[tuple[Index, Index]]:
    """For each segment of keys, the first and one past the last block that query block i sees."""
    block_q, block_k = self.blocks(tile)
    position, ranges = self.query_position(i, tile, starts), []
    for start in starts.keys:
      row = position - start
      end = _least(visibility.at_least(row + block_q + block_k - 1, 0) // block_k, self.counts(tile)[1])
      ranges.append((_least(visibility.first_key(row, self.window) // block_k, end), end))
    return ranges

  def query_blocks(self, j: Index, tile: Tile, starts: Starts) -> list[tuple[Index, Index]]:
    """For each segment of queries, the first and one past the last block that sees key block j."""
    block_q, block_k = self.blocks(tile)
    count = self.counts(tile)[0]
    position, ranges = self.key_position(j, tile, starts), []
    for start in starts.queries:
      row = position - start  # of the query at the first key's position
      end = count
      if self.window is not None:
        end = _least(visibility.at_least(visibility.last_query(row + block_k - 1, self.window), -1) // block_q + 1, count)
      ranges.append((_least(visibility.at_least(row, 0) // block_q, end), end))
    return ranges

  def key_block(self, i: Index, step: Index, tile: Tile, starts: Starts) -> tuple[Index, Index]:
    """The block of keys that query block i meets at a step of the grid's last axis, and whether it meets one at all."""
    return self._walk(self.key_blocks(i, tile, starts), step, self.counts(tile)[1])

  def query_block(self, j: Index, step: Index, tile: Tile, starts: Starts) -> tuple[Index, Index]:
    """The block of queries that key block j meets at a step of the grid's last axis, and whether it meets one at all."""
    return self._walk(self.query_blocks(j, tile, starts), step, self.counts(tile)[0])

  def _walk(self, ranges: list[tuple[Index, Index]], step: Index, count: int) -> tuple[Index, Index]:
    total = steps_of(ranges)
    at = visibility.at_least(_least(step, total - 1), 0)
    (first, end), *others = ranges
    block = first + at
    for other, _ in others:
      block = jnp.where(at < end - first, block, count + other + at - (end - first))
    return _least(block, self.segments * count - 1), step < total

  def mask(self, i: Index, j: Index, tile: Tile, starts: Starts) -> jax.Array:
    """(keys, rows) whether each row's query sees each key."""
    block_q, block_k = self.blocks(tile)
    shape = (block_k, self.members * block_q)
    key = lax.broadcasted_iota(jnp.int32, shape, 0)
    query = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 1), block_q) + self.query_position(i, tile, starts)
    distance = query - (key + self.key_position(j, tile, starts))
    visible = visibility.sees(distance, self.window)
    return visible & (key < self._real(j, tile)) if self.ragged(tile) else visible

  def in_documents(self, first: jax.Array, j: Index, tile: Tile, starts: Starts) -> jax.Array:
    """(keys, rows) whether each key of block j lies in the document of each row's query, which starts at `first` (1, block_q)."""
    rows = jnp.concatenate([first] * self.members, axis=1).astype(jnp.int32)
    key = lax.broadcasted_iota(jnp.int32, (self.blocks(tile)[1], rows.shape[1]), 0)
    return key + self.key_position(j, tile, starts) >= rows

  def whole(self, i: Index, j: Index, tile: Tile, starts: Starts) -> jax.Array:
    """Whether every query of block i sees every key of block j."""
    block_q, block_k = self.blocks(tile)
    distance = self.query_position(i, tile, starts) - self.key_position(j, tile, starts)
    whole = visibility.sees(distance - (block_k - 1), None)  # the first query and the last key
    if self.window is not None:
      whole &= visibility.within(distance + block_q - 1, self.window)  # the last query and the first key
    return whole & (self._real(j, tile) >= block_k) if self.ragged(tile) else whole

  def ragged(self, tile: Tile) -> bool:
    """Whether a ring's segments of keys end within a block: the padding after them has positions that queries may see."""
    return self.padded is not None and self.keys < self.counts(tile)[1] * self.blocks(tile)[1]

  def _real(self, j: Index, tile: Tile) -> Any:
    """How many keys there are from block j on to the end of its segment."""
    return self.keys - self._split(j, self.counts(tile)[1])[1] * self.blocks(tile)[1]

  def array(self, x: jax.Array, block: int) -> jax.Array:
    """x (B, T, heads, D) as a kernel takes it: (B, K, heads / K, T, D), each segment padded to whole blocks."""
    B, _, N, D = x.shape
    x = x.reshape(B, self.segments, -1, N, D)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0), (0, 0))) if x.shape[2] % block else x
    return jnp.moveaxis(x, 3, 1).reshape(B, self.groups, N // self.groups, -1, D)

  def spec(self, heads: int, block: int, index: Callable[..., Any]) -> pl.BlockSpec:
    """Blocks (heads / K, block, D) of an `array`; `index` maps the grid's last two indices to a block."""
    return pl.BlockSpec((None, None, heads // self.groups, block, self.dim),
                        lambda b, h, i, s, *starts: (b, h, 0, index(i, s, *starts), 0))

  def transposed_spec(self, heads: int, block: int, index: Callable[..., Any]) -> pl.BlockSpec:
    """Blocks (heads / K, D, block) of an `array` with its last two axes exchanged."""
    return pl.BlockSpec((None, None, heads // self.groups, self.dim, block),
                        lambda b, h, i, s, *starts: (b, h, 0, 0, index(i, s, *starts)))

  def shape(self, heads: int, length: int) -> tuple[int, ...]:
    """Shape of an `array`."""
    return self.batch, self.groups, heads // self.groups, length, self.dim

  def unarray(self, x: jax.Array, heads: int, length: int) -> jax.Array:
    """The inverse of `array`, for segments of `length`: (B, T, heads, D)."""
    x = jnp.moveaxis(x.reshape(self.batch, heads, self.segments, -1, self.dim)[:, :, :, :length], 1, 3)
    return x.reshape(self.batch, -1, heads, self.dim)

  def rows(self, x: jax.Array, block: int) -> jax.Array:
    """(..., T, H) as (..., K, G, T), queries along lanes, each segment padded to whole blocks."""
    x = jnp.swapaxes(x, -1, -2).reshape(*x.shape[:-2], self.groups, self.members, self.segments, -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    return x.reshape(*x.shape[:-2], -1)

  def documents(self, x: jax.Array | None, block: int, index: Callable[..., Any]) -> tuple[Any, Any]:
    """The starts of documents x (B, T) as a kernel takes them, (B, 1, T) padded to whole blocks with the last; and their blocks
    (1, block). None stays None."""
    if x is None:
      return None, None
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge")[:, None]
    return x, pl.BlockSpec((None, 1, block), lambda b, h, i, s, *starts: (b, 0, index(i, s, *starts)))

  def unrows(self, x: jax.Array) -> jax.Array:
    """The inverse of `rows`: (B, K, G, T padded) as (B, T, H)."""
    x = x.reshape(self.batch, self.groups * self.members, self.segments, -1)[..., : self.queries]
    return jnp.swapaxes(x.reshape(self.batch, self.groups * self.members, -1), 1, 2)

  def row_spec(self, block: int, index: Callable[..., Any], batched: bool) -> pl.BlockSpec:
    """Blocks (G, block) of an array as `rows` makes it, `batched` if it has B in front."""
    if batched:
      return pl.BlockSpec((None, None, self.members, block), lambda b, h, i, s, *starts: (b, h, 0, index(i, s, *starts)))
    return pl.BlockSpec((None, self.members, block), lambda b, h, i, s, *starts: (h, 0, index(i, s, *starts)))

  def run(self, name: str, kernel: Callable[..., None], grid: tuple[Any, ...], inputs: list[Any],
          outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]], scratch: list[Any], products: int, pairs: int,
          starts: jax.Array | None = None, carried: int = 0) -> list[jax.Array]:
    """One `pallas_call`.

    Args:
      name, kernel, grid, scratch: as for `pl.pallas_call`.
      inputs, outputs: arrays and their blocks; an input may be None.
      products: matrix products for each pair of a query and a key, for the compiler's cost estimate.
      pairs: how many pairs of a query and a key that it sees one head has.
      starts: what a ring's kernel and its index maps take first, in scalar memory.
      carried: how many of the last inputs become the outputs, in place.
    """
    pairs *= self.batch * self.groups * self.members
    arrays = [array for array, _ in inputs if array is not None] + [shape for shape, _ in outputs]
    cost = pl.CostEstimate(flops=2 * products * self.dim * pairs, transcendentals=pairs,
                           bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays))
    scalars = () if starts is None else (starts,)
    plan: dict[str, Any] = {"grid": grid, "in_specs": [spec for _, spec in inputs],
                            "out_specs": [spec for _, spec in outputs], "scratch_shapes": scratch}
    if scalars:
      plan = {"grid_spec": pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, **plan)}
    first = len(scalars) + sum(array is not None for array, _ in inputs) - carried
    return pl.pallas_call(
      kernel, name=name, out_shape=[shape for shape, _ in outputs], interpret=self.interpret, cost_estimate=cost,
      input_output_aliases={first + i: i for i in range(carried)}, **plan,
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                                           vmem_limit_bytes=devices.vmem_budget()),
    )(*scalars, *(array for array, _ in inputs))


def steps_of(ranges: list[tuple[Index, Index]]) -> Any:
  """How many blocks the ranges have together."""
  return sum(end - first for first, end in ranges)


def up(size: int, multiple: int) -> int:
  """The size rounded up to a multiple."""
  return -(-size // multiple) * multiple


def _pick(values: tuple[Index, ...], index: Index) -> Index:
  return values[0] if len(values) == 1 else jnp.where(index == 0, *values)


def _least(a: Index, b: Index) -> Index:
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def stack(ref: Ref) -> jax.Array:
  """(G, block, D) as (G * block, D)."""
  return ref[...].reshape(-1, ref.shape[2])


def line(ref: Ref) -> jax.Array:
  """(G, block) as (1, G * block)."""
  return jnp.concatenate([ref[g : g + 1, :] for g in range(ref.shape[0])], axis=1) if ref.shape[0] > 1 else ref[...]

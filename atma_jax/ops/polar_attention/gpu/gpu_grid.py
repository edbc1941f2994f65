"""The plan of the GPU kernels of polar attention, `pallas_gpu`: block ranges, grids, masked rows, instructions."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import visibility
from atma_jax.ops.core.pallas import cdiv
from atma_jax.ops.core.tiles import Tile, Tiles

Ref = Any  # a Pallas reference
Bounds = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike, jax.typing.ArrayLike, jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static about a call, the block ranges that follow from it, and instructions that interpret mode has to spell out.

  Attributes:
    queries: T, of a segment where there are several.
    keys: S, of a segment where there are several.
    window: keys a query may see; None where no query has more than that before it.
    tiles: block sizes of the kernels.
    interpret: whether the kernels run without a GPU.
  """

  queries: int
  keys: int
  window: int | None
  tiles: Tiles
  interpret: bool

  @property
  def offset(self) -> int:
    """Position of the first query."""
    return self.keys - self.queries

  @property
  def rows(self) -> int:
    """T rounded up to whole blocks of every kernel: how many scalars a head has in memory."""
    block = max(self.tiles.forward.q, self.tiles.dq.q, self.tiles.dkv.q)
    return pl.cdiv(self.queries, block) * block

  def sees(self, distance: jax.Array) -> jax.Array:
    """Whether a query sees a key that lies `distance` positions before it."""
    return visibility.sees(distance, self.window)

  def pad(self, x: jax.Array, axis: int) -> jax.Array:
    """Zeros at the end of `axis`, up to a whole number of blocks of every kernel."""
    tiles = (self.tiles.forward, self.tiles.dq, self.tiles.dkv)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % max(max(tile.q, tile.k) for tile in tiles))
    return jnp.pad(x, padding) if padding[axis][1] else x

  def key_blocks(self, position: jax.Array, tile: Tile, blocks: int, starts: jax.Array | None = None) -> Bounds:
    """Which of `blocks` blocks of keys the `tile.q` queries from `position` on see: first, first unmasked, first masked, end.

    `starts` are the positions (tile.q,) before which they see none, because their documents start there.
    """
    end = jnp.clip(cdiv(position + tile.q, tile.k), 0, blocks)
    full_end = jnp.clip(lax.div(position + 1, tile.k), 0, end)
    if self.window is None and starts is None:
      return 0, 0, full_end, end
    low, high = visibility.first_key(position, self.window), visibility.first_key(position + tile.q - 1, self.window)
    if starts is not None:
      low, high = jnp.maximum(low, jnp.min(starts)), jnp.maximum(high, jnp.max(starts))
    first = jnp.minimum(lax.div(low, tile.k), end)
    full = jnp.clip(cdiv(high, tile.k), first, end)
    return first, full, jnp.maximum(full, full_end), end

  def query_blocks(self, row: jax.Array, tile: Tile, blocks: int, ends: jax.Array | None = None) -> Bounds:
    """Which of `blocks` blocks of queries see any of `tile.k` keys, the first at the position of query `row`; as `key_blocks`.

    `ends` are the rows (tile.k,) of the last query that may see each key, because its document ends there.
    """
    first = jnp.minimum(lax.div(jnp.maximum(row, 0), tile.q), blocks)
    full = jnp.clip(cdiv(jnp.maximum(row + tile.k - 1, 0), tile.q), first, blocks)
    if self.window is None and ends is None:
      return first, full, blocks, blocks
    low, high = jnp.iinfo(jnp.int32).max - tile.q, jnp.iinfo(jnp.int32).max - tile.q
    if self.window is not None:
      low, high = visibility.last_query(row, self.window) + 1, visibility.last_query(row + tile.k - 1, self.window) + 1
    if ends is not None:
      low, high = jnp.minimum(low, jnp.min(ends) + 1), jnp.minimum(high, jnp.max(ends) + 1)
    end = jnp.clip(cdiv(jnp.maximum(high, 0), tile.q), first, blocks)
    full = jnp.minimum(full, end)
    return first, full, jnp.clip(lax.div(jnp.maximum(low, 0), tile.q), full, end), end

  def scaled_exp2(self, x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """``2^(x scale - shift)``: two instructions an element, where `jnp.exp2` takes care of denormal numbers with five more."""
    if self.interpret:
      return jnp.exp2(x * scale - shift)
    return _assembly("{ .reg .f32 t; neg.f32 t, $3; fma.rn.f32 t, $1, $2, t; ex2.approx.ftz.f32 $0, t; }", x, scale, shift)

  def fms(self, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """``x y - z`` as one instruction that negates z itself: a negation outside would be an instruction an element."""
    return x * y - z if self.interpret else _assembly("{ .reg .f32 t; neg.f32 t, $3; fma.rn.f32 $0, $1, $2, t; }", x, y, z)

  def fma(self, x: jax.Array, y: jax.Array, z: jax.typing.ArrayLike) -> jax.Array:
    """``x y + z`` as one instruction: the compiler would round the product by itself."""
    return x * y + z if self.interpret else _fma_instruction(x, y, _like(x, z))

  def differentiable_fma(self, x: jax.Array, y: jax.Array, z: jax.typing.ArrayLike) -> jax.Array:
    """`fma` for functions that are differentiated within a kernel; outside `jax.vjp` it does not lower."""
    return x * y + z if self.interpret else _fma(x, y, _like(x, z))


def _like(x: jax.Array, value: jax.typing.ArrayLike) -> jax.Array:
  return value if isinstance(value, jax.Array) else jnp.full_like(x, value)


def _fma_instruction(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
  return _assembly("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


_fma = jax.custom_vjp(_fma_instruction)
_fma.defvjp(lambda x, y, z: (_fma_instruction(x, y, z), (x, y)), lambda factors, g: (g * factors[1], g * factors[0], g))


def _assembly(code: str, *arguments: jax.Array) -> jax.Array:
  shape = jnp.broadcast_shapes(*(x.shape for x in arguments))
  result, = plgpu.elementwise_inline_asm(code, args=[jnp.broadcast_to(x, shape) for x in arguments], pack=1,
                                         constraints=",".join(["=f", *"f" * len(arguments)]),
                                         result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)])
  return result


def three_loops(bounds: Bounds, body: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
  """Folds ``body(masked, index, carry)`` over [b0, b1) masked, [b1, b2) unmasked and [b2, b3) masked."""
  for lower, upper, masked in zip(bounds[:-1], bounds[1:], (True, False, True)):
    if lower is not upper:
      carry = lax.fori_loop(lower, upper, functools.partial(body, masked), carry)
  return carry


def rows_of(array: jax.Array) -> jax.Array:
  """(..., T, H) as (..., H, T), the layout in which a kernel reads the scalars of a block of queries."""
  return jnp.swapaxes(array, -1, -2)


@dataclasses.dataclass(frozen=True)
class Grid:
  """One program for each batch row, head and block of rows.

  Programs start in the order of the grid's axes, the first changing fastest: a group of heads, a block, a group. Few heads are in
  a group, so that what its programs read again and again stays in the L2 cache; of the blocks the longest come first.
  """

  batch: int
  heads: int
  blocks: int
  descending: bool = False  # the last block is the longest

  @property
  def group(self) -> int:
    """Least number of heads, over all batch rows, with two programs for every multiprocessor."""
    pairs = self.batch * self.heads
    return next(n for n in range(1, pairs + 1) if pairs % n == 0 and (n * self.blocks >= 256 or n == pairs))

  @property
  def shape(self) -> tuple[int, int, int]:
    """The grid as `pl.pallas_call` takes it."""
    return self.group, self.blocks, self.batch * self.heads // self.group

  def spec(self, shape: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
    """Blocks of this shape, at ``place(batch row, head, block)``."""
    def index(x: Any, y: Any, z: Any) -> tuple[Any, ...]:
      pair = z * self.group + x
      return place(lax.div(pair, self.heads), lax.rem(pair, self.heads), self.blocks - 1 - y if self.descending else y)

    return pl.BlockSpec(shape, index)

  @staticmethod
  def first_row(tile: Tile) -> jax.Array:
    """Row at which the program's block of queries starts, with blocks descending."""
    return (pl.num_programs(1) - 1 - pl.program_id(1)) * tile.q


def by_queries(tile: Tile, q: jax.Array, k: jax.Array, length: int | None = None) -> tuple[Any, ...]:
  """Blocks of queries, of whole keys, of scalars a head (H, T) and a row (B, H, T); and the grid, the longest rows first.

  `length` is the number of scalars, in whole blocks, where q has fewer queries.
  """
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  grid = Grid(B, H, (length or T) // tile.q, descending=True)
  query = grid.spec((None, tile.q, None, D), lambda b, h, i: (b, i, h, 0))
  key = grid.spec((None, pl.cdiv(S, tile.k) * tile.k, None, D), lambda b, h, i: (b, 0, lax.div(h, H // K), 0))
  head_rows = grid.spec((None, tile.q), lambda b, h, i: (h, i))
  rows = grid.spec((None, None, tile.q), lambda b, h, i: (b, h, i))
  return query, key, head_rows, rows, grid


@dataclasses.dataclass(frozen=True)
class Rows:
  """A reference of which only the first `count` rows exist; the others read as 0 and are not written."""

  ref: Ref
  count: jax.Array | int

  def __getitem__(self, index: tuple[Any, ...]) -> jax.Array:
    ref = self.ref.at[index]
    return plgpu.load(ref, mask=self._exist(index[0], ref.shape), other=0)

  def __setitem__(self, index: tuple[Any, ...], value: jax.Array) -> None:
    ref = self.ref.at[index]
    plgpu.store(ref, value, mask=self._exist(index[0], ref.shape))

  def _exist(self, rows: Any, shape: tuple[int, ...]) -> jax.Array:
    start = 0 if isinstance(rows, slice) else rows.start
    return jnp.broadcast_to(start + lax.broadcasted_iota(jnp.int32, (shape[0], *(1,) * (len(shape) - 1)), 0) < self.count, shape)


def rows_where(ragged: bool, count: jax.Array | int, *refs: Ref) -> tuple[Any, ...]:
  """The references, as `Rows` of `count` rows where `ragged`."""
  return tuple(Rows(ref, count) for ref in refs) if ragged else refs

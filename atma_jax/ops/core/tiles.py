"""Block sizes of the kernels: a table of those that were measured, by device and shape, and a rule for the rest.

``python -m atma_jax.benchmark --tune`` times candidates on the device it runs on and prints the lines to add here.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from atma_jax.ops.core import devices


@dataclasses.dataclass(frozen=True)
class Tile:
  """Block sizes of one step of an attention kernel, and how a GPU runs it.

  Attributes:
    q: queries; on a TPU rows of one matrix product, which are queries times the query heads of a group.
    k: keys.
    warps: GPU: warps of a program.
    stages: GPU: depth of the software pipeline over blocks of keys.
  """

  q: int
  k: int
  warps: int = 4
  stages: int = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
  """One tile per kernel of polar attention."""

  forward: Tile
  dq: Tile
  dkv: Tile


@dataclasses.dataclass(frozen=True)
class Carry:
  """How much state a program of the gated delta carries from chunk to chunk, and how a GPU runs it.

  Attributes:
    columns: GPU: columns of a head's state; 0 takes as many as leave enough programs.
    warps: GPU: warps of a program.
    stages: GPU: depth of the software pipeline over chunks.
    heads: TPU: heads side by side, whose chains of products hide each other's latency.
  """

  columns: int = 0
  warps: int = 4
  stages: int = 3
  heads: int = 8


# Keys are (generation, bytes of an element, head size) or, where the length matters, that and the `bucket` of the length.
POLAR: dict[tuple[Any, ...], Tiles] = {
  ("hopper", 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 128, 8, 3)),
  ("hopper", 2, 128): Tiles(Tile(128, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 128, 8, 3)),
  ("hopper", 4, 64): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
  ("hopper", 4, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
}
DELTA: dict[tuple[Any, ...], Carry] = {}


def polar_tiles(platform: str, itemsize: int, head_dim: int, length: int) -> Tiles:
  """Tiles of polar attention on the current device.

  Args:
    platform: ``gpu`` or ``tpu``, the kernels that ask.
    itemsize: bytes of an element of q, k and v.
    head_dim: D.
    length: T.
  """
  found = lookup(POLAR, devices.generation(), itemsize, head_dim, length)
  if found is not None:
    return found
  return POLAR["hopper", itemsize, head_dim] if platform == "gpu" else _tpu_tiles(itemsize)


def delta(itemsize: int, head_dim: int, length: int) -> Carry:
  """What a program of the gated delta carries; arguments as for `polar_tiles`."""
  found = lookup(DELTA, devices.generation(), itemsize, head_dim, length)
  heads = 8 if devices.vmem_mib() >= 32 else 2
  return found or (Carry(heads=heads) if itemsize == 2 else Carry(columns=32, stages=1, heads=heads))


def lookup(table: Mapping[tuple[Any, ...], Any], generation: str, itemsize: int, head_dim: int, length: int) -> Any:
  """The entry of this length, else of any length, else None."""
  key = generation, itemsize, head_dim
  return table.get((*key, bucket(length))) or table.get(key)


def bucket(length: int) -> int:
  """A length rounded up to a power of two, as the tables are keyed."""
  return 1 << (length - 1).bit_length()


def _tpu_tiles(itemsize: int) -> Tiles:
  """The largest tile whose scores, three or four arrays of (rows, keys) float32, leave half of the memory free.

  1024 x 512 keeps the matrix unit busy for thousands of cycles a step; more only adds masked pairs at the diagonal.
  """
  rows, keys = (1024, 512) if itemsize == 2 else (512, 512)
  while 6 * rows * keys * 4 > devices.vmem_budget():
    rows, keys = (rows // 2, keys) if rows > keys else (rows, keys // 2)
  return Tiles(*(Tile(rows, keys),) * 3)

"""Block sizes of the kernels: a table of those that were measured, by device and shape, and a rule for the rest.

``python -m atma_jax.benchmark --tune`` times candidates on the device it runs on and prints the lines to add here.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from atma_jax.ops.core import dispatch


@dataclasses.dataclass(frozen=True)
class Tile:
  """What one step of an attention kernel works on, and how a GPU runs it."""

  q: int  # queries; on a TPU rows of one matrix product, which are queries times the query heads of a group
  k: int  # keys
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
  """What a program of the gated delta carries from chunk to chunk."""

  columns: int = 0  # GPU: of a head's state; 0 leaves it to the number of programs that makes
  warps: int = 4
  stages: int = 3
  heads: int = 8  # TPU: heads side by side, whose chains of products hide each other's latency


# A key is (generation, bytes of an element, head size) or, where a length matters, that and the power of two above it.
POLAR: dict[tuple[Any, ...], Tiles] = {
  ("hopper", 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 128, 8, 3)),
  ("hopper", 2, 128): Tiles(Tile(128, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 128, 8, 3)),
  ("hopper", 4, 64): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
  ("hopper", 4, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
}
DELTA: dict[tuple[Any, ...], Carry] = {}

GENERATIONS = {  # what a device's kind starts with, the longer first
  "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e", "TPU v4": "v4", "TPU7": "v7",
  "NVIDIA H100": "hopper", "NVIDIA H200": "hopper", "NVIDIA GH200": "hopper",
}
VMEM_MIB = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "v7": 64}  # on-chip memory of a TPU core, as Pallas knows it


def generation() -> str:
  """Name of the device generation that is computed for, such as ``hopper`` or ``v5e``; else the device's own kind."""
  kind = dispatch.device_kind()
  return next((name for start, name in GENERATIONS.items() if kind.startswith(start)), kind)


def vmem_bytes(device: str) -> int:
  """What a TPU kernel may use of the on-chip memory: half of it, the rest is the compiler's."""
  return VMEM_MIB.get(device, 32) * 2**19 if device != "v4" else 16 * 2**20


def polar(platform: str, itemsize: int, head_dim: int, length: int) -> Tiles:
  """Tiles of polar attention on the device that is computed for.

  Args:
    platform: ``gpu`` or ``tpu``, whose kernel asks.
    itemsize: bytes of an element of q, k and v.
    head_dim: D.
    length: T.
  """
  device = generation()
  found = lookup(POLAR, device, itemsize, head_dim, length)
  if found is not None:
    return found
  return POLAR["hopper", itemsize, head_dim] if platform == "gpu" else _tpu_tiles(device, itemsize)


def delta(itemsize: int, head_dim: int, length: int) -> Carry:
  """What a program of the gated delta carries; see `polar`."""
  device = generation()
  found = lookup(DELTA, device, itemsize, head_dim, length)
  heads = 8 if VMEM_MIB.get(device, 32) >= 32 else 2
  return found or (Carry(heads=heads) if itemsize == 2 else Carry(columns=32, stages=1, heads=heads))


def lookup(table: Mapping[tuple[Any, ...], Any], device: str, itemsize: int, head_dim: int, length: int) -> Any:
  """The entry of this length, else of any length, else None."""
  key = device, itemsize, head_dim
  return table.get((*key, bucket(length))) or table.get(key)


def bucket(length: int) -> int:
  """The power of two at or above a length."""
  return 1 << (length - 1).bit_length()


def _tpu_tiles(device: str, itemsize: int) -> Tiles:
  """The largest tile whose scores, three or four arrays of (rows, keys) float32, leave half of the memory free.

  1024 x 512 keeps the matrix unit busy for thousands of cycles a step; more only adds masked pairs at the diagonal.
  """
  rows, keys = (1024, 512) if itemsize == 2 else (512, 512)
  while 6 * rows * keys * 4 > vmem_bytes(device):
    rows, keys = (rows // 2, keys) if rows > keys else (rows, keys // 2)
  return Tiles(*(Tile(rows, keys),) * 3)

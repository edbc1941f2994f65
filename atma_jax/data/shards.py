"""Token shards: ``.bin`` files of a 256 x int32 header and the tokens, memory-mapped.

The header words are the magic number 20240520, version 1, the number of tokens, the bytes per token (2 or 4; 0 means 2), then
zeros. Tokens are little-endian unsigned integers. The nanoGPT speed runs use the same format, so their shards (FineWeb, GPT-2
tokens) can be used as they are.

In the shards of conversations the highest bit of the 32 of a token, `MASKED`, says that the token is read but not predicted: it
adds nothing to the loss. Read as int32, such a token is negative; `split_mask` takes the bit off.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import os
import pathlib
from typing import Any, BinaryIO

from jaxtyping import Int, UInt
import numpy as np

from atma_jax.data.files import write_atomically
from atma_jax.errors import UserError
from atma_jax.json_input import check_regular

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MASKED = 1 << 31
_checked: dict[tuple[str, str], tuple[int, ...]] = {}  # path and digest -> identity of the file that had it, in this process
_DTYPES = {0: np.dtype("<u2"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclasses.dataclass(frozen=True)
class Shard:
  """The first tokens of one ``.bin`` file.

  Attributes:
    path: of the file.
    tokens: how many of its tokens are used.
    dtype: of a token in the file.
    sha256: of the file; None if it is not known.
  """

  path: str
  tokens: int
  dtype: np.dtype
  sha256: str | None = None

  def open(self) -> UInt[np.ndarray, " S"]:
    """Returns a read-only memory map of the tokens, (S,).

    The first time in a process, the whole file is read and its digest is compared (1.4 GB/s on one core, once it is in
    memory).

    Raises:
      UserError: the file has another digest.
    """
    if self.tokens == 0:
      return np.zeros(0, self.dtype)
    if _checked.get((self.path, self.sha256 or "")) != _identity(self.path):
      self.check()
    return np.memmap(self.path, self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.tokens,))

  def check(self) -> int:
    """Compares the digest of the file, if it is known; returns how many bytes were read.

    Raises:
      UserError: the file has another digest, or cannot be read.
    """
    if self.sha256 is None:
      return 0
    identity = _identity(self.path)
    if file_digest(self.path) != self.sha256:
      raise UserError(f"{self.path} is damaged, its digest is not the one recorded when the data was prepared: prepare "
                      "the data again")
    _checked[self.path, self.sha256] = identity
    return identity[0]


def _identity(path: str) -> tuple[int, ...]:
  """Size, time of change and number of a file."""
  try:
    found = os.stat(path)
  except OSError as error:
    raise UserError(f"cannot read token shard {path}: {error.strerror or error}") from error
  return found.st_size, found.st_mtime_ns, found.st_ino


def file_digest(path: str | os.PathLike) -> str:
  """sha256 of a file. Raises `UserError` if it cannot be read."""
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"cannot read token shard {path}: {error.strerror or error}") from error


def token_dtype(vocab_size: int, masked: bool = False) -> np.dtype:
  """Returns the narrowest token type that holds `vocab_size` ids, and `MASKED` if some of them are `masked`."""
  return _DTYPES[2] if vocab_size <= 1 << 16 and not masked else _DTYPES[4]


def split_mask(tokens: Any) -> tuple[Any, Any]:
  """Returns int32 tokens, of NumPy or JAX, without `MASKED`, and whether each of them counts in the loss."""
  return tokens & (MASKED - 1), tokens >= 0


def write_shard(path: pathlib.Path, tokens: Sequence[np.ndarray] | np.ndarray, dtype: np.dtype) -> int:
  """Writes one shard atomically.

  Args:
    path: of the file.
    tokens: (S,) integers, or several such arrays that are joined in order.
    dtype: of a token in the file, see `token_dtype`.

  Returns:
    The number of tokens written.
  """
  parts = [tokens] if isinstance(tokens, np.ndarray) else tokens
  header = np.zeros(HEADER_WORDS, "<i4")
  header[:4] = MAGIC, VERSION, sum(len(part) for part in parts), dtype.itemsize

  def write(file: BinaryIO) -> None:
    file.write(header.tobytes())
    for part in parts:
      file.write(np.ascontiguousarray(part, dtype).tobytes())

  write_atomically(path, write)
  return int(header[2])


def open_shard(path: str | os.PathLike) -> Shard:
  """Checks a shard's header and size. Raises `UserError` for a file that is missing, truncated or of another format."""
  check_regular(path)
  try:
    with open(path, "rb") as file:
      head, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
  except OSError as error:
    raise UserError(f"cannot read token shard {path}: {error.strerror or error}") from error
  tokens, dtype = read_header(head, size, str(path))
  return Shard(str(path), tokens, dtype)


def read_header(head: bytes, size: int | None, name: str) -> tuple[int, np.dtype]:
  """Checks the header of a shard.

  Args:
    head: the first `HEADER_BYTES` of the file.
    size: of the file in bytes; None if it is not known.
    name: of the file, for error messages.

  Returns:
    The number of tokens, and the type of one.

  Raises:
    UserError: the file is truncated or of another format.
  """
  header = np.frombuffer(head.ljust(HEADER_BYTES, b"\0"), "<i4")
  if header[0] != MAGIC:
    raise UserError(f"{name} is not a token shard: the first int32 must be {MAGIC}")
  if header[1] != VERSION:
    raise UserError(f"{name}: token shard version {header[1]} is not supported; legal: {VERSION}")
  if int(header[3]) not in _DTYPES:
    raise UserError(f"{name}: {header[3]} bytes per token; legal: 2, 4 and 0 (meaning 2)")
  dtype, tokens = _DTYPES[int(header[3])], int(header[2])
  expected = HEADER_BYTES + tokens * dtype.itemsize
  if tokens < 0 or size not in (None, expected):
    raise UserError(f"{name} is truncated or damaged: {size} bytes where its header of {tokens} tokens says {expected}")
  return tokens, dtype


class TokenStream:
  """The tokens of several shards joined in order, read as int32 by position.

  Memory maps are opened on first use and dropped when the stream is pickled, so a worker process receives only paths.

  Attributes:
    shards: in order.
  """

  def __init__(self, shards: Sequence[Shard]):
    self.shards = tuple(shards)
    self._starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)])
    self._maps: dict[int, np.ndarray] = {}

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_maps": {}}

  def read(self, start: int, stop: int) -> Int[np.ndarray, " S"]:
    """Returns the tokens [start, stop), (S,) int32. Positions past the end wrap around to the stream's start."""
    out = np.empty(stop - start, np.int32)
    filled = 0
    while filled < len(out):
      position = (start + filled) % len(self)
      index = int(np.searchsorted(self._starts, position, side="right")) - 1
      offset = position - int(self._starts[index])
      take = min(len(out) - filled, self.shards[index].tokens - offset)
      out[filled:filled + take] = self._map(index)[offset:offset + take]
      filled += take
    return out

  def _map(self, index: int) -> np.ndarray:
    if index not in self._maps:
      self._maps[index] = self.shards[index].open()
    return self._maps[index]

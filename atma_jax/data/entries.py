"""Tables of the documents that a scan has found: 28 bytes a document, so that tens of millions of them fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import struct
import typing
from typing import Any

from jaxtyping import Bool, Int, UInt
import numpy as np

from atma_jax.data.documents import Entry
from atma_jax.errors import UserError

_RECORD = struct.Struct("<II16sI")  # of an entry: file, row, digest, size
_DTYPE = np.dtype([("file", "<u4"), ("row", "<u4"), ("digest", "V16"), ("size", "<u4")])
_HALVES = np.dtype([("file", "<u4"), ("row", "<u4"), ("high", ">u8"), ("low", ">u8"), ("size", "<u4")])
_AT_ONCE = 1 << 12  # entries turned into Python objects at a time


class EntryTable(Sequence[Entry]):
  """Entries in the source's order, in one array.

  Attributes:
    records: (n,) with the fields of `Entry`.
  """

  def __init__(self, records: np.ndarray):
    self.records = records

  @classmethod
  def of(cls, entries: Iterable[Entry]) -> EntryTable:
    """Packs entries. Raises `UserError` for a file with more rows than a table can number."""
    packed = bytearray()
    try:
      for entry in entries:
        packed += _RECORD.pack(*entry)
    except struct.error as error:
      raise UserError(f"a file has more than {1 << 32:,} rows, or a row more than 4 GiB: split the file") from error
    return cls(np.frombuffer(packed, _DTYPE))

  @classmethod
  def join(cls, tables: Iterable[EntryTable]) -> EntryTable:
    """Puts tables one after the other; needs no more memory than the result and one of them."""
    packed = bytearray()
    for table in tables:
      packed += table.records.tobytes()
    return cls(np.frombuffer(packed, _DTYPE))

  def __len__(self) -> int:
    return len(self.records)

  def __iter__(self) -> Iterator[Entry]:
    for first in range(0, len(self), _AT_ONCE):
      for values in self.records[first:first + _AT_ONCE].tolist():
        yield Entry(*values)

  @typing.overload
  def __getitem__(self, index: int) -> Entry: ...
  @typing.overload
  def __getitem__(self, index: slice) -> EntryTable: ...
  def __getitem__(self, index: int | slice) -> Entry | EntryTable:
    if isinstance(index, slice):
      return EntryTable(self.records[index])
    return Entry(*self.records[index].tolist())

  def __reduce__(self) -> tuple[Any, ...]:
    return EntryTable, (self.records,)

  def where(self, wanted: Bool[np.ndarray, " n"] | Int[np.ndarray, " m"]) -> EntryTable:
    """The entries at these places, or those for which a mask is true."""
    return EntryTable(self.records[wanted])

  @property
  def sizes(self) -> UInt[np.ndarray, " n"]:
    """Bytes of every document."""
    return self.records["size"].astype(np.uint64)

  @property
  def total_size(self) -> int:
    """Bytes of all documents."""
    return int(self.records["size"].sum(dtype=np.uint64))

  def keys(self) -> tuple[UInt[np.ndarray, " n"], UInt[np.ndarray, " n"]]:
    """The digests as two numbers, of which the first decides their order."""
    halves = self.records.view(_HALVES)
    return halves["high"].astype(np.uint64), halves["low"].astype(np.uint64)

  def by_digest(self) -> Int[np.ndarray, " n"]:
    """The places of the entries in the order of their digests; equal ones stay in order."""
    high, low = self.keys()
    return np.lexsort((low, high))

  def largest_first(self) -> Int[np.ndarray, " n"]:
    """The places of the entries by size, the largest first, and by digest where sizes are equal."""
    high, low = self.keys()
    return np.lexsort((low, high, -self.records["size"].astype(np.int64)))

  def repeated(self, earlier: Sequence[EntryTable]) -> Bool[np.ndarray, " n"]:
    """Which entries have the digest of one before them, here or in the `earlier` tables."""
    high, low = (np.concatenate(parts) for parts in zip(*(table.keys() for table in (*earlier, self))))
    order = np.lexsort((low, high))
    same = np.zeros(len(order), bool)
    for half in (high, low):  # each in the order of the digests, where equal ones follow one another
      ordered = half[order]
      equal = ordered[1:] == ordered[:-1]
      same[1:] = equal if half is high else same[1:] & equal
    repeated = np.zeros(len(order), bool)
    repeated[order] = same
    return repeated[len(order) - len(self):]

  def fingerprint_pieces(self) -> Iterator[bytes]:
    """The digest and the size of every document, 24 bytes each, in pieces."""
    for first in range(0, len(self), _AT_ONCE):
      records = self.records[first:first + _AT_ONCE]
      packed = np.empty(len(records), [("digest", "V16"), ("size", "<u8")])
      packed["digest"], packed["size"] = records["digest"], records["size"]
      yield packed.tobytes()

  def by_file(self) -> Iterator[tuple[int, EntryTable]]:
    """The entries of every file together, with the index of the file."""
    bounds = np.flatnonzero(np.diff(self.records["file"])) + 1
    starts = [0, *bounds.tolist()] if len(self) else []
    for start, stop in zip(starts, [*starts[1:], len(self)]):
      yield int(self.records["file"][start]), EntryTable(self.records[start:stop])


class EachAlone(Sequence[Sequence[Entry]]):
  """Groups of one entry each, made when they are looked at.

  Attributes:
    table: the entries.
  """

  def __init__(self, table: EntryTable):
    self.table = table

  def __len__(self) -> int:
    return len(self.table)

  def __iter__(self) -> Iterator[Sequence[Entry]]:
    return ([entry] for entry in self.table)

  @typing.overload
  def __getitem__(self, index: int) -> Sequence[Entry]: ...
  @typing.overload
  def __getitem__(self, index: slice) -> EachAlone: ...
  def __getitem__(self, index: int | slice) -> Sequence[Entry] | EachAlone:
    return EachAlone(self.table[index]) if isinstance(index, slice) else [self.table[index]]


def total_size(groups: Sequence[Sequence[Entry]]) -> int:
  """Bytes of text in groups of documents."""
  if isinstance(groups, EachAlone):
    return groups.table.total_size
  return sum(entry.size for group in groups for entry in group)


def flattened(groups: Sequence[Sequence[Entry]]) -> EntryTable:
  """The entries of all groups, one after the other."""
  return groups.table if isinstance(groups, EachAlone) else EntryTable.of(entry for group in groups for entry in group)

"""Documents in files: plain text, JSON lines and Parquet, compressed or not.

Documents come in a fixed order: files sorted by name, rows as they stand. A row is named FILE:N, with N counted from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
from typing import Any, NamedTuple
import zlib

import pyarrow
import pyarrow.parquet
import zstandard

from atma_jax.data.remote import file_name, is_remote_path, open_remote
from atma_jax.errors import UserError, described
from atma_jax.json_input import check_regular

LEGAL_FILES = "UTF-8 text files, and .jsonl or .parquet rows with a string in field 'text'"
_TEXT_FIELD = "text"
_PARQUET_ROWS = 256  # decoded at a time
_MOST_BYTES = 2 << 30  # of a document or a row: a compressed file of a megabyte may hold a terabyte


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """One file of a source.

  Attributes:
    path: where the file is: a path, or an address such as ``gs://BUCKET/FILE``.
    name: what its documents are called in manifests and error messages.
    remote_size: bytes of a file behind an address; None if not known.
    row_group: the only row group wanted of a Parquet file, from 0; None wants all of it.
    group_size: bytes of text in that row group.
    column: the field or column that holds the text of a row.
  """

  path: str
  name: str
  remote_size: int | None = None
  row_group: int | None = None
  group_size: int | None = None
  column: str = _TEXT_FIELD

  @property
  def size(self) -> int:
    """Bytes to read; 0 for a missing file, about which `read_documents` complains."""
    if self.group_size is not None or self.remote_size is not None:
      return self.group_size or self.remote_size or 0
    return os.path.getsize(self.path) if os.path.exists(self.path) else 0


@dataclasses.dataclass(frozen=True)
class Document:
  """One document, or the reason why it could not be read.

  Attributes:
    name: of the document, for manifests and error messages.
    row: position within its file, from 0.
    text: the document, or None if it could not be read.
    problem: why it could not be read; "" otherwise.
  """

  name: str
  row: int
  text: str | None
  problem: str = ""


CheckValue = Callable[[str, int, Any, str], Document]  # name, row, value and column, see `read_documents`


class Entry(NamedTuple):
  """A distinct document found by a scan of its source. Entries sort in the source's order.

  Attributes:
    file: index of the document's file in the source.
    row: position within the file.
    digest: hash of the text, by which equal documents are recognised and samples are drawn.
    size: bytes of UTF-8.
  """

  file: int
  row: int
  digest: bytes
  size: int


def read_documents(file: SourceFile, rows: Collection[int] | None = None, *,
                   check: CheckValue | None = None) -> Iterator[Document]:
  """Reads the documents of one file in order.

  The suffix decides the format: ``.jsonl`` and ``.parquet`` hold one document per row in a field, "text" unless the file says
  otherwise; any other file is a single document of UTF-8 text. Text and JSON lines may be compressed (``.gz``, ``.zst``).

  Args:
    file: the file to read.
    rows: the rows wanted; None reads all of them.
    check: makes a document of a row's name, number, value and column; None takes the value for its text.

  Yields:
    The documents. One that cannot be read has a `problem` and no text; after damage to the file itself it is the last.

  Raises:
    UserError: the file is a FIFO, a socket or a device; or it is behind an address where nobody may read it.
    RunError: the server of an address does not answer.
  """
  if not is_remote_path(file.path):
    check_regular(file.path)
  suffixes = pathlib.PurePath(file_name(file.path)).suffixes
  compression = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
  readers = {".jsonl": _json_rows, ".parquet": _parquet_rows}
  read = readers[suffixes[-1]] if suffixes and suffixes[-1] in readers else _whole_text
  wanted = None if rows is None else _marked(rows)
  row = -1
  try:
    for row, parse in enumerate(read(file, compression, check or _checked)):
      if wanted is None or (row < len(wanted) and wanted[row]):
        yield parse(row)
  except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, _TooLarge) as error:
    yield Document(file.name, row + 1, None, described(error))


def _marked(rows: Collection[int]) -> bytearray:
  """One byte for every row up to the last one wanted, which is 1 where the row is."""
  marked = bytearray(max(rows, default=-1) + 1)
  for row in rows:
    marked[row] = 1
  return marked


class _TooLarge(Exception):
  """A document has more than `_MOST_BYTES`."""

  def __str__(self) -> str:
    return f"more than {_MOST_BYTES >> 20} MiB without an end"


# The readers below yield one function per row, so that rows which nobody wants are never parsed.


def _whole_text(file: SourceFile, compression: str, check: CheckValue) -> Iterator[Callable[[int], Document]]:
  del check  # there are no rows
  with _open(file, compression) as stream:
    content = stream.read(_MOST_BYTES + 1)
  if len(content) > _MOST_BYTES:
    raise _TooLarge
  yield lambda row: text_document(file.name, row, content)


def _json_rows(file: SourceFile, compression: str, check: CheckValue) -> Iterator[Callable[[int], Document]]:
  with _open(file, compression) as stream:
    while line := stream.readline(_MOST_BYTES + 1):
      if len(line) > _MOST_BYTES:
        raise _TooLarge
      yield lambda row, line=line: _json_document(f"{file.name}:{row + 1}", row, line, file.column, check)


def _parquet_rows(file: SourceFile, compression: str, check: CheckValue) -> Iterator[Callable[[int], Document]]:
  del compression  # Parquet has its own
  with open_parquet(file) as table:
    if file.column not in table.schema_arrow.names:
      raise UserError(f"{file.path} has no column {file.column!r}; its columns: {', '.join(table.schema_arrow.names)}")
    groups = range(table.num_row_groups) if file.row_group is None else [file.row_group]
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[file.column], row_groups=groups):
      for value in batch.column(0):
        yield lambda row, value=value: _parquet_document(f"{file.name}:{row + 1}", row, value, file.column, check)


def open_parquet(file: SourceFile) -> pyarrow.parquet.ParquetFile:
  """Opens a Parquet file; the description at the end of a remote one is fetched once in a process."""
  if not is_remote_path(file.path):
    return pyarrow.parquet.ParquetFile(file.path)
  stream = open_remote(file.path, file.remote_size)
  return pyarrow.parquet.ParquetFile(stream, metadata=parquet_metadata(file.path, file.remote_size))


@functools.lru_cache(maxsize=8)
def parquet_metadata(path: str, size: int | None) -> pyarrow.parquet.FileMetaData:
  """The description at the end of a Parquet file behind an address, of `size` bytes if that is known."""
  with open_remote(path, size) as stream:
    return pyarrow.parquet.read_metadata(stream)


def _open(file: SourceFile, compression: str) -> io.BufferedIOBase:
  if not is_remote_path(file.path):
    return _unpacked(file.path, compression) or open(file.path, "rb")
  stream = open_remote(file.path, file.remote_size)
  return _unpacked(stream, compression) or stream


def _unpacked(source: str | io.BufferedReader, compression: str) -> io.BufferedIOBase | None:
  match compression:
    case ".gz":
      return gzip.open(source, "rb")
    case ".zst":
      return io.BufferedReader(zstandard.open(source, "rb"), 1 << 20)
  return None


def text_document(name: str, row: int, content: bytes) -> Document:
  """A document of these bytes, which must be UTF-8."""
  try:
    return Document(name, row, content.decode())
  except UnicodeDecodeError as error:
    return Document(name, row, None, f"not UTF-8 at byte {error.start}")


def _parquet_document(name: str, row: int, value: pyarrow.Scalar, column: str, check: CheckValue) -> Document:
  try:  # a null is a row without text
    return check(name, row, value.as_py(), column) if value.is_valid else Document(name, row, "")
  except UnicodeDecodeError as error:
    return Document(name, row, None, f"not UTF-8 at byte {error.start} of field {column!r}")


def _json_document(name: str, row: int, line: bytes, column: str, check: CheckValue) -> Document:
  if line.isspace():
    return Document(name, row, "")
  try:
    value = json.loads(line)
  except UnicodeDecodeError as error:
    return Document(name, row, None, f"not UTF-8 at byte {error.start} of the line")
  except json.JSONDecodeError as error:
    return Document(name, row, None, f"not JSON: {error.msg}, character {error.pos + 1}")
  except RecursionError:
    return Document(name, row, None, "not JSON that can be read: lists and objects too deep inside each other")
  except ValueError:
    return Document(name, row, None, "not JSON that can be read: a whole number of thousands of digits")
  if not isinstance(value, dict) or column not in value:
    found = "fields: " + ", ".join(value)[:200] if isinstance(value, dict) else f"a {type(value).__name__}, not an object"
    return Document(name, row, None, f"no field {column!r} ({found})")
  return check(name, row, value[column], column)


def _checked(name: str, row: int, text: object, column: str) -> Document:
  """A document of the value found in a row's text field, which must be a string that UTF-8 can encode."""
  if not isinstance(text, str):
    return Document(name, row, None, f"field {column!r} is not a string but a {type(text).__name__}")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    return Document(name, row, None, f"not Unicode: a lone surrogate at character {error.start}")
  return Document(name, row, text)

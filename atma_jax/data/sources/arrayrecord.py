"""The ``arrayrecord:GLOB`` source: ArrayRecord files, each record one document.

A record must be the text of a document in UTF-8, as ``ArrayRecordWriter(path, "group_size:1").write(text.encode())`` writes it;
serialised protocol buffers such as tf.train.Example are not read. Large files are cut into ranges of records, which the worker
processes read apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
import contextlib
import dataclasses
import os

from array_record.python.array_record_module import ArrayRecordReader

from atma_jax.data.documents import Document, SourceFile, text_document
from atma_jax.data.remote import is_remote_path
from atma_jax.data.source import TextSource
from atma_jax.errors import UserError, described

_RANGE = 4096  # records that a worker reads at a time
_AT_ONCE = 64  # records in memory at a time
_MARGIN = 1.25  # what is scanned where text is limited, for evaluation documents and repetitions
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecordSource(TextSource):
  """The records of ArrayRecord files on this machine, in the order of the files' names."""

  prefix = "arrayrecord"
  syntax = "arrayrecord:GLOB"
  help = "ArrayRecord files, a record of UTF-8 text for each document"

  def __post_init__(self) -> None:
    if is_remote_path(self.argument):
      raise ValueError("must be a pattern on this machine (or a mounted bucket): the array_record library reads no addresses")

  def files(self) -> list[SourceFile]:
    if folders := [path for path in self.glob() if os.path.isdir(path)]:
      raise UserError(f"{self.label} matches {folders[0]}, which is a folder: end the pattern with /*.array_record")
    return [SourceFile(path, path) for path in self.glob()]

  def choose(self, files: list[SourceFile], most_bytes: int | None) -> list[SourceFile]:
    """Cuts files into ranges of records, and stops when these hold the text asked for and something to choose from."""
    chosen, total = [], 0.0
    for file in files:
      with self._open(file) as reader:
        count = reader.num_records()
      for index in range(-(-count // _RANGE)):
        if most_bytes is not None and total >= _MARGIN * most_bytes:
          return chosen
        size = file.size * min(_RANGE, count - index * _RANGE) / count
        chosen.append(dataclasses.replace(file, row_group=index, group_size=max(1, int(size))))
        total += size
    return chosen

  def read(self, file: SourceFile, rows: Collection[int] | None = None) -> Iterator[Document]:
    """Reads the documents of one range of a file; the row of a document is its record, from 0, in that range."""
    begin = (file.row_group or 0) * _RANGE
    with self._open(file) as reader:
      end = min(begin + _RANGE, reader.num_records())
      wanted = range(end - begin) if rows is None else sorted(rows)
      for first in range(0, len(wanted), _AT_ONCE):
        some = wanted[first:first + _AT_ONCE]
        try:
          records = reader.read([begin + row for row in some])
        except (RuntimeError, IndexError, ValueError) as error:
          yield Document(file.name, some[0], None, f"damaged: {described(error)}")
          return
        for row, record in zip(some, records):
          yield text_document(f"{file.name}:{begin + row + 1}", row, record)

  @contextlib.contextmanager
  def _open(self, file: SourceFile) -> Iterator[ArrayRecordReader]:
    reader = ArrayRecordReader(file.path, _RANDOM_ACCESS)
    try:
      if not reader.ok():  # it would say that there are no records
        raise UserError(f"{self.label}: {file.name} is no ArrayRecord file, or damaged")
      yield reader
    finally:
      with contextlib.suppress(RuntimeError):  # it repeats what was wrong with the file
        reader.close()


SOURCE = ArrayRecordSource

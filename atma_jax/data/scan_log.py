"""What a scan of remote files has found so far, kept on the disk, so that a run that was killed does not fetch it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import BinaryIO

from atma_jax.data.documents import Entry, SourceFile
from atma_jax.data.entries import EntryTable
from atma_jax.errors import UserError

ScanResult = tuple[EntryTable, list[str], int]  # see `atma_jax.data.corpus.scan_files`


class ScanLog:
  """The files of one source, and after each other what was found in every portion of them.

  A line is a digest and JSON. A kill leaves the last one torn, at most; what follows a line that is not whole is dropped.

  Args:
    folder: of the logs.
    key: what decides which files are scanned.
  """

  def __init__(self, folder: pathlib.Path, key: Sequence[object]):
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    self._path = folder / f"{name}.scan"
    self._file: BinaryIO | None = None

  def files(self) -> list[SourceFile] | None:
    """Returns the files that a scan has begun with; None if there was none."""
    if not self._path.exists():
      return None
    with open(self._path, "rb") as file:
      values = _parse(file.readline())
    return None if values is None else [SourceFile(*fields) for fields in values]

  def begin(self, files: Sequence[SourceFile]) -> None:
    """Starts a new log, of a scan of these files."""
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._path.write_bytes(b"")
    except OSError as error:
      raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error
    self._append([dataclasses.astuple(file) for file in files])

  def results(self) -> Iterator[ScanResult]:
    """Yields what was found in the portions that are done, in order, and drops what follows the last whole line."""
    end = 0
    with open(self._path, "r+b") as file:
      for number, line in enumerate(file):
        values = _parse(line)
        if values is None:
          break
        end += len(line)
        if number:
          entries, problems, skipped = values
          yield EntryTable.of(Entry(i, row, bytes.fromhex(digest), size) for i, row, digest, size in entries), problems, skipped
      file.truncate(end)

  def add(self, result: ScanResult) -> None:
    """Appends what was found in the next portion."""
    entries, problems, skipped = result
    self._append([[(entry.file, entry.row, entry.digest.hex(), entry.size) for entry in entries], problems, skipped])

  def remove(self) -> None:
    """Removes the log."""
    self.close()
    self._path.unlink(missing_ok=True)

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def _append(self, values: object) -> None:
    content = json.dumps(values, separators=(",", ":")).encode()
    try:
      if self._file is None:
        self._file = open(self._path, "ab")  # `close` closes it  # noqa: SIM115
      self._file.write(_digest(content) + b" " + content + b"\n")
      self._file.flush()
    except OSError as error:
      raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error


def _digest(content: bytes) -> bytes:
  return hashlib.sha256(content).hexdigest()[:16].encode()


def _parse(line: bytes) -> list | None:
  digest, _, content = line.removesuffix(b"\n").partition(b" ")
  return json.loads(content) if line.endswith(b"\n") and digest == _digest(content) else None

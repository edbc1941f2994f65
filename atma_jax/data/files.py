"""Atomic writes, after which a file that exists under its final name is complete, and locks on folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import json
import os
import pathlib
from typing import Any, BinaryIO

from atma_jax.errors import UserError


def write_atomically(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
  """Writes a file under a temporary name beside `path`, syncs it and renames it to `path`.

  A kill at any moment leaves the old file or the new one, never a part of it.

  Args:
    path: of the file; missing folders are created.
    write: called with the open temporary file.

  Raises:
    UserError: the disk is full or the folder is read-only. Nothing is left behind.
  """
  temporary = path.with_name(path.name + ".tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as JSON, atomically. Equal values yield equal bytes."""
  text = json.dumps(value, indent=1, sort_keys=True) + "\n"
  write_atomically(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def exclusive(directory: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a folder, which is created if missing. The system releases it when the process ends, however it ends.

  Raises:
    UserError: another process holds the lock, or the folder cannot be written.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)
  except OSError as error:
    raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f"{directory} is being prepared by another process: wait for it, or name another") from error
    yield
  finally:
    os.close(lock)

"""Atomic files: what exists under its final name is whole."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import json
import os
import pathlib
from typing import Any, BinaryIO

from atma_jax.errors import UserError


def write_atomically(path: pathlib.Path, write: Callable[[BinaryIO], None]) -> None:
  """Calls `write` on a temporary file beside `path`, syncs it and renames it to `path`.

  A kill at any moment leaves the old file or the new one, never a part. A full disk or a read-only folder raises
  `UserError` and leaves nothing behind.
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
  """Writes `value` as JSON, atomically. Equal values give equal bytes."""
  text = json.dumps(value, indent=1, sort_keys=True) + "\n"
  write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: pathlib.Path) -> Any:
  """Reads JSON; a file that cannot be read or parsed raises `UserError` naming it."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}") from error
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON: {error}") from error

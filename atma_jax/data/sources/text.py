"""The ``text:GLOB`` source: files, or whole folders, of text, JSON lines and Parquet."""

from __future__ import annotations

import os
import pathlib

from atma_jax.data.documents import SourceFile
from atma_jax.data.remote import check_scheme, is_remote_path
from atma_jax.data.source import TextSource
from atma_jax.errors import UserError


class GlobSource(TextSource):
  """Every file that the pattern matches, and every file below a folder that it matches except hidden ones."""

  prefix = "text"
  syntax = "text:GLOB"
  help = "text, .jsonl and .parquet files; also gs://, s3:// and https://"

  def __post_init__(self) -> None:
    if is_remote_path(self.argument):
      check_scheme(self.argument)

  def files(self) -> list[SourceFile]:
    if is_remote_path(self.argument):
      return self.find()
    files = []
    for path in self.glob():
      if not os.path.isdir(path):
        files.append(path)
      else:
        inside = (p for p in pathlib.Path(path).rglob("*") if p.is_file())
        files += [str(p) for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
      raise UserError(f"config.data.sources: {self.entry!r} matches no file (only empty folders)")
    return [SourceFile(path, path) for path in sorted(set(files))]


SOURCE = GlobSource

"""The ``folders:GLOB`` source: that of ``text:GLOB``, with whole folders held out."""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib

from atma_jax.data.documents import SourceFile
from atma_jax.data.remote import is_remote_path
from atma_jax.data.sources.text import GlobSource
from atma_jax.errors import UserError


class FolderSource(GlobSource):
  """The files of `GlobSource`, each a training document; a held-out document is a folder that the pattern matches, its files one
  after the other."""

  prefix = "folders"
  syntax = "folders:GLOB"
  help = "the files of folders, whole folders held out"

  def __post_init__(self) -> None:
    if is_remote_path(self.argument):
      raise ValueError("must be a pattern on this machine: no folder behind an address is held out")

  def files(self) -> list[SourceFile]:
    if loose := [path for path in self.glob() if not os.path.isdir(path)]:
      raise UserError(f"config.data.sources: {self.entry!r} matches {loose[0]}, which is no folder: end the pattern with /")
    return super().files()

  def folders(self, files: Sequence[SourceFile]) -> list[str]:
    """The matched folder of each file, the outermost one if such folders contain each other."""
    roots = set(map(pathlib.Path, self.glob()))
    return [str([path for path in pathlib.Path(file.path).parents if path in roots][-1]) for file in files]


SOURCE = FolderSource

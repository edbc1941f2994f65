"""The ``python-library`` source: the standard library of the running Python, a few hundred files that are read in a second."""

from __future__ import annotations

from atma_jax.data.documents import SourceFile
from atma_jax.data.sources.python_source import PythonSource

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3"}  # folders of tests and tools


class LibrarySource(PythonSource):
  """The files of `PythonSource` that belong to the standard library, without its tests."""

  prefix = "python-library"
  syntax = "python-library"
  help = "the .py files of Python's standard library"

  def files(self) -> list[SourceFile]:
    return [file for file in self.installed(("stdlib",)) if _LEFT_OUT.isdisjoint(file.name.split("/"))]


SOURCE = LibrarySource

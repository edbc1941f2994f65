"""The ``python-packages`` source: that of ``python-source``, with whole packages held out."""

from __future__ import annotations

from collections.abc import Sequence

from atma_jax.data.documents import SourceFile
from atma_jax.data.sources.python_source import PythonSource


class PackageSource(PythonSource):
  """The files of `PythonSource`, each a training document; a held-out document is a package, its files one after the other."""

  prefix = "python-packages"
  syntax = "python-packages"
  help = "the .py files of this Python installation, whole packages held out"

  def folders(self, files: Sequence[SourceFile]) -> list[str]:
    """The package of each file, such as site-packages/rich; modules that lie in no package form one together."""
    return ["/".join(file.name.split("/")[:2]) if file.name.count("/") > 1 else file.name.partition("/")[0] for file in files]

  def join(self, texts: Sequence[str]) -> str:
    """The files without the comments that they begin with, which are licences as a rule, the same in every file."""
    return "\n".join(map(_without_header, texts))


def _without_header(code: str) -> str:
  lines = code.split("\n")
  first = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), len(lines))
  return "\n".join(lines[first:])


SOURCE = PackageSource

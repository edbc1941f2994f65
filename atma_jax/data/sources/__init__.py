"""Sources of training data, found by name: an entry PREFIX:ARGUMENT of ``config.data.sources`` is read by the `SOURCE` of
``PREFIX.py`` in this folder.

To add a source, add a file; `atma_jax.data.source` says what it defines. A source of a notebook or a test is added with
`register`.
"""

from __future__ import annotations

from collections.abc import Iterable
import importlib
import pkgutil

from atma_jax.data.source import Source
from atma_jax.errors import UserError

_REGISTERED: dict[str, type[Source]] = {}


def register(source: type[Source]) -> None:
  """Adds a source that has no file in this folder; a later one of the same prefix replaces it.

  Worker processes import the module that defines the class, so a class from a notebook needs ``prepare(..., workers=1)``.
  """
  _REGISTERED[source.prefix] = source


def source_types() -> dict[str, type[Source]]:
  """Returns every source class by prefix, in alphabetical order."""
  found = [importlib.import_module(f"{__name__}.{module.name}").SOURCE for module in pkgutil.iter_modules(__path__)]
  return dict(sorted(({source.prefix: source for source in found} | _REGISTERED).items()))


def parse_source(entry: str) -> Source:
  """Returns the source that an entry of ``config.data.sources`` names.

  Raises:
    UserError: no source has this prefix, or its argument is missing or illegal.
  """
  types = source_types()
  prefix, colon, argument = entry.partition(":")
  reason = "is not a source"
  if prefix in types:
    source = types[prefix]
    reason = f"must be written {source.syntax}"
    if bool(argument) == bool(colon) == (":" in source.syntax):
      try:
        return source(argument)
      except ValueError as error:
        reason = str(error)
  legal = ", ".join(f"{source.syntax} ({source.help})" for source in types.values())
  raise UserError(f"config.data.sources: {entry!r} {reason}; legal: {legal}")


def masks(entries: Iterable[str]) -> bool:
  """Whether any of these entries of ``config.data.sources`` has tokens that are read but not predicted."""
  return any(parse_source(entry).masked for entry in entries)

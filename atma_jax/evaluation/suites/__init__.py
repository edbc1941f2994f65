"""Evaluation suites, found by name: ``--suite=NAME`` runs the `SUITE` of ``NAME.py`` in this folder.

To add a suite, add a file: it declares its cells, flags, columns, tables, plots and report sections itself (see
`atma_jax.evaluation.suite.Suite`). A suite of a notebook or a test is added with `register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from atma_jax.errors import UserError, unknown_name

if TYPE_CHECKING:
  from atma_jax.evaluation.suite import Suite

_REGISTERED: dict[str, Suite] = {}


def register(name: str, suite: Suite) -> None:
  """Adds a suite that has no file in this folder; a later one of the same name replaces it."""
  _REGISTERED[name] = suite


def suite_names() -> list[str]:
  """Names of all suites in alphabetical order; imports none of them."""
  return sorted({module.name for module in pkgutil.iter_modules(__path__)} | _REGISTERED.keys())


def check_names(names: tuple[str, ...]) -> None:
  """Raises `UserError` if there are no names, or for the first that is not a suite; imports none."""
  if not names:
    raise UserError(f"--suite=: must be one or more of {', '.join(suite_names())}")
  for name in names:
    if name not in suite_names():
      raise UserError(unknown_name("--suite", name, suite_names()))


def find_suite(name: str) -> Suite:
  """The suite `name`.

  Raises:
    UserError: there is no such suite.
  """
  check_names((name,))
  return _REGISTERED[name] if name in _REGISTERED else importlib.import_module(f"{__name__}.{name}").SUITE


def all_suites() -> dict[str, Suite]:
  """Every suite by name, in the order in which their results are shown."""
  suites = {name: find_suite(name) for name in suite_names()}
  return dict(sorted(suites.items(), key=lambda item: (item[1].order, item[0])))

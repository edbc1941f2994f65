"""What every main shares: strict flags, one-line errors, exit codes.

Exit codes: 0 done, 2 bad input (one line, no traceback), 75 pre-empted after saving.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import re
import sys
import typing

from absl import app, flags, logging
from ml_collections import config_flags

from atma_jax.config import Config, UserError, unknown_name

EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75


def define_config_flag(default: str | None = None) -> flags.FlagHolder:
  """``--config=FILE`` and ``--config.FIELD=VALUE``; the file's ``get_config()`` returns a `Config`."""
  return config_flags.DEFINE_config_file("config", default, "Recipe, e.g. configs/quickstart.py.", lock_config=False)


def run(main: Callable[[], int | None]) -> None:
  """Parses flags, calls `main` and exits with its code; `UserError` and flag errors become one line and exit 2."""

  def guarded(argv: list[str]) -> int:
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}: options start with -- (see --help)")
    return main() or 0

  def guarded_main(argv: list[str]) -> None:
    try:
      code = guarded(argv)
    except UserError as error:
      _bad_input(str(error))
    sys.exit(code)

  app.run(guarded_main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  logging.use_absl_handler()
  logging.set_stderrthreshold("info")
  try:
    return flags.FLAGS(argv)
  except (flags.Error, UserError) as error:
    _bad_input(_explain(error))
  except (KeyError, AttributeError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
    # config_flags raises these for an unknown field, a value of another type and an unreadable recipe.
    _bad_input(_explain(error))


def _bad_input(message: str) -> typing.NoReturn:
  print(f"{flags.FLAGS.find_module_defining_flag('help') and ''}error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(EXIT_BAD_INPUT)


def _explain(error: Exception) -> str:
  return str(error)

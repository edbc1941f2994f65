"""What a main turns into an exit code and one line: bad input, and failures outside the program."""

from __future__ import annotations

from collections.abc import Iterable
import difflib


class UserError(Exception):
  """Bad input, told in one line that names the flag, field or file and what is legal. Mains exit with code 2."""


class RunError(Exception):
  """Something outside the program failed for good (storage, another process), in one line. Mains exit with code 1, on which
  launchers try again."""


def unknown_name(kind: str, name: str, legal: Iterable[str]) -> str:
  """The one line said about a misspelt name: what it was, the nearest legal one, all legal ones."""
  legal = sorted(legal)
  near = difflib.get_close_matches(name, legal, n=1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  return f"{kind} {name!r} does not exist{hint} Legal: {', '.join(legal)}".replace("exist Legal", "exist. Legal")

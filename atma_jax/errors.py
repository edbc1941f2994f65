"""Errors that a main reports in one line, with an exit code of their own: bad input, and failures outside the program."""

from __future__ import annotations

from collections.abc import Iterable
import difflib


class UserError(Exception):
  """Bad input; the one-line message names the flag, field or file and says what is legal. Mains exit with code 2."""


class RunError(Exception):
  """Something outside the program (storage, another process) failed for good; the message is one line.

  Mains exit with code 1, on which launchers try again.
  """


def described(error: BaseException) -> str:
  """The kind and the message of an error that another library raised, in one line of at most 300 characters."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def divides_over_context(length: int, context: int) -> bool:
  """Whether the devices of a context axis can share a sequence: causal attention gives each two chunks, one from either half."""
  return context <= 1 or length % (2 * context) == 0


def unknown_name(kind: str, name: str, legal: Iterable[str]) -> str:
  """The message about a misspelt name, with the nearest legal name and a list of all of them.

  Args:
    kind: what has the name, such as "--suite".
    name: the name that does not exist.
    legal: the names that do.
  """
  legal = sorted(legal)
  near = difflib.get_close_matches(name, legal, n=1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  return f"{kind} {name!r} does not exist{hint} Legal: {', '.join(legal)}".replace("exist Legal", "exist. Legal")

"""Near duplicates of evaluation documents: other versions of the same file that would leak into training."""

from __future__ import annotations

import collections
import hashlib

_SIGNIFICANT_LINE = 20  # characters; shorter lines are the same everywhere
_FEWEST_LINES = 16  # a document of fewer significant lines is compared as a whole
_COVERED_SHARE = 0.5


def text_digest(text: str) -> bytes:
  """Returns a hash of a text without its white space. Documents with equal hashes count as equal."""
  return hashlib.blake2b("".join(text.split()).encode(), digest_size=16).digest()


class EvaluationLines:
  """The lines of the evaluation documents, to recognise texts that equal one of them or contain at least half its lines."""

  def __init__(self) -> None:
    self._short: set[bytes] = set()  # digests of documents with few lines
    self._documents_of: dict[str, list[int]] = {}
    self._totals: list[int] = []  # significant lines of each document

  def add(self, text: str) -> None:
    """Adds one evaluation document."""
    lines = _significant_lines(text)
    if len(lines) < _FEWEST_LINES:
      self._short.add(text_digest(text))
      return
    for line in lines:
      self._documents_of.setdefault(line, []).append(len(self._totals))
    self._totals.append(len(lines))

  def cover(self, text: str) -> bool:
    """Whether `text` repeats at least half of an evaluation document."""
    lines = _significant_lines(text)
    if len(lines) < _FEWEST_LINES and text_digest(text) in self._short:
      return True
    shared = collections.Counter()
    for line in lines & self._documents_of.keys():
      shared.update(self._documents_of[line])
    return any(count >= _COVERED_SHARE * self._totals[index] for index, count in shared.items())


def _significant_lines(text: str) -> set[str]:
  """The distinct lines long enough to tell documents apart, stripped."""
  stripped = (line.strip() for line in text.splitlines())
  return {line for line in stripped if len(line) >= _SIGNIFICANT_LINE}

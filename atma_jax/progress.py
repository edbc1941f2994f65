"""Progress bars that suit where they go: on a terminal redrawn in place, in a log a line now and then."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

LOG_SECONDS = 30


def progress_bar(total: int, unit: str, *, description: str | None = None, scale: bool = True, enabled: bool = True) -> tqdm:
  """A bar on standard error for `total` of `unit`; `scale` writes thousands and millions as k and M."""
  terminal = sys.stderr.isatty()
  seconds = 0.5 if terminal else LOG_SECONDS
  return tqdm(total=total, unit=unit, desc=description, unit_scale=scale, disable=not enabled, mininterval=seconds,
              maxinterval=max(10, seconds), file=sys.stderr if terminal else _Lines(sys.stderr))


class _Lines:
  """Takes what a bar draws over itself and writes it as lines of their own."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if line := text.strip():
      self._stream.write(f"{line}\n")

  def flush(self) -> None:
    self._stream.flush()

"""Progress bars: redrawn in place on a terminal, printed as a line now and then in a log."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from tqdm import tqdm

LOG_SECONDS = 30


def progress_bar(total: int, unit: str, *, description: str | None = None, scale: bool = True, enabled: bool = True) -> tqdm:
  """Makes a progress bar on standard error.

  Args:
    total: the count at which the bar is full.
    unit: what is counted.
    description: shown before the bar.
    scale: write thousands and millions as k and M.
    enabled: if False, nothing is shown.
  """
  terminal = sys.stderr.isatty()
  if terminal and enabled:
    _log_around_bars()
  seconds = 0.5 if terminal else LOG_SECONDS
  return tqdm(total=total, unit=unit, desc=description, unit_scale=scale, disable=not enabled, mininterval=seconds,
              maxinterval=max(10, seconds), file=sys.stderr if terminal else _Lines(sys.stderr))


def _log_around_bars() -> None:
  """Lets what is logged to the terminal take the bars away and draw them again below it.

  `tqdm.contrib.logging` does so for handlers of the standard library; absl's has its stream in a handler inside it.
  """
  for handler in logging.getLogger().handlers:
    handler = getattr(handler, "python_handler", handler)
    if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
      handler.setStream(_AroundBars(sys.stderr))


class _AroundBars:
  """A stream to a terminal that clears the progress bars before it writes, and draws them again."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    with tqdm.external_write_mode(file=self._stream):
      self._stream.write(text)

  def flush(self) -> None:
    self._stream.flush()

  def isatty(self) -> bool:
    return self._stream.isatty()


class _Lines:
  """A stream that writes every redraw of a bar as a line of its own."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if line := text.strip():
      self._stream.write(f"{line}\n")

  def flush(self) -> None:
    self._stream.flush()

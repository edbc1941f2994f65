"""A progress bar writes few whole lines to a log, and makes room for log lines on a terminal."""

from __future__ import annotations

import io
import logging
import sys

from absl import logging as absl_logging
import pytest

from atma_jax.progress import progress_bar


def test_a_log_gets_whole_lines(capsys):
  with progress_bar(4000, "tok", description="loss at 256") as bar:
    for _ in range(4):
      bar.update(1000)  # within LOG_SECONDS of the first line
    bar.set_description("loss at 512")
  lines = capsys.readouterr().err.splitlines(keepends=True)
  assert len(lines) == 3 and all(line.endswith("\n") and "\r" not in line for line in lines)
  assert "0.00/4.00k" in lines[0] and lines[1].startswith("loss at 512: 100%") and "4.00k/4.00k" in lines[2]


def test_none_where_another_process_has_it(capsys):
  with progress_bar(3, " files", enabled=False) as bar:
    bar.update(3)
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["absl", "standard library"])
def test_log_lines_are_whole_beside_a_bar(monkeypatch, kind):
  """On a terminal, a line that is logged while a bar is shown stands alone, and the bar below it."""
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  handler = absl_logging.ABSLHandler(absl_logging.PythonFormatter()) if kind == "absl" else logging.StreamHandler(terminal)
  monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
  with progress_bar(10, " cells", description="loss at 256", scale=False):
    logging.getLogger("somebody").error("the cells are %s", "hot")
  shown = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
  (hot,) = (i for i, line in enumerate(shown) if "the cells are hot" in line)
  assert shown[hot].endswith("the cells are hot") and "loss" not in shown[hot] and "loss at 256" in shown[hot + 1]
  handler.close()

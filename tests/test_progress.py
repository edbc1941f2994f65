"""A progress bar writes few whole lines to a log."""

from __future__ import annotations

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

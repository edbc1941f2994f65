"""The notebooks: every cell runs, and what the file shows was really printed, returned and drawn."""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent.parent / "launch" / "notebooks"


def texts(notebook: dict) -> list[list[str]]:
  """What each cell of code has printed or returned."""
  return [["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in cell["outputs"]]
          for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_tour_runs():
  environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(NOTEBOOKS.parent.parent)}
  done = subprocess.run([sys.executable, NOTEBOOKS / "execute.py", "--check", NOTEBOOKS / "atma_tour.ipynb"], env=environ,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_the_tour_shows_its_outputs():
  """The file has the outputs of one run from top to bottom, pictures among them, and no path of the machine it ran on."""
  content = (NOTEBOOKS / "atma_tour.ipynb").read_text()
  cells = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 3
  assert not any(word in "".join(map("".join, texts(json.loads(content)))) for word in ("Error", "/tmp", "/home", "/work"))


def test_outputs_are_kept(tmp_path):
  """Printed lines, the last value of a cell unless a semicolon ends it, and names for the cells after it; errors end the run."""
  def notebook(*sources: str) -> pathlib.Path:
    cells = [{"cell_type": "code", "source": [source], "outputs": [], "execution_count": None} for source in sources]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# A"]}, *cells]}))
    return path

  path = notebook("x = 2\nprint(x)\nx + 1", "x * 10;", "x * 100")
  run_notebook = runpy.run_path(str(NOTEBOOKS / "execute.py"))["run_notebook"]
  run_notebook(path, check=False)
  assert texts(json.loads(path.read_text())) == [["2\n", "3"], [], ["200"]]
  before = notebook("x = 1\n1 / 0").read_text()
  with pytest.raises(ZeroDivisionError):
    run_notebook(path, check=False)
  assert path.read_text() == before

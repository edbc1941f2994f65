"""Where metrics go besides their file: Weights & Biases by a stand-in, TensorBoard without torch, and the goodput of a run."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
import types

from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.errors import RunError, UserError
from atma_jax.training.boards import WeightsAndBiases, check_project
from atma_jax.training.goodput import OVERHEADS, Goodput
from atma_jax.training.metrics import MetricWriter

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


class Run:
  """What ``wandb.init`` returns."""

  def __init__(self, **options):
    self.options, self.logged, self.finished, self.failing = options, [], False, False

  def log(self, values, step):
    if self.failing:
      raise ConnectionError("no route\nto host")
    self.logged.append((step, values))

  def finish(self):
    self.finished = True


@pytest.fixture
def runs(monkeypatch) -> list[Run]:
  """The runs of a stand-in for wandb."""
  started = []

  def init(**options):
    started.append(Run(**options))
    return started[-1]

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  return started


def writer(folder: pathlib.Path, first: int = 0, project: str = "mine") -> MetricWriter:
  workdir = epath.Path(folder)
  return MetricWriter(workdir, first_step=first, active=True, board=lambda: WeightsAndBiases(project, workdir, "tiny", {"a": 1}))


def test_a_run_of_wandb_goes_on_when_training_does(tmp_path, runs):
  """It gets the records of the file, once more under the same name after a restart."""
  for first in (0, 2):
    with writer(tmp_path, first) as metrics:
      metrics.write(first + 1, {"loss": 1.5, "nothing": None})
  assert [run.options["id"] for run in runs] == [(tmp_path / "wandb_run").read_text()] * 2
  assert runs[0].options["project"] == "mine" and runs[0].options["config"] == {"a": 1} and runs[0].options["resume"] == "allow"
  assert [(step, values["loss"], "nothing" in values) for run in runs for step, values in run.logged] == [
    (1, 1.5, False), (3, 1.5, False)]
  assert all(run.finished for run in runs)


def test_what_wandb_cannot_take_is_counted(tmp_path, runs):
  """The file and TensorBoard get it all the same, and training goes on."""
  with writer(tmp_path) as metrics:
    runs[0].failing = True
    metrics.write(1, {"loss": 1.0})
    runs[0].failing = False
    metrics.write(2, {"loss": 2.0})
  assert metrics.failed_writes == 1 and [step for step, _ in runs[0].logged] == [2]
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_cannot_start_is_one_line(tmp_path, runs, monkeypatch):
  def refuse(**_):
    raise ValueError("api_key not configured\n(no tty)")

  monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
  with pytest.raises(RunError, match=r"--wandb=mine: .*ValueError: api_key not configured \(no tty\).*WANDB_MODE=offline"):
    writer(tmp_path)


@pytest.mark.parametrize("project", ["", "a/b", "x" * 129, "100%", "a\nb"])
def test_names_that_are_no_projects(runs, project):
  with pytest.raises(UserError, match=r"(?s)--wandb=.*must be the name of a project"):
    check_project(project)


def test_without_the_extra(monkeypatch):
  monkeypatch.setattr(sys, "path", [])
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  with pytest.raises(UserError, match=r"--wandb=mine: wandb is not installed: pip install 'atma_jax\[wandb\]'"):
    check_project("mine")


def test_tensorboard_does_not_load_torch(tmp_path):
  """Where torch is installed, tensorboardX would import it for seconds; nothing is imported before the first file is opened."""
  (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
  code = ("import pathlib, sys; sys.path.insert(0, sys.argv[1]); from atma_jax.training import boards\n"
          "assert 'tensorboardX' not in sys.modules\n"
          "boards.TensorBoard(pathlib.Path(sys.argv[1]) / 'events', 0).write(1, 0.0, {'loss': 1.0})\n"
          "assert 'tensorboardX' in sys.modules and 'torch' not in sys.modules")
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


SECONDS = st.floats(0, 1e6)


@given(st.dictionaries(st.sampled_from(list(OVERHEADS)), SECONDS), SECONDS, SECONDS)
@settings(max_examples=100, deadline=None)
def test_goodput_adds_up(overheads, steps, gap):
  """Steps and overheads are the wall time since the first start, over a restart too."""
  before = {"time": time.time() - gap, "goodput": 0.5, "seconds/steps": steps,
            **{f"seconds/{name}": seconds for name, seconds in overheads.items()}}
  counted = Goodput(time.perf_counter(), before)
  counted.add("saving", 0.0)
  values = counted.values()
  wall = sum(value for name, value in values.items() if name.startswith("seconds/"))
  assert wall == pytest.approx(sum(overheads.values()) + steps + gap, abs=1)
  assert 0 <= values["goodput"] <= 1 and values["goodput"] * wall == pytest.approx(values["seconds/steps"], rel=1e-6, abs=1e-3)
  assert values["seconds/restarts"] == pytest.approx(overheads.get("restarts", 0.0) + gap, abs=1)
  assert str(counted).startswith("goodput ")


@given(st.dictionaries(st.sampled_from(["time", "seconds/steps", "seconds/data", "seconds/restarts"]),
                       st.none() | st.booleans() | st.text(max_size=3) | st.floats() | st.integers(-(10**30), 10**30)))
@settings(max_examples=200, deadline=None)
def test_records_that_anybody_wrote(before):
  """A foreign record costs the counts, never the run."""
  values = Goodput(time.perf_counter(), before).values()
  assert 0 <= values["goodput"] <= 1 and all(value >= 0 for value in values.values())
  json.dumps(values, allow_nan=False)

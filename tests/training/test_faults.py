"""What goes wrong in practice: kill -9, SIGTERM, damaged and half-written steps, no space, no permission, non-finite steps."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atma_jax.checkpoints import store
from atma_jax.checkpoints.load import load_model
from atma_jax.config import Config
from atma_jax.errors import RunError, UserError
from atma_jax.models.definition import ModelDefinition, params_of
from atma_jax.sharding import make_mesh
from atma_jax.training import loop
from atma_jax.training import train_step as step_module
from atma_jax.training.loop import DONE, train
from atma_jax.training.state import create_state, optimizer_for

pytestmark = pytest.mark.slow
STEPS, EVERY = 24, 4
RECIPE = """
from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig

def get_config():
  return Config(
    name="faults",
    model=ModelConfig(vocab_size=257, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=("local",), activation_dtype="float32"),  # what compiles quickly: the mechanics are the same
    data=DataConfig(directory={directory!r}, sources=("text:{corpus}/*.txt",), tokenizer="bytes", validation_documents=3,
                    heldout_documents=2, shard_tokens=100_000, sequence_length=32, batch_size=4),
    train=TrainConfig(steps={steps}, log_every=1, checkpoint_every={every}, checkpoint_keep=3, validate_every=0))
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("faults")
  for i in range(30):
    (folder / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 8)
  path = folder / "recipe.py"
  path.write_text(RECIPE.format(directory=str(folder / "prepared"), corpus=folder, steps=STEPS, every=EVERY))
  return path


@pytest.fixture(scope="module")
def recipe(recipe_file) -> Config:
  namespace = {}
  exec(recipe_file.read_text(), namespace)
  return namespace["get_config"]().validate()


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> pathlib.Path:
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole")
  assert train(copy.deepcopy(recipe), str(workdir)) == DONE
  return workdir


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """The last loss written for each step; a kill can only cut off the last line of a process."""
  found = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    found[record["step"]] = record["loss"]
  return found


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  return {name: np.asarray(value) for name, value in params_of(load_model(workdir)[1]).items()}


def assert_equal_runs(workdir: pathlib.Path, expected: pathlib.Path):
  assert losses(workdir) == losses(expected)
  a, b = weights(workdir), weights(expected)
  assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture
def start(forking, recipe_file, tmp_path):
  """Starts training in `tmp_path`; its stderr goes to a file there."""
  return lambda: forking.start("train", f"--config={recipe_file}", f"--workdir={tmp_path}", stderr=tmp_path / "stderr")


def wait_for_step(workdir: pathlib.Path, step: int, process):
  metrics = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < deadline:
    if metrics.exists() and any(f'"step": {n},' in metrics.read_text() for n in range(step, STEPS)):
      return
    time.sleep(0.01)
  assert process.poll() is not None, "no progress in time"


def test_kill_at_random_moments_then_resume_is_bitwise(start, finished, tmp_path):
  rng = np.random.default_rng(time.time_ns())
  kills = sorted(rng.choice(np.arange(2, STEPS - 2), 2, replace=False))
  for moment in kills:
    process = start()
    wait_for_step(tmp_path, moment, process)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.wait(timeout=60)
  assert start().wait(timeout=300) == 0, (kills, (tmp_path / "stderr").read_text())
  assert_equal_runs(tmp_path, finished)


def test_sigterm_saves_exits_75_and_the_same_command_goes_on(start, finished, tmp_path):
  process = start()
  wait_for_step(tmp_path, 2, process)
  process.terminate()
  code, stderr = process.wait(timeout=120), (tmp_path / "stderr").read_text()
  assert code == 75 and "pre-empted" in stderr, stderr
  assert start().wait(timeout=300) == 0, (tmp_path / "stderr").read_text()
  assert_equal_runs(tmp_path, finished)


def newest(workdir: pathlib.Path) -> pathlib.Path:
  return max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def cut_in_half(path: pathlib.Path):
  """Cuts the largest file of the arrays in half."""
  file = max((p for p in path.glob("state/**/*") if p.is_file()), key=lambda p: p.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)


def remove_meta(path: pathlib.Path):
  shutil.rmtree(path / "meta")


def garble_meta(path: pathlib.Path):
  for file in (path / "meta").iterdir():
    file.write_text("{")


@pytest.mark.parametrize("damage", [cut_in_half, remove_meta, garble_meta])
def test_damage_is_reported_and_the_step_before_is_used(recipe, finished, tmp_path, damage, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  damage(newest(workdir))
  _, _, _, step = load_model(workdir)
  assert step == STEPS - EVERY
  assert any("damaged and was passed over" in record.getMessage() for record in caplog.records)
  assert train(copy.deepcopy(recipe), str(workdir)) == DONE
  assert_equal_runs(workdir, finished)


def test_all_damaged_is_an_error_and_nothing_is_deleted(recipe, finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  steps = sorted(path.name for path in (workdir / "checkpoints").glob("[0-9]*"))
  for name in steps:
    cut_in_half(workdir / "checkpoints" / name)
  with pytest.raises(UserError, match="none of the steps"):
    train(copy.deepcopy(recipe), str(workdir))
  assert sorted(path.name for path in (workdir / "checkpoints").glob("[0-9]*")) == steps


def test_half_written_step_is_ignored(recipe, finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  whole = newest(workdir)
  partial = whole.with_name(f"{STEPS + EVERY}.orbax-checkpoint-tmp")
  shutil.copytree(whole, partial)
  cut_in_half(partial)
  assert load_model(workdir)[3] == STEPS


def test_workdir_that_cannot_be_written_is_one_line(main, recipe_file):
  """Not even root can make a folder in /proc."""
  result = main("train", f"--config={recipe_file}", "--workdir=/proc/atma")
  errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
  assert result.returncode == 2 and len(errors) == 1 and "--workdir" in errors[0], result.stderr


def failed_saves(workdir: pathlib.Path) -> list[int]:
  """The metric `failed_saves` of every step."""
  return [json.loads(line)["failed_saves"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def full(*_, **__):
  raise OSError(28, "No space left on device")


def test_full_disk_trains_on_and_ends_with_one_line_and_the_last_good_step(recipe, finished, tmp_path, monkeypatch, caplog):
  """From some point on, the file system takes no more arrays."""
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  config = copy.deepcopy(recipe)
  config.train.steps = STEPS + 2 * EVERY
  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", full)
  monkeypatch.setattr(store, "FINAL_PAUSES", (0, 0))
  with pytest.raises(RunError, match=r"step 32 could not be written in 2 attempts.*intact.*No space left on device"):
    train(config, str(workdir))
  monkeypatch.undo()
  assert sorted(losses(workdir)) == list(range(1, config.train.steps + 1))
  assert failed_saves(workdir)[-4:] == [1, 1, 2, 2]  # at 28, again at 30; and twice at 32, which no record can tell
  assert sum("could not be written" in record.getMessage() for record in caplog.records) == 4
  assert load_model(workdir)[3] == STEPS
  assert all(np.array_equal(weights(workdir)[n], w) for n, w in weights(finished).items())


class _Full:
  """A background write that ran out of space, as Orbax sees it."""

  result = staticmethod(full)


@pytest.mark.parametrize("background", [False, True], ids=["at-once", "in-the-background"])
def test_a_failed_write_is_reported_counted_and_tried_again(recipe, finished, tmp_path, monkeypatch, caplog, background):
  original, left = ocp.PyTreeCheckpointHandler.async_save, [1]

  async def once(self, *args, **options):
    if not left[0]:
      return await original(self, *args, **options)
    left[0] -= 1
    return [_Full()] if background else full()

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", once)
  assert train(copy.deepcopy(recipe), str(tmp_path)) == DONE
  assert failed_saves(tmp_path)[-1] == 1 and failed_saves(tmp_path)[EVERY - 2] == 0
  assert sum("4 could not be written (1 failed so far)" in record.getMessage() for record in caplog.records) == 1
  assert_equal_runs(tmp_path, finished)
  saved = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
  assert sorted(saved) == [16, 20, 24] and not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_a_workdir_that_becomes_unwritable_costs_no_step(recipe, tmp_path, monkeypatch, caplog):
  """The folder of the checkpoints vanishes in the middle of a run and comes back."""
  original = loop.Loop.next_batch
  calls = [0]

  def next_batch(self):
    calls[0] += 1
    if calls[0] == EVERY:
      (tmp_path / "checkpoints").rename(tmp_path / "away")
    if calls[0] == EVERY + 2:
      (tmp_path / "away").rename(tmp_path / "checkpoints")
    return original(self)

  monkeypatch.setattr(loop.Loop, "next_batch", next_batch)
  config = copy.deepcopy(recipe)
  config.train.steps = 2 * EVERY
  assert train(config, str(tmp_path)) == DONE
  assert failed_saves(tmp_path)[-1] == 1
  assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["6", "8"]


def poisoned(recipe: Config, tmp_path: pathlib.Path, monkeypatch, bad: set[int], **changes) -> str:
  """Trains with a loss that is not finite in the steps `bad`, whose tokens are marked by their sign."""
  original, seen = loop.TrainingData.__next__, [0]
  real_loss = step_module.language_model_loss

  def marked(self):
    tokens = original(self)["tokens"]
    seen[0] += 1
    return {"tokens": np.where(seen[0] in bad, -1 - tokens, tokens)}

  def loss(model, tokens, weights, **options):
    value, z = real_loss(model, jnp.abs(tokens), weights, **options)
    return jnp.where(tokens[0, 0] < 0, jnp.nan, value), z

  monkeypatch.setattr(loop.TrainingData, "__next__", marked)
  monkeypatch.setattr(step_module, "language_model_loss", loss)
  config = copy.deepcopy(recipe)
  for name, value in changes.items():
    setattr(config.train, name, value)
  return train(config, str(tmp_path))


def test_non_finite_steps_are_skipped_and_counted(recipe, tmp_path, monkeypatch, caplog):
  assert poisoned(recipe, tmp_path, monkeypatch, {3, 4, 8}, steps=8, checkpoint_every=4) == DONE
  records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [r["bad_steps"] for r in records] == [0, 0, 1, 2, 0, 0, 0, 1]
  assert records[-1]["bad_steps_total"] == 3
  assert {path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")} == {"5", "8"}  # 4 waits for a good step
  assert sum("update skipped" in record.getMessage() for record in caplog.records) == 3
  assert all(np.isfinite(value).all() for value in weights(tmp_path).values())


def test_too_many_non_finite_steps_stop_with_a_checkpoint_from_before(recipe, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"3 non-finite steps in a row.*max_bad_steps"):
    poisoned(recipe, tmp_path, monkeypatch, set(range(7, 30)), max_bad_steps=3)
  assert load_model(tmp_path)[3] == 4


def test_a_skipped_step_changes_nothing_but_the_count(recipe):
  mesh = make_mesh()
  definition = ModelDefinition(recipe.model)
  optimizer = optimizer_for(recipe, definition)
  state = create_state(recipe, definition, optimizer, mesh)
  before = jax.tree.map(np.asarray, (state.params, state.opt_state))
  params = dict(state.params) | {"head.bias": jnp.full_like(state.params["head.bias"], jnp.nan)}
  step = step_module.make_train_step(recipe, definition, optimizer, mesh, state)
  after, metrics = step(dataclasses.replace(state, params=params), jnp.zeros((4, 33), jnp.int32))
  before[0]["head.bias"] = np.full_like(before[0]["head.bias"], np.nan)
  jax.tree.map(np.testing.assert_array_equal, before, (after.params, after.opt_state))
  assert int(after.step) == 1 and int(after.bad_steps_total) == 1 and int(metrics["bad_steps"]) == 1


def test_profile_is_taken(recipe, tmp_path):
  config = copy.deepcopy(recipe)
  config.train.steps, config.train.profile_start, config.train.profile_steps = 6, 0, 2
  assert train(config, str(tmp_path)) == DONE
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_loop_never_waits_for_the_step_it_dispatched(recipe, tmp_path, monkeypatch):
  """Step n + 1 is dispatched before the numbers of step n are fetched."""
  events = []
  original = loop.Loop.report
  monkeypatch.setattr(loop.Loop, "report", lambda self, writer, number, metrics: (
    events.append(("report", number)), original(self, writer, number, metrics))[1])
  original_next = loop.Loop.next_batch
  monkeypatch.setattr(loop.Loop, "next_batch", lambda self: (events.append(("batch", None)), original_next(self))[1])
  config = copy.deepcopy(recipe)
  config.train.steps, config.train.checkpoint_every = 6, 100
  train(config, str(tmp_path))
  batches = 0
  for kind, number in events:
    batches += kind == "batch"
    if kind == "report" and number < 6:
      assert batches == number + 1, events

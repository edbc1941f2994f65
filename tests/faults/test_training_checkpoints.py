"""Damaged checkpoints: whatever happens to the files of a step, the run resumes the same or says that it uses the step before."""

from __future__ import annotations

import copy
import functools
import json
import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from atma_jax.checkpoints.load import load_model
from atma_jax.checkpoints.steps import read_data, read_meta
from atma_jax.checkpoints.store import Checkpointer
from atma_jax.config import Config
from atma_jax.data.pipeline import check_state
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh
from atma_jax.training.loop import train
from atma_jax.training.state import TrainState, abstract_state, optimizer_for
from tests.faults import tiny_run

LAST, BEFORE = tiny_run.STEPS, tiny_run.STEPS - tiny_run.EVERY


@functools.cache
def target() -> TrainState:
  config = tiny_run.recipe()
  definition = ModelDefinition(config.model)
  return abstract_state(config, definition, optimizer_for(config, definition), make_mesh())


def restored(workdir: pathlib.Path, config: Config | None = None) -> tuple[dict, dict]:
  """State and position that training in `workdir` would go on from."""
  checkpointer = Checkpointer(workdir, keep=2)
  try:
    state, data = checkpointer.restore(config or tiny_run.recipe(), target(), check_state)
  finally:
    checkpointer.close()
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(vars(state))[0]}, data


@functools.cache
def expected(step: int) -> tuple[dict, dict]:
  """What an undamaged `step` holds."""
  workdir = tiny_run.folder() / f"expected-{step}"
  shutil.copytree(tiny_run.finished() / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
  return restored(workdir)


def same(a: tuple[dict, dict], b: tuple[dict, dict]) -> bool:
  return a[1] == b[1] and a[0].keys() == b[0].keys() and all(np.array_equal(a[0][name], b[0][name]) for name in a[0])


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
  shutil.copytree(tiny_run.finished() / "checkpoints", tmp_path / "run" / "checkpoints")
  return tmp_path / "run"


def flip(path: pathlib.Path, draw: random.Random) -> str:
  content = bytearray(path.read_bytes())
  bit = draw.randrange(8 * len(content))
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)
  return f"bit {bit}"


def truncate(path: pathlib.Path, draw: random.Random) -> str:
  size = draw.randrange(path.stat().st_size)
  os.truncate(path, size)
  return f"cut to {size}"


def delete(path: pathlib.Path, draw: random.Random) -> str:
  path.unlink()
  return "deleted"


def zero(path: pathlib.Path, draw: random.Random) -> str:
  path.write_bytes(bytes(path.stat().st_size))
  return "zeroed"


def exchange(path: pathlib.Path, draw: random.Random) -> str:
  """For the file of that name in the step before, or for another of the same step."""
  step = next(parent for parent in path.parents if parent.name == str(LAST))
  other = step.with_name(str(BEFORE)) / path.relative_to(step)
  if not other.exists():
    other = draw.choice([file for file in sorted(step.rglob("*")) if file.is_file()])
  shutil.copyfile(other, path) if other != path else None
  return f"exchanged for {other}"


@pytest.mark.parametrize("damage", [flip, truncate, delete, zero, exchange])
def test_damage_anywhere_never_passes_unnoticed(workdir, damage, caplog):
  draw = tiny_run.drawn(damage.__name__)
  step = workdir / "checkpoints" / str(LAST)
  files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
  small = [path for path in files if path.parent.name in ("meta", "data") and path.name == "metadata"]
  expected(LAST), expected(BEFORE)
  for path in small * 3 + draw.sample(files, min(len(files), 5)):
    shutil.rmtree(workdir)
    shutil.copytree(tiny_run.finished() / "checkpoints", workdir / "checkpoints")
    caplog.clear()
    what = damage(path, draw)
    found = restored(workdir)
    said = any(f"{LAST} is damaged and was passed over" in record.getMessage() for record in caplog.records)
    assert same(found, expected(BEFORE)) if said else same(found, expected(LAST)), (path, what)
    assert said or path not in small or damage is exchange or path.read_bytes() == b"", (path, what)


def test_every_bit_of_position_and_meta_counts(workdir):
  """Without the arrays it takes no time: bits of all kinds, also those of white space and of names."""
  draw = tiny_run.drawn("bits")
  step = workdir / "checkpoints" / str(LAST)
  meta, data = read_meta(step), read_data(step, read_meta(step))
  for path in (step / "meta" / "metadata", step / "data" / "metadata"):
    content = path.read_bytes()
    for bit in draw.sample(range(8 * len(content)), 400):
      path.write_bytes(content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:])
      try:
        found = read_meta(step), read_data(step, read_meta(step))
      except Exception:  # what `newest_good_step` calls damage
        continue
      assert found == (meta, data), bit
    path.write_bytes(content)


def rewrite(step: pathlib.Path, **changes) -> None:
  """Makes a step one of the first version, with changes."""
  path = step / "meta" / "metadata"
  meta = json.loads(path.read_text())
  old = {name: meta[name] for name in ("config", "tokenizer", "checksums")}
  path.write_text(json.dumps({"schema": 1, **old, **changes}))


def test_steps_without_digests_are_read_and_that_is_said_once(workdir, caplog):
  for step in (workdir / "checkpoints").iterdir():
    rewrite(step)
  assert same(restored(workdir), expected(LAST))
  load_model(workdir)
  assert sum("steps of an older version" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("position", [{}, {"next_sequence": "8"}, {"next_sequence": -1, "manifest": "x"},
                                      {"next_sequence": 1.5, "manifest": "x"}, {"next_sequence": 1, "manifest": None}, [1]])
def test_positions_of_another_kind_are_damage_in_old_steps_too(workdir, position):
  step = workdir / "checkpoints" / str(LAST)
  rewrite(step)
  (step / "data" / "metadata").write_text(json.dumps(position))
  assert same(restored(workdir), expected(BEFORE))


def test_a_step_under_another_number_is_not_taken_for_it(workdir):
  (workdir / "checkpoints" / str(LAST)).rename(workdir / "checkpoints" / str(LAST + 2))
  assert same(restored(workdir), expected(BEFORE))


@pytest.mark.parametrize(("field", "value", "words"), [
  ("optimizer.kind", "adamw", "config.optimizer.kind='adamw' here, 'muon' in the checkpoint"),
  ("optimizer.clip_norm", None, "config.optimizer.clip_norm=None here, 1.0 in the checkpoint"),
  ("optimizer.clip_basis", "mean", "config.optimizer.clip_basis='mean' here, 'sum' in the checkpoint"),
  ("train.ema_decay", 0.9, "config.train.ema_decay=0.9 here, None in the checkpoint"),
  ("model.width", 24, "config.model.width=24 here, 16 in the checkpoint"),
])
def test_another_optimizer_or_model_is_named(workdir, field, value, words):
  config = tiny_run.recipe()
  group, name = field.split(".")
  setattr(getattr(config, group), name, value)
  config.train.steps += 2
  with pytest.raises(UserError, match=words):
    train(copy.deepcopy(config), str(workdir))
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [str(BEFORE), str(LAST)]


def test_rates_may_change(workdir):
  config = tiny_run.recipe()
  config.optimizer.muon_learning_rate, config.optimizer.warmup_steps = 0.01, 3
  assert same(restored(workdir, config), expected(LAST))

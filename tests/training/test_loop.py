"""The training loop on a tiny recipe: a resumed run is exact, damage is survived, bad input is refused in one line."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from atma_jax.checkpoints.load import load_model
from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from atma_jax.errors import UserError
from atma_jax.models.definition import params_of
from atma_jax.training.loop import DONE, train

SENTENCES = "The quick brown fox number {} jumps over the lazy dog, {} times in a row, and then sleeps.\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Config:
  """A tiny recipe on prepared bytes."""
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(40):
    (folder / f"{i}.txt").write_text("".join(SENTENCES.format(i, j * i) for j in range(12)))
  return Config(
    name="tiny",
    model=ModelConfig(vocab_size=257, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=("local", "global"), activation_dtype="float32"),
    data=DataConfig(directory=str(folder / "prepared"), sources=(f"text:{folder}/*.txt",), tokenizer="bytes",
                    validation_documents=3, heldout_documents=2, shard_tokens=100_000, sequence_length=32, batch_size=4),
    train=TrainConfig(steps=6, log_every=1, checkpoint_every=3, validate_every=3, validation_batches=1,
                      validation_lengths=(1, 2))).validate()


def run(recipe: Config, workdir: pathlib.Path, **changes) -> str:
  config = copy.deepcopy(recipe)
  for name, value in changes.items():
    setattr(config.train, name, value)
  return train(config, str(workdir))


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  return {name: np.asarray(value) for name, value in params_of(load_model(workdir)[1]).items()}


def losses(workdir: pathlib.Path) -> dict[int, float]:
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> pathlib.Path:
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp("run")
  assert run(recipe, workdir) == DONE
  return workdir


def test_run_again_is_done(recipe, finished):
  before = losses(finished)
  assert run(recipe, finished) == DONE and losses(finished) == before


def test_goodput_is_recorded(finished):
  """Every record says what the time since the start went into; none of it is lost or counted twice."""
  records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
  assert all(0 < record["goodput"] < 1 for record in records)
  walls = [sum(seconds for name, seconds in record.items() if name.startswith("seconds/")) for record in records]
  assert walls == sorted(walls)
  assert records[-1]["seconds/compiling"] > 0 and records[-1]["seconds/validating"] > 0 and records[-1]["seconds/restarts"] == 0
  assert abs(walls[-1] - walls[0] - (records[-1]["time"] - records[0]["time"])) < 0.5


@pytest.mark.slow
def test_damaged_newest_step_is_passed_over_and_resume_is_bitwise(recipe, finished, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
  for file in sorted(newest.glob("state/**/*")):
    if file.is_file() and file.stat().st_size > 4096:
      content = bytearray(file.read_bytes())
      content[len(content) // 2] ^= 0xFF
      file.write_bytes(content)
  assert run(recipe, workdir) == DONE
  assert any("checkpoints/6 is damaged and was passed over" in record.getMessage() for record in caplog.records)
  assert losses(workdir) == losses(finished)
  a, b = weights(workdir), weights(finished)
  assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_another_architecture_is_refused_by_field(recipe, finished):
  config = copy.deepcopy(recipe)
  config.model.num_heads, config.train.steps = 1, 9
  with pytest.raises(UserError, match=r"config\.model\.num_heads=1 here, 2 in the checkpoint"):
    train(config, str(finished))


def test_vocabulary_and_mesh_are_checked(recipe, tmp_path):
  config = copy.deepcopy(recipe)
  config.model.vocab_size = 100
  with pytest.raises(UserError, match="vocab_size"):
    train(config, str(tmp_path))
  config = copy.deepcopy(recipe)
  config.mesh.tensor = 3
  with pytest.raises(UserError, match="does not fit 1 device"):
    train(config, str(tmp_path))


def test_load_model_names_legal_steps(finished):
  config, model, tokenizer, step = load_model(finished)
  assert step == 6 and tokenizer.vocab_size == 257 and config.name == "tiny"
  assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, 257)
  with pytest.raises(UserError, match=r"--step=4.*legal: 3, 6"):
    load_model(finished, step=4)


@pytest.mark.slow
def test_accumulation_equals_the_big_batch(recipe, finished, tmp_path):
  assert run(recipe, tmp_path, accumulation=2) == DONE
  for step, loss in losses(finished).items():
    # The sum over microbatches rounds differently; Adam and Muon divide by the gradient, and six steps amplify it.
    assert abs(losses(tmp_path)[step] - loss) < 1e-3, step
  assert jax.device_count() == 1


@pytest.mark.slow
def test_moving_average_follows_the_weights_and_is_loaded_on_request(recipe, finished, tmp_path):
  """Every step computes average = d * average + (1 - d) * weights; a checkpoint without an average is refused."""
  with pytest.raises(UserError, match=r"--ema.*config\.train\.ema_decay=None"):
    load_model(finished, ema=True)
  assert run(recipe, tmp_path, steps=2, checkpoint_every=1, checkpoint_keep=3, validate_every=0, ema_decay=0.75) == DONE
  before, after = (params_of(load_model(tmp_path, step)[1]) for step in (1, 2))
  average_before, average_after = (params_of(load_model(tmp_path, step, ema=True)[1]) for step in (1, 2))
  assert any(np.any(np.asarray(before[name]) != np.asarray(average_before[name])) for name in before)
  for name in after:
    expected = 0.75 * np.asarray(average_before[name]) + 0.25 * np.asarray(after[name])
    np.testing.assert_allclose(average_after[name], expected, rtol=1e-6, atol=1e-7)

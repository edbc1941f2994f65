"""The training loop on eight devices resumes a checkpoint of one mesh on another, with the same data and the same losses."""

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
from atma_jax.sharding import make_mesh
from atma_jax.training import loop
from atma_jax.training.loop import DONE, train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Config:
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(30):
    (folder / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 8)
  return Config(
    name="mesh",
    model=ModelConfig(vocab_size=264, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=("global",), activation_dtype="float32"),
    data=DataConfig(directory=str(folder / "prepared"), sources=(f"text:{folder}/*.txt",), tokenizer="bytes",
                    validation_documents=3, heldout_documents=2, shard_tokens=100_000, sequence_length=32, batch_size=8),
    train=TrainConfig(steps=6, log_every=1, checkpoint_every=2, validate_every=0)).validate()


def run(recipe: Config, workdir: pathlib.Path, stop: int | None = None, **axes: int) -> dict[int, float]:
  """Trains on a mesh, to the end or until it is interrupted after step `stop`; returns the losses written so far by step."""
  config = copy.deepcopy(recipe)
  for name, size in ({"data": 1} | axes).items():
    setattr(config.mesh, name, size)
  original = loop.Loop.save

  def save(self, number, state, *, final):
    saved = original(self, number, state, final=final)
    if number == stop:
      raise KeyboardInterrupt
    return saved
  loop.Loop.save = save
  try:
    assert train(config, str(workdir)) == DONE
  except KeyboardInterrupt:
    pass
  finally:
    loop.Loop.save = original
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {record["step"]: record["loss"] for record in records}


@pytest.mark.slow
def test_resume_over_other_meshes(recipe, tmp_path):
  whole = run(recipe, tmp_path / "whole", data=8)
  shutil.copytree(tmp_path / "whole", tmp_path / "moved")  # what a pre-emption after step 2 leaves behind
  for step in ("4", "6"):
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / step)
  assert sorted(run(recipe, tmp_path / "moved", stop=4, data=2, fsdp=2, tensor=2)) == [1, 2, 3, 4]
  moved = run(recipe, tmp_path / "moved", fsdp=8)
  assert sorted(moved) == sorted(whole) == list(range(1, 7))
  # Fake devices add their parts in the order in which their threads arrive, so not even one mesh repeats itself bit for bit.
  np.testing.assert_allclose([moved[s] for s in sorted(moved)], [whole[s] for s in sorted(whole)], rtol=2e-5)
  # Evaluation restores either on any number of devices.
  models = [load_model(folder, mesh=mesh)[1] for folder in (tmp_path / "whole", tmp_path / "moved")
            for mesh in (make_mesh(), make_mesh(devices=jax.devices()[:1]))]
  first, *others = [{name: np.asarray(value) for name, value in params_of(model).items()} for model in models]
  for other in others:
    for name, value in first.items():
      np.testing.assert_allclose(other[name], value, atol=2e-4, err_msg=name)


def test_batch_that_does_not_divide_is_refused_with_the_numbers(recipe, tmp_path):
  config = copy.deepcopy(recipe)
  config.data.batch_size = 12
  with pytest.raises(UserError, match=r"batch_size.*12.*8"):
    train(config, str(tmp_path))

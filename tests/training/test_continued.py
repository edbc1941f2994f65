"""Continued training: a run starts from the weights of a published checkpoint or of another run, and from nothing else of it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pathlib
import shutil

from flax import nnx
import numpy as np
import pytest

from atma_jax.checkpoints.load import load_model
from atma_jax.checkpoints.store import save_model
from atma_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from atma_jax.data.tokenizers import ByteTokenizer, NamedTokenizer
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.models.definition import params_of
from atma_jax.pytorch import write_published
from atma_jax.training.loop import DONE, train
from atma_jax.training.optimizer import learning_rates


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Config:
  """One tiny step on bytes, so slow that it moves no weight by more than rounding."""
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(8):
    (folder / f"{i}.txt").write_text(f"The quick brown fox number {i} jumps over the lazy dog. " * 20)
  return Config(
    model=ModelConfig(vocab_size=257, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=64,
                      block_pattern=("local", "global"), activation_dtype="float32"),
    data=DataConfig(directory=str(folder / "prepared"), sources=(f"text:{folder}/*.txt",), tokenizer="bytes",
                    validation_documents=1, heldout_documents=1, shard_tokens=100_000, sequence_length=32, batch_size=4),
    optimizer=OptimizerConfig(learning_rate_scale=1e-12, warmup_steps=2),
    train=TrainConfig(steps=1, log_every=1, checkpoint_every=1, validate_every=0, ema_decay=0.5)).validate()


@pytest.fixture(scope="module")
def source(recipe) -> Atma:
  return Atma(recipe.model, rngs=nnx.Rngs(7))


def test_from_a_published_checkpoint(recipe, source, tmp_path, caplog):
  """Weights and average start there, though a field without parameters differs; the run goes on without the checkpoint."""
  write_published(tmp_path / "published", "pytorch", recipe, source, NamedTokenizer("gpt2"), 9, lossy=True)
  config = copy.deepcopy(recipe)
  config.train.init_from, config.model.window = str(tmp_path / "published"), 8
  with caplog.at_level(logging.INFO, "absl"):
    assert train(config, str(tmp_path / "run")) == DONE
  assert "config.model.window=8 (there: None)" in caplog.text and "its tokenizer is not that of the data" in caplog.text
  shutil.rmtree(tmp_path / "published")
  assert train(config, str(tmp_path / "run")) == DONE
  for ema in (False, True):
    loaded = load_model(tmp_path / "run", ema=ema)
    assert loaded.step == 1
    for name, value in params_of(loaded.model).items():
      np.testing.assert_allclose(value, params_of(source)[name], atol=1e-6, err_msg=name)


def test_what_cannot_be_started_from(recipe, source, tmp_path):
  save_model(tmp_path / "other", recipe, source, ByteTokenizer(), 3)
  config = copy.deepcopy(recipe)
  config.model = dataclasses.replace(recipe.model, mlp_width=32)
  for origin, message in (("none", "no such directory"), ("", "holds no checkpoint step"),
                          ("other", r"another architecture: parameter \S+ is \(.*config\.model\.mlp_width=32 \(there: 64\)")):
    config.train.init_from = str(pathlib.Path(tmp_path, origin))
    with pytest.raises(UserError, match=rf"^config\.train\.init_from=[^\n]*{message}[^\n]*$"):
      train(config, str(tmp_path / "run"))


def test_every_learning_rate_is_scaled():
  for kind in ("muon", "adamw"):
    plain, scaled = (learning_rates(OptimizerConfig(kind=kind, learning_rate_scale=scale), 10, 3) for scale in (1.0, 0.25))
    assert {group: float(rate) for group, rate in scaled.items()} == {group: 0.25 * float(rate) for group, rate in plain.items()}

"""Auxiliary objectives in the training step: on every core, deterministic, equal under accumulation, and free when off."""

from __future__ import annotations

import copy
import functools

import jax
import numpy as np
import pytest

from atma_jax.config import (
  AuxiliaryConfig,
  Config,
  DataConfig,
  MemoryConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh
from atma_jax.training.objective import auxiliary_loss
from atma_jax.training.state import create_state, optimizer_for
from atma_jax.training.train_step import make_train_step

TOKENS = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)


def recipe(attention="polar", accumulation=1, pattern=("global",), **auxiliary) -> Config:
  return Config(
    model=ModelConfig(vocab_size=64, num_layers=len(pattern), width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=pattern, attention=attention, memory=MemoryConfig(enabled=False),
                      activation_dtype="float32", remat="block"),
    data=DataConfig(sequence_length=16, batch_size=4), optimizer=OptimizerConfig(kind="adamw", adamw_learning_rate=0.03),
    train=TrainConfig(steps=10, accumulation=accumulation, auxiliary=AuxiliaryConfig(**auxiliary))).validate()


@functools.cache
def program(attention="polar", accumulation=1, **auxiliary):
  config = recipe(attention, accumulation, **auxiliary)
  definition = ModelDefinition(config.model)
  optimizer, mesh = optimizer_for(config, definition), make_mesh(devices=jax.devices()[:1])

  def fresh():
    return create_state(config, definition, optimizer, mesh)

  return make_train_step(config, definition, optimizer, mesh, fresh()), fresh


def run(steps=3, **options):
  step, fresh = program(**options)
  state, found = fresh(), []
  for _ in range(steps):
    state, metrics = step(state, TOKENS)
    found.append({name: float(value) for name, value in metrics.items()})
  return found, state


@pytest.mark.slow
@pytest.mark.parametrize("attention, kind, window", [("polar", "strong", 5), ("nope", "zipfian", None), ("rope", "weak", 5)])
def test_total_is_the_weighted_sum_and_reaches_the_parameters(attention, kind, window):
  """On every core the total is the weighted sum of its terms, and its gradient reaches every parameter."""
  config = recipe(attention, pattern=("local", "global"), regularizer=kind, regularizer_weight=0.25, distractors=6,
                  distractor_weight=0.5, sketch=8)
  config.model.window = window
  definition = ModelDefinition(config.model)
  params = {name: value + 0.1 * jax.random.normal(jax.random.key(i), value.shape)
            for i, (name, value) in enumerate(sorted(definition.init(jax.random.key(0)).items()))}

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    return auxiliary_loss(definition.merge(params), TOKENS, jax.random.key(3), config.train.auxiliary, z_loss=0.0, chunk=8)

  (total, terms), gradient = loss(params)
  np.testing.assert_allclose(total, 0.75 * terms["loss"] + 0.25 * terms["regularizer"] + 0.5 * terms["distractor"], rtol=1e-6)
  assert terms["regularizer"] > 0 and terms["distractor"] > 0
  assert all(np.isfinite(g).all() and np.any(g) for g in gradient.values())


@pytest.mark.slow
def test_polar_distractors_are_learned_away():
  """With a heavy weight, training lowers the mass that random keys take from the null."""
  found, _ = run(steps=8, distractors=16, distractor_weight=20.0)
  assert found[-1]["distractor"] < 0.7 * found[0]["distractor"]


@pytest.mark.slow
def test_same_seed_same_numbers_and_resumable():
  """The draws depend on seed and step alone, so that a restored state goes on as if it had never been interrupted."""
  options = {"distractors": 16, "distractor_weight": 20.0}
  found, _ = run(steps=3, **options)
  _, middle = run(steps=1, **options)
  step, _ = program(**options)
  restored = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), leaf.sharding), middle)
  _, metrics = step(restored, TOKENS)
  assert float(metrics["distractor"]) == found[1]["distractor"] and float(metrics["total"]) == found[1]["total"]


@pytest.mark.slow
def test_accumulation_equals_the_big_batch_for_distractors():
  options = {"distractors": 16, "distractor_weight": 20.0}
  (whole, *_), _ = run(steps=1, **options)
  (parts, *_), _ = run(steps=1, accumulation=2, **options)
  for name in ("loss", "distractor", "total", "grad_norm"):
    np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_off_is_the_step_without():
  """The weights of objectives that are off do not change the program, which then draws no random numbers."""
  def text(**auxiliary):
    step, fresh = program(**auxiliary)
    return step.lower(fresh(), TOKENS).as_text()

  off = text()
  assert text(regularizer_weight=0.5, distractor_weight=0.5, sketch=7) == off
  assert "threefry" not in off and "threefry" in text(distractors=16, distractor_weight=20.0)


def test_bad_options_are_named():
  with pytest.raises(UserError, match=r"config\.train\.auxiliary\.regularizer='strng'.*weak, strong"):
    recipe(regularizer="strng")
  config = copy.deepcopy(recipe())
  config.model.block_pattern, config.train.auxiliary.distractors = ("local",), 4
  with pytest.raises(UserError, match=r"config\.train\.auxiliary\.distractors=4: must be 0 in a model without global"):
    config.validate()

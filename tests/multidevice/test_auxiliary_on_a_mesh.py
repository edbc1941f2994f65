"""Auxiliary objectives on eight devices draw the same random numbers, and give the same losses, as on one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from atma_jax.config import AuxiliaryConfig, Config, DataConfig, MemoryConfig, ModelConfig, OptimizerConfig, TrainConfig
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.state import create_state, optimizer_for
from atma_jax.training.train_step import make_train_step

TOKENS = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)


def step_metrics(config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
  definition = ModelDefinition(config.model)
  optimizer = optimizer_for(config, definition)
  state = create_state(config, definition, optimizer, mesh)
  step = make_train_step(config, definition, optimizer, mesh, state)
  rng = np.random.default_rng(1)
  params = {name: jax.device_put(np.asarray(value) + 0.1 * rng.normal(size=value.shape).astype(np.float32), value.sharding)
            for name, value in sorted(state.params.items())}  # nothing is zero
  with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
    _, metrics = step(dataclasses.replace(state, params=params),
                      jax.device_put(TOKENS, named_sharding(mesh, ("batch", None))))
  return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_terms_equal_those_of_one_device():
  config = Config(
    model=ModelConfig(vocab_size=64, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=("local", "global"), attention="nope", memory=MemoryConfig(enabled=False),
                      activation_dtype="float32"),
    data=DataConfig(sequence_length=16, batch_size=8), optimizer=OptimizerConfig(kind="adamw"),
    train=TrainConfig(steps=10, auxiliary=AuxiliaryConfig(regularizer="zipfian", sketch=8, distractors=6))).validate()
  ours = step_metrics(config, make_mesh(data=1, fsdp=2, tensor=2, context=2))
  expected = step_metrics(config, make_mesh(devices=jax.devices()[:1]))
  for name in ("loss", "total", "regularizer", "distractor", "grad_norm"):
    np.testing.assert_allclose(ours[name], expected[name], rtol=2e-5, err_msg=name)  # sums in another order

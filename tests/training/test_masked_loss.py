"""The loss of conversations: the mean over the tokens that count, whatever the microbatches, and nothing of the others."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from atma_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from atma_jax.data.shards import MASKED, split_mask
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh
from atma_jax.training.state import create_state, optimizer_for
from atma_jax.training.train_step import make_train_step

CONFIG = Config(
  model=ModelConfig(vocab_size=64, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                    block_pattern=("local",), activation_dtype="float32"),
  data=DataConfig(sources=("chat:a.jsonl",), tokenizer="bytes", sequence_length=16, batch_size=4),
  optimizer=OptimizerConfig(kind="adamw", adamw_learning_rate=0.01), train=TrainConfig(steps=10))


def masked_tokens(share: float) -> np.ndarray:
  """Random tokens of which about `share` count; the first rows have more of them than the last."""
  rng = np.random.default_rng(0)
  tokens, draws = rng.integers(0, 64, (4, 17)), rng.random((4, 17)) * np.array([[0.5], [0.7], [1.3], [2.0]])
  return np.where(draws < share, tokens, tokens | MASKED).astype(np.uint32).view(np.int32)


def first_step(config: Config, tokens: np.ndarray):
  """The parameters before and after one step, and its metrics."""
  definition = ModelDefinition(config.model)
  optimizer, mesh = optimizer_for(config, definition), make_mesh(devices=jax.devices()[:1])
  state = create_state(config, definition, optimizer, mesh)
  before = jax.tree.map(np.asarray, state.params)
  state, metrics = make_train_step(config, definition, optimizer, mesh, state)(state, tokens)
  return before, state.params, metrics


def test_the_mean_is_over_what_counts():
  """Loss and gradient are those of the weighted mean over the whole batch, computed from logits, however many microbatches."""
  marked = masked_tokens(0.4)
  tokens, counts = split_mask(marked)

  @jax.jit
  @jax.value_and_grad
  def mean_loss(params):
    logits = jax.nn.log_softmax(ModelDefinition(CONFIG.model).merge(params)(tokens[:, :-1]))
    losses = -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(losses * counts[:, 1:]) / counts[:, 1:].sum()

  config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, accumulation=2))
  before, after, metrics = first_step(config, marked)
  loss, gradient = mean_loss(before)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], jnp.sqrt(sum(jnp.sum(g**2) for g in gradient.values())), rtol=1e-4)
  assert any(np.any(np.asarray(after[name]) != before[name]) for name in before)


def test_a_batch_without_answers():
  """It has loss zero and is no bad step."""
  _, _, metrics = first_step(CONFIG, masked_tokens(-1.0))
  assert float(metrics["loss"]) == float(metrics["grad_norm"]) == float(metrics["bad_steps"]) == 0

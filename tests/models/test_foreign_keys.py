"""Keys of other rows before a row's own: equal to longer rows of keys, never a row's own future, nothing outside training."""

from __future__ import annotations

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition, params_of
from atma_jax.models.mixers.attention import CORES, foreign_rows
from atma_jax.training.loop import foreign_keys_at

CONFIG = ModelConfig(vocab_size=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                     block_pattern=("local", "global"), activation_dtype="float32", null_length=4)


def lively(config: ModelConfig) -> dict[str, jax.Array]:
  """Parameters none of which is zero."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(ModelDefinition(config).init, jax.random.key(0))
  return {name: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32) for name, leaf in shapes.items()}


def config_of(attention: str) -> ModelConfig:
  return ModelConfig(**{**vars(CONFIG), "attention": attention})


def tokens(rows: int, length: int, seed: int = 1) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).integers(0, 64, (rows, length)), jnp.int32)


@pytest.mark.parametrize("count", [3, 8, 13])
def test_foreign_rows_are_the_following_rows(count):
  k = jnp.arange(4 * 8 * 2, dtype=jnp.float32).reshape(4, 8, 2, 1)
  found, _ = foreign_rows(k, -k, count)
  for row in range(4):
    following = np.concatenate([np.asarray(k)[(row + 1 + i) % 4] for i in range(3)])[:count]
    np.testing.assert_array_equal(found[row], following)


@pytest.mark.parametrize("attention", ["polar", "nope", "rope"])
def test_a_row_sees_others_but_not_its_own_future(attention):
  """With foreign keys the output depends on other rows; a token of the row itself still reaches none before it."""
  config = config_of(attention)
  params, x = lively(config), tokens(3, 8)
  model = ModelDefinition(config, foreign_keys=12).merge(params)
  base = model.hidden(x)
  assert np.abs(base - ModelDefinition(config).merge(params).hidden(x)).max() > 1e-3
  later = model.hidden(x.at[0, 5].set((x[0, 5] + 1) % 64))
  np.testing.assert_array_equal(later[0, :5], base[0, :5])
  assert np.abs(later[0, 5:] - base[0, 5:]).max() > 1e-3
  other = model.hidden(x.at[1, 5].set((x[1, 5] + 1) % 64))
  assert np.abs(other[0] - base[0]).max() > 1e-6


@pytest.mark.parametrize("attention", ["polar", "nope", "rope"])
def test_a_full_row_of_foreign_keys_is_a_row_twice_as_long(attention):
  """Attention over the next row's keys and its own is attention over both as one text, memory and convolutions aside."""
  config, rng = config_of(attention), np.random.default_rng(2)
  core = CORES[attention](config, rngs=nnx.Rngs(0))
  q, k, v = (jnp.asarray(rng.normal(size=(1, 16, heads, 8)), jnp.float32) for heads in (4, 2, 2))
  whole, *_ = core(q, k, v, None, None, None)
  halves, *_ = core(q[:, 8:], k[:, 8:], v[:, 8:], None, None, None, (k[:, :8], v[:, :8]))
  # Blocks of keys are cut elsewhere, which changes the order of sums of 16 terms: a few units of 2^-24.
  np.testing.assert_allclose(halves, whole[:, 8:], atol=2e-6)


def test_gradients_reach_the_other_rows():
  params, x = lively(CONFIG), tokens(3, 8)

  def loss(params: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum(ModelDefinition(CONFIG, foreign_keys=8).merge(params).hidden(x)[0] ** 2)

  gradients = jax.grad(loss)(params)
  chex.assert_tree_all_finite(gradients)
  embedding = next(value for name, value in gradients.items() if name.startswith("embed"))
  assert np.abs(embedding[np.setdiff1d(x[1], x[0])]).max() > 0


def test_too_few_rows_are_refused():
  with pytest.raises(ValueError, match="foreign_keys=9: must be at most 8"):
    foreign_rows(jnp.zeros((2, 8, 2, 1)), jnp.zeros((2, 8, 2, 1)), 9)


def test_a_restored_model_sees_no_foreign_keys():
  model = ModelDefinition(CONFIG, foreign_keys=8).merge(lively(CONFIG))
  plain = ModelDefinition(CONFIG).merge(params_of(model))
  x = tokens(3, 8)
  np.testing.assert_array_equal(plain.hidden(x)[0], plain.hidden(x.at[1:].set((x[1:] + 1) % 64))[0])


def recipe(**train) -> Config:
  return Config(model=CONFIG, data=DataConfig(sequence_length=8, batch_size=4), train=TrainConfig(**train))


@pytest.mark.parametrize(("train", "legal"), [
  ({"foreign_keys": ()}, "non-empty"), ({"foreign_keys": (0, -1)}, "at least 0"), ({"foreign_keys": (0, 25)}, "at most 24"),
  ({"foreign_keys": (8,), "accumulation": 4}, "at most 0")])
def test_bad_numbers_are_refused(train, legal):
  with pytest.raises(UserError, match=rf"config.train.foreign_keys=.*{legal}"):
    recipe(**train).validate()


def test_the_draw_depends_on_seed_and_step_alone():
  train = TrainConfig(foreign_keys=(0, 8, 16), seed=3)
  drawn = [foreign_keys_at(step, train) for step in range(1, 300)]
  assert drawn == [foreign_keys_at(step, train) for step in range(1, 300)]
  assert {drawn.count(n) > 60 for n in (0, 8, 16)} == {True}
  assert foreign_keys_at(5, TrainConfig(seed=-1)) == 0  # nothing is drawn from a single number

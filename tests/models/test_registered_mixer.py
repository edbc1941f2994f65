"""A mixer defined outside the package, as in a notebook: it trains, is saved and restored, decodes and is counted."""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.checkpoints.load import load_model
from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from atma_jax.errors import UserError
from atma_jax.models import layers, mixers
from atma_jax.models.cache import Cache, LayerCache
from atma_jax.models.definition import ModelDefinition, params_of
from atma_jax.models.mixers import Mixer, register_mixer
from atma_jax.models.operations import training_flops_per_token
from atma_jax.training.loop import DONE, train

KIND = "running_mean"
SENTENCES = "The quick brown fox number {} jumps over the lazy dog, {} times in a row, and then sleeps.\n"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningMeanCache(LayerCache):
  """The mean so far, (B, C)."""

  mean: jax.Array


class RunningMean(Mixer):
  """A decaying mean of each channel, ``m_t = a m_{t-1} + (1 - a) x_t``, and a projection."""

  def __init__(self, config, *, rngs):
    self.decay = layers.parameter(config, rngs, layers.zeros, (config.width,), ("vector",), "vector")
    self.out_proj = layers.Linear(config, config.width, config.width, ("embed", "mlp"), output=True, rngs=rngs)

  def __call__(self, x, cache=None, span=None, trace=None):
    real = jnp.ones(x.shape[:2], bool) if span is None else span.real(x.shape[1])
    decay = jax.nn.sigmoid(self.decay[...])

    def step(mean, inputs):
      x, real = inputs
      mean = jnp.where(real[:, None], decay * mean + (1 - decay) * x, mean)
      return mean, mean

    start = jnp.zeros((x.shape[0], x.shape[2]), x.dtype) if cache is None else cache.mean
    last, means = jax.lax.scan(step, start, (jnp.moveaxis(x, 1, 0), jnp.moveaxis(real, 1, 0)))
    return self.out_proj(jnp.moveaxis(means, 0, 1)), None if cache is None else RunningMeanCache(last)

  @classmethod
  def init_cache(cls, config, batch, rings):
    return RunningMeanCache(jnp.zeros((batch, config.width), config.activation_dtype))

  @classmethod
  def operations(cls, config, sequence_length):
    return 3 * config.width


@pytest.fixture(scope="module", autouse=True)
def registered():
  register_mixer(KIND)(RunningMean)
  yield
  del mixers.MIXERS[KIND]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Config:
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(12):
    (folder / f"{i}.txt").write_text("".join(SENTENCES.format(i, j * i) for j in range(12)))
  return Config(
    model=ModelConfig(vocab_size=257, num_layers=3, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=(KIND, "local"), activation_dtype="float32"),
    data=DataConfig(directory=str(folder / "prepared"), sources=(f"text:{folder}/*.txt",), tokenizer="bytes",
                    validation_documents=2, heldout_documents=1, shard_tokens=100_000, sequence_length=32, batch_size=4),
    train=TrainConfig(steps=2, log_every=1, checkpoint_every=2, validate_every=0)).validate()


def test_it_trains_is_restored_and_decodes(recipe, tmp_path):
  assert train(recipe, str(tmp_path)) == DONE
  model = load_model(tmp_path)[1]
  fresh, trained = ModelDefinition(recipe.model).init(jax.random.key(recipe.train.seed)), params_of(model)
  for group in ("groups", "tail"):
    name = f"{group}.blocks.0.mixer.out_proj.kernel"
    assert not np.array_equal(fresh[name], trained[name])

  tokens = np.random.default_rng(0).integers(0, 256, (2, 13)).astype(np.int32)
  full = nnx.jit(lambda model: model.hidden(tokens))(model)
  extend = nnx.jit(lambda model, tokens, cache, counts: model.extend(tokens, cache, counts))
  cache, start = Cache.create(model.config, 2, 16), 0
  for count in (8, 3, 1, 1):
    chunk = np.zeros((2, 8 if count > 1 else 1), np.int32)  # the second chunk is padded
    chunk[:, :count] = tokens[:, start:start + count]
    hidden, cache = extend(model, chunk, cache, jnp.full(2, count))
    np.testing.assert_allclose(hidden[:, :count], full[:, start:start + count], rtol=1e-5, atol=1e-5)
    start += count


def test_it_is_counted(recipe):
  """Two layers of three per channel, and everything that is a matrix or a filter."""
  definition = ModelDefinition(recipe.model)
  params = jax.eval_shape(definition.init, jax.random.key(0))
  products = sum(2 * math.prod(params[name].shape) for name, group in definition.optimizer_groups.items()
                 if group in ("muon", "muon_depthwise", "head"))
  assert training_flops_per_token(definition, 32) == 3 * (products + 2 * 3 * recipe.model.width)


def test_names_are_not_taken_twice_nor_invented():
  with pytest.raises(ValueError, match=r"mixer 'local' of .*: the name is taken by atma_jax\.models\.mixers\.local"):
    register_mixer("local")(RunningMean)
  with pytest.raises(UserError, match=r"model\.block_pattern='runing_mean'.*must be one of global, local, raven, running_mean"):
    Config(model=ModelConfig(block_pattern=("runing_mean",))).validate()

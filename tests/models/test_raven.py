"""Raven baselines: published parameter counts, sparse writes, decoding equal to the full pass, and their optimizer."""

from __future__ import annotations

import dataclasses
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atma_jax.cli import load_recipe
from atma_jax.config import ModelConfig, OptimizerConfig, RavenConfig
from atma_jax.errors import UserError
from atma_jax.models import Atma, count_parameters
from atma_jax.models.cache import Cache
from atma_jax.models.mixers.raven import RavenMixer
from atma_jax.training.optimizer import learning_rates, make_optimizer

CONFIGS = pathlib.Path(__file__).resolve().parent.parent.parent / "configs"
TINY = ModelConfig(vocab_size=61, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24,
                   block_pattern=("local", "raven"), raven=RavenConfig(slots=6, top_k=2), activation_dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 21)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> Atma:
  """A model in which no parameter is zero."""
  graphdef, params = nnx.split(Atma(TINY, rngs=nnx.Rngs(0)), nnx.Param)
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [p + 0.3 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys)]
  return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


@pytest.mark.parametrize("name, parameters", [("raven_native", 388_544_768), ("atma_raven_titans", 382_369_536)])
def test_published_parameter_counts(name, parameters):
  config = load_recipe(str(CONFIGS / f"{name}.py")).validate()
  assert count_parameters(config.model) == parameters
  assert (config.optimizer.kind, config.optimizer.adamw_learning_rate) == ("adamw", 3e-4)


def test_decoding_in_pieces_equals_the_full_pass(model):
  """Padded chunks and single steps equal the full pass, which is therefore causal; the state does not grow."""
  full = nnx.jit(lambda m, tokens: m.hidden(tokens))(model, TOKENS)
  extend = nnx.jit(lambda m, tokens, cache, counts: m.extend(tokens, cache, counts))
  cache, start = Cache.create(TINY, 2, 32), 0
  size = sum(leaf.size for leaf in jax.tree.leaves(cache))
  for width, count in ((8, 8), (8, 5), (8, 7), (1, 1)):
    tokens = np.zeros((2, width), np.int32)
    tokens[:, :count] = TOKENS[:, start:start + count]
    hidden, cache = extend(model, tokens, cache, jnp.full(2, count))
    np.testing.assert_allclose(hidden[:, :count], full[:, start:start + count], rtol=1e-4, atol=1e-5)
    start += count
  assert start == TOKENS.shape[1] and sum(leaf.size for leaf in jax.tree.leaves(cache)) == size


def test_a_token_touches_top_k_slots():
  trace = {}
  RavenMixer(TINY, rngs=nnx.Rngs(0))(jax.random.normal(jax.random.key(0), (2, 9, 16)), trace=trace)
  log_decay = np.asarray(trace["log_decay"])
  assert log_decay.shape == (2, 9, 4, 6) and (log_decay <= 0).all()
  np.testing.assert_array_equal((log_decay < 0).sum(-1), 2)


def test_adamw_recipe():
  """One cosine schedule from the end of the warmup to a tenth, and one weight decay, for every parameter."""
  config = OptimizerConfig(kind="adamw", schedule="cosine", warmup_steps=5, clip_norm=None, adam_b1=0.9, adam_eps=1e-15,
                           clip_basis="mean")
  rates = [float(learning_rates(config, 100, count)["adamw"]) for count in (0, 4, 5, 52, 100)]
  middle = 0.1 + 0.45 * (1 + np.cos(np.pi * 47 / 95))
  np.testing.assert_allclose(rates, 3e-4 * np.array([0.2, 1, 1, middle, 0.1]), rtol=1e-5)
  params = {"a": jnp.full((2, 3), 2.0), "b": jnp.ones(3)}
  optimizer = make_optimizer(config, 100, {"a": "muon", "b": "vector"}, 1)
  updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
  new = optax.apply_updates(params, updates)
  np.testing.assert_allclose(new["a"], 2 - 6e-5 * (1 + 0.1 * 2), rtol=1e-6)
  np.testing.assert_allclose(new["b"], 1 - 6e-5 * (1 + 0.1), rtol=1e-6)


def test_bad_options_are_named():
  config = load_recipe(str(CONFIGS / "raven_native.py"))
  config.model = dataclasses.replace(config.model, raven=RavenConfig(slots=4, top_k=5))
  with pytest.raises(UserError, match=r"config\.model\.raven\.top_k=5: must be at most model\.raven\.slots=4"):
    config.validate()

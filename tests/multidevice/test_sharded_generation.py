"""Generation with parameters and rows sharded over eight devices yields the tokens of one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models.definition import ModelDefinition, params_of
from atma_jax.sharding import make_mesh
from tests.small_model import SMALL, lively_model

SIZES = {"rows": 4, "capacity": 512, "chunk": 32, "first_chunk": 128, "max_buckets": 1}


@pytest.fixture(scope="module")
def one_device():
  """The model, prompts of up to several passes, their samplings, and the completions of one device."""
  model, rng = lively_model(), np.random.default_rng(1)
  prompts = [rng.integers(0, 256, n) for n in (1, 17, 40, 80, 400)]
  samplings = [Sampling(seed=i, max_tokens=20, top_p=0.9) for i in range(5)]
  return model, prompts, samplings, Engine(model, ByteTokenizer(), **SIZES).generate(prompts, samplings)


@pytest.mark.parametrize("mesh", [
  {"data": 4, "tensor": 2}, pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)], ids=str)
def test_sharding_changes_no_token(one_device, mesh):
  """Weights are sharded over tensor (and fsdp), rows over data (and fsdp), and nothing is compiled twice."""
  model, prompts, samplings, expected = one_device
  definition, mesh = ModelDefinition(SMALL), make_mesh(**mesh)
  abstract = definition.abstract_params(mesh)
  sharded = {name: jax.device_put(value, abstract[name].sharding) for name, value in params_of(model).items()}
  with jax.set_mesh(mesh):
    split = definition.merge(sharded)
  engine = Engine(split, ByteTokenizer(), **SIZES)
  completions = engine.generate(prompts, samplings)
  for one, eight in zip(expected, completions, strict=True):
    assert one.tokens == eight.tokens
    np.testing.assert_allclose(one.logprobs, eight.logprobs, atol=1e-4)
  assert engine.state.cache.layers["groups"][1].keys.sharding.shard_shape((1, 4, 2, 512, 8)) == (1, 1, 2, 512, 8)
  assert engine.programs.decode._cache_size() == engine.programs.place._cache_size() == 1
  with pytest.raises(UserError, match="rows=3: must be a multiple of the 4 parts"):
    Engine(split, ByteTokenizer(), rows=3)

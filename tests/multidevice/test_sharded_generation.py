"""Generation with parameters and rows over eight devices gives the tokens of one."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.models.definition import ModelDefinition, params_of
from atma_jax.sharding import make_mesh

CONFIG = ModelConfig(vocab_size=272, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                     block_pattern=("local", "global"), activation_dtype="float32")
SIZES = {"rows": 4, "capacity": 512, "chunk": 32, "first_chunk": 128, "max_buckets": 1}


@pytest.fixture(scope="module")
def one_device():
  """The model, prompts up to several passes long, how they go on, and what one device gives."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(CONFIG, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(1)
  model = nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5, jnp.float32), params))
  prompts = [rng.integers(0, 256, n) for n in (1, 17, 40, 80, 400)]
  samplings = [Sampling(seed=i, max_tokens=20, top_p=0.9) for i in range(5)]
  return model, prompts, samplings, Engine(model, ByteTokenizer(), **SIZES).generate(prompts, samplings)


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_sharding_changes_no_token(one_device, mesh):
  """Weights over tensor (and fsdp), rows over data (and fsdp); nothing is compiled a second time."""
  model, prompts, samplings, expected = one_device
  definition, mesh = ModelDefinition(CONFIG), make_mesh(**mesh)
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

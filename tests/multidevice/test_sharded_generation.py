"""Generation with parameters sharded over eight devices gives the tokens of one."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.sharding import make_mesh
from atma_jax.training.state import ModelDefinition, params_of

CONFIG = ModelConfig(vocab_size=272, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                     block_pattern=("local", "global"), activation_dtype="float32")


def test_sharded_parameters_change_no_token():
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(1)
  model = nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5, jnp.float32), params))
  definition, mesh = ModelDefinition(CONFIG), make_mesh(data=2, fsdp=2, tensor=2)
  abstract = definition.abstract_params(mesh)
  sharded = {name: jax.device_put(value, abstract[name].sharding) for name, value in params_of(model).items()}
  prompts = [rng.integers(0, 256, n) for n in (1, 17, 40, 80)]
  samplings = [Sampling(seed=i, max_tokens=20, top_p=0.9) for i in range(4)]
  expected = Engine(model, ByteTokenizer(), rows=2, capacity=128, chunk=32).generate(prompts, samplings)
  with jax.set_mesh(mesh):
    engine = Engine(definition.merge(sharded), ByteTokenizer(), rows=2, capacity=128, chunk=32)
    completions = engine.generate(prompts, samplings)
  for one, eight in zip(expected, completions, strict=True):
    assert one.tokens == eight.tokens
    np.testing.assert_allclose(one.logprobs, eight.logprobs, atol=1e-4)

"""One small lively model and what the inference tests make of it."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.checkpoints.store import Checkpointer
from atma_jax.config import Config, DataConfig, ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.models import Atma
from atma_jax.models.definition import params_of
from atma_jax.training.state import TrainState

CONFIG = ModelConfig(vocab_size=272, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                     block_pattern=("local", "global"), activation_dtype="float32")


@pytest.fixture(scope="session")
def lively():
  """Makes a model in which no parameter is zero, so that every path reaches the logits."""
  def make(config: ModelConfig = CONFIG) -> Atma:
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5, jnp.float32), params))

  return make


@pytest.fixture(scope="session")
def checkpoint(lively, tmp_path_factory):
  """A workdir with one step of the model, a byte tokenizer beside it."""
  workdir = tmp_path_factory.mktemp("workdir")
  checkpointer = Checkpointer(workdir, keep=1)
  zero = jnp.zeros((), jnp.int32)
  config = Config(name="lively", model=CONFIG, data=DataConfig(tokenizer="bytes"))
  checkpointer.save(1, TrainState(zero, params_of(lively()), {}, {}, zero, zero), config=config, tokenizer=ByteTokenizer(),
                    data_state={})
  checkpointer.close()
  return workdir

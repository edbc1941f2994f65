"""A small model in which every parameter matters, and a checkpoint of it, for the tests of inference and serving."""

from __future__ import annotations

from collections.abc import Callable
import pathlib

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

SMALL = ModelConfig(vocab_size=272, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                    block_pattern=("local", "global"), activation_dtype="float32")


def lively_model(config: ModelConfig = SMALL) -> Atma:
  """A model in which no parameter is zero, so that every path reaches the logits."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(1)
  return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5, jnp.float32), params))


@pytest.fixture(scope="session")
def lively() -> Callable[..., Atma]:
  """See `lively_model`."""
  return lively_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  """A working directory with one step of the small model and a byte tokenizer."""
  workdir = tmp_path_factory.mktemp("workdir")
  checkpointer = Checkpointer(workdir, keep=1)
  zero = jnp.zeros((), jnp.int32)
  config = Config(name="lively", model=SMALL, data=DataConfig(tokenizer="bytes"))
  checkpointer.save(1, TrainState(zero, params_of(lively_model()), {}, {}, zero, zero), config=config, tokenizer=ByteTokenizer(),
                    data_state={})
  checkpointer.close()
  return workdir

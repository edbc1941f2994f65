"""A tiny model with random parameters, inputs for suites, and losses computed directly from all logits."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
import jax
import numpy as np
import pytest

from atma_jax.config import Config, DataConfig, ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.evaluation.scoring import Scorer
from atma_jax.evaluation.suite import Inputs
from atma_jax.models import Atma
from atma_jax.sharding import make_mesh

REFERENCE = (4, 160)  # rows and tokens of the one program that all direct computations run


@pytest.fixture(scope="session")
def random_model() -> Atma:
  """Its head is random too; a fresh model's is zero."""
  config = ModelConfig(vocab_size=257, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                       block_pattern=("local", "global"), activation_dtype="float32")
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(1)
  return nnx.merge(graphdef, jax.tree.map(lambda p: jax.numpy.asarray(rng.normal(size=p.shape) * 0.4, p.dtype), params))


@pytest.fixture(scope="session")
def logits_of(random_model) -> Callable[[np.ndarray], np.ndarray]:
  """``rows (N, L) -> logits (N, L, V)``, computed in float32 and returned in float64; L is at most 160."""
  graphdef, state = nnx.split(random_model)
  call = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens), compiler_options={"xla_backend_optimization_level": 0})

  def logits(rows: np.ndarray) -> np.ndarray:
    found = []
    for start in range(0, len(rows), REFERENCE[0]):
      part = rows[start:start + REFERENCE[0]]
      padded = np.zeros(REFERENCE, np.int32)
      padded[:len(part), :part.shape[1]] = part
      found.append(np.asarray(call(state, padded), np.float64)[:len(part), :part.shape[1]])
    return np.concatenate(found)

  return logits


@pytest.fixture(scope="session")
def losses_of(logits_of) -> Callable[[np.ndarray], np.ndarray]:
  """``rows (N, L + 1) -> losses (N, L)`` in nats of all tokens but the first."""

  def losses(rows: np.ndarray) -> np.ndarray:
    logits = logits_of(rows[:, :-1])
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]

  return losses


@pytest.fixture(scope="session")
def inputs_of(random_model) -> Callable[..., Inputs]:
  """``(documents, lengths, **options of the scorer) -> Inputs`` on one device."""

  def make(documents: list[str], lengths: tuple[int, ...], *, batch_tokens: int = 320, **scorer_options) -> Inputs:
    tokenizer, mesh = ByteTokenizer(), make_mesh(devices=jax.devices()[:1])
    config = Config(model=random_model.config, data=DataConfig(sequence_length=lengths[0]))
    texts = [tokenizer.encode(document) for document in documents]
    scorer = Scorer(random_model, mesh, batch_tokens=batch_tokens, chunk=32, **scorer_options)
    return Inputs(scorer, tokenizer, texts, np.concatenate(texts), lengths, seed=0, min_documents=1, config=config,
                  model=random_model, mesh=mesh, trials=24)

  return make

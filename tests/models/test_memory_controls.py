"""Controls of what a model reads: a memory that begins again, one that is left out, and attention to the last keys only."""

from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.models import Atma, memory
from atma_jax.models.cache import Cache
from atma_jax.models.definition import reconfigured
from atma_jax.models.memory import Memory
from atma_jax.ops import gated_delta
from atma_jax.ops.gated_delta import pallas_gpu, pallas_tpu

CONFIG = ModelConfig(vocab_size=61, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                     block_pattern=("global",), memory=MemoryConfig(gamma_bias=5.0), activation_dtype="float32")
T = 96


@pytest.fixture(scope="module")
def model() -> Atma:
  """A model in which no parameter is zero."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(1)
  return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, p.dtype), params))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
  return np.random.default_rng(2).integers(0, 61, (2, T)).astype(np.int32)


def hidden(model: Atma, tokens: np.ndarray) -> np.ndarray:
  graphdef, state = nnx.split(model)
  return np.asarray(jax.jit(lambda state, tokens: nnx.merge(graphdef, state).hidden(tokens))(state, tokens))


@pytest.mark.parametrize("implementation, every", [("xla", 7), ("xla", 32), ("xla", 80), ("reference", 32)])
def test_a_reset_memory_is_that_of_separate_documents(implementation, every):
  config = dataclasses.replace(CONFIG, implementation=implementation)
  inputs = jax.random.normal(jax.random.key(0), (2, T, 16))
  q, k, v = (jax.random.normal(jax.random.key(i), (2, T, n, 8)) for i, n in ((1, 2), (2, 1), (3, 1)))

  def read(config: ModelConfig, start: int, stop: int) -> tuple[jax.Array, jax.Array]:
    module, x, part = Memory(config, rngs=nnx.Rngs(0)), inputs[:, start:stop], slice(start, stop)
    return module.read((module.gamma(x), module.beta(x), module.gate(x)), q[:, part], k[:, part], v[:, part], None, None, None)

  found, state = read(dataclasses.replace(config, memory_reset=every), 0, T)
  pieces, states = zip(*(read(config, start, min(start + every, T)) for start in range(0, T, every)))
  rounding = np.spacing(np.float32(40 * max(1, 64 // every)))  # of the summed log-decays of a chunk of 64
  np.testing.assert_allclose(found, np.concatenate(pieces, axis=1), atol=2e-5 + 4 * rounding)
  np.testing.assert_allclose(state, states[-1], atol=2e-5)
  assert not np.allclose(found, read(config, 0, T)[0], atol=1e-2)


@pytest.mark.parametrize("changes", [{"memory_reset": 20}, {"memory_off": True}, {"memory_reset": 32, "window": 24}])
def test_pieces_and_single_steps_obey_as_whole_sequences_do(model, tokens, changes):
  """Rows of a cache may stand at different places: the second one begins 5 tokens later."""
  controlled = reconfigured(model, **changes)
  graphdef, state = nnx.split(controlled)
  extend = jax.jit(lambda state, tokens, cache, counts: nnx.merge(graphdef, state).extend(tokens, cache, counts))
  whole = hidden(controlled, tokens)
  assert not np.allclose(whole, hidden(model, tokens), atol=1e-2)
  cache, seen = Cache.create(controlled.config, 2, T), np.zeros(2, int)
  for width, counts in ((48, (48, 43)), *((1, (1, 1)),) * 4, (40, (40, 40))):
    part = np.zeros((2, width), np.int32)
    for row, count in enumerate(counts):
      part[row, :count] = tokens[row, seen[row]:seen[row] + count]
    found, cache = extend(state, part, cache, jnp.asarray(counts))
    for row, count in enumerate(counts):
      np.testing.assert_allclose(found[row, :count], whole[row, seen[row]:seen[row] + count], atol=3e-4)
    seen += counts


def test_a_window_shows_the_last_keys_and_nothing_else(model, tokens):
  """With the memory off, one block reads `window` keys, each of a token and its convolution's taps."""
  window, taps = 16, CONFIG.canon_taps
  controlled = reconfigured(model, window=window, memory_off=True)
  changed = tokens.copy()
  changed[:, 40] = (changed[:, 40] + 1) % 61
  differs = np.abs(hidden(controlled, tokens) - hidden(controlled, changed)).max(axis=(0, 2)) > 1e-6
  last = 40 + (window - 1) + (taps - 1)
  assert differs[40] and differs[40 + window - 1] and not differs[:40].any() and not differs[last + 1:].any()
  everything = np.abs(hidden(model, tokens) - hidden(model, changed)).max(axis=(0, 2)) > 1e-6
  assert everything[40:].all()


@pytest.mark.parametrize("kernel", [pallas_gpu.gated_delta, pallas_tpu.gated_delta])
def test_kernels_forget_at_a_reset(kernel):
  """Readouts after the log-decay of a reset are those from a state of zero."""
  rng, steps, place = np.random.default_rng(0), 80, 50
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, 1, steps, 2, 64)))
  gates = {"log_gamma": np.full((1, steps, 2), -0.05), "beta": np.full((1, steps, 2), 0.5)}
  gates["log_gamma"][:, place] = memory.FORGETS
  arrays = {"q": q, "k": k, "v": rng.normal(size=(1, steps, 2, 64)), **gates}
  arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
  readout, state = kernel(**arrays, initial_state=jnp.asarray(rng.normal(size=(1, 2, 64, 64)), jnp.float32), interpret=True)
  after, last = gated_delta(**{name: x[:, place:] for name, x in arrays.items()}, implementation="reference")
  np.testing.assert_allclose(readout[:, place:], after, atol=5e-5)
  np.testing.assert_allclose(state, last, atol=5e-5)

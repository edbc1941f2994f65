"""Unrolled decoding, as on a GPU or TPU, run on the CPU with its kernels in interpret mode."""

from __future__ import annotations

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models.cache import Cache
from atma_jax.ops.core import dispatch
from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.gated_delta import pallas_gpu as delta_kernel
from atma_jax.ops.gated_delta import step_gpu as step_kernel
from atma_jax.ops.polar_attention.cached import pallas_gpu as attention_kernel
from atma_jax.ops.polar_attention.cached import pallas_tpu as tpu_kernels

BASE = ModelConfig(vocab_size=272, num_layers=5, width=32, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=32,
                   block_pattern=("local", "global"), activation_dtype="float32")
CASES = {
  "polar": {},
  "polar-window-bare": {"window": 11, "memory": MemoryConfig(enabled=False)},
  "rope": {"attention": "rope", "block_pattern": ("global", "local"), "num_layers": 3},
}
KERNELS = [(attention_kernel, "cached_statistics"), (step_kernel, "gated_delta_step"), (tpu_kernels, "cached_statistics"),
           (tpu_kernels, "append")]
QUICK = {"xla_backend_optimization_level": 0}  # compilation is most of these tests' time


@pytest.fixture
def pretend(monkeypatch):
  """``pretend("gpu")`` reports a GPU to the dispatch and runs the kernels of decoding in interpret mode; prefill uses XLA."""
  def pretend(platform: str) -> None:
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    monkeypatch.setattr(kernels, "unrounded", lambda: jax.lax.Precision.HIGHEST)
    monkeypatch.setattr(delta_kernel, "supports", lambda *args, **kwargs: "is not of this test")
    for module, name in KERNELS:
      monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))

  return pretend


def full_logits(model, tokens):
  return np.asarray(jax.jit(lambda tokens: model(tokens), compiler_options=QUICK)(tokens))


@pytest.mark.parametrize("name, platform, fuse", [
  pytest.param("polar", "gpu", True, marks=pytest.mark.slow), ("polar-window-bare", "gpu", True),
  pytest.param("rope", "gpu", True, marks=pytest.mark.slow), pytest.param("polar", "tpu", False, marks=pytest.mark.slow)])
def test_decoding_equals_the_full_forward_pass(name, platform, fuse, lively, pretend):
  """Rows of different lengths, decoded token by token with and without fused projections, have the logits of the full pass; a row
  without a new token does not change."""
  model = lively(dataclasses.replace(BASE, **CASES[name]))
  tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
  full = full_logits(model, tokens)
  pretend(platform)
  graphdef, state = nnx.split(model.unstacked(fuse))

  @functools.partial(jax.jit, donate_argnums=1, compiler_options=QUICK)
  def step(state, cache, tokens, counts):
    model = nnx.merge(graphdef, state)
    assert model.unrolls_decoding(cache)
    hidden, cache = model.extend(tokens, cache, counts)
    return model.head(hidden)[:, 0], cache

  cache, seen = Cache.create(model.config, 2, 24), np.zeros(2, np.int32)
  for i in range(24):
    counts = np.array([1, i % 3 != 0], np.int32)
    logits, cache = step(state, cache, tokens[[0, 1], seen][:, None], counts)
    for row in np.flatnonzero(counts):
      np.testing.assert_allclose(logits[row], full[row, seen[row]], atol=3e-4)
    seen += counts
  np.testing.assert_array_equal(cache.lengths, seen)


@pytest.mark.slow
def test_the_engine(lively, pretend):
  """With pages, greedy and drawn rows get the tokens of the other path from two programs, one for batches in which a row filters
  tokens and one for the others."""
  model = lively(BASE)
  prompts = [np.random.default_rng(i).integers(0, 256, n).astype(np.int32) for i, n in enumerate((1, 40, 150, 17))]
  samplings = [Sampling(temperature=t, top_k=k, seed=i, max_tokens=7 + i, ignore_end=True)
               for i, (t, k) in enumerate(((0, 0), (1, 0), (1, 9), (0, 0)))]
  sizes = {"rows": 2, "capacity": 192, "chunk": 16, "decode_steps": 3}
  expected = Engine(model, ByteTokenizer(), **sizes, max_buckets=1).generate(prompts, samplings)
  pretend("gpu")
  engine = Engine(model, ByteTokenizer(), **sizes, pages=4, page=64)
  assert engine.buckets == [192] and engine.programs.decode._cache_size() == 0
  engine.warm_up()
  programs = engine.programs.decode._cache_size(), engine.programs.prefill._cache_size()
  assert programs == (2, 1)
  for ours, theirs in zip(engine.generate(prompts, samplings), expected, strict=True):
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=3e-4)
  assert (engine.programs.decode._cache_size(), engine.programs.prefill._cache_size()) == programs

"""Keys and values in pages that requests share: results equal those of rings of their own, and only the memory differs."""

from __future__ import annotations

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.footprint import Pages, pages_within, sizes_within
from atma_jax.inference.sampling import Sampling
from atma_jax.models.cache import Cache, nbytes

GREEDY = Sampling(temperature=0, max_tokens=20, ignore_end=True)


@pytest.fixture(scope="module")
def model(lively):
  return lively()


@pytest.mark.parametrize(("page", "window", "dtype"), [
  (8, None, None), pytest.param(32, None, "int8", marks=pytest.mark.slow), pytest.param(8, 13, None, marks=pytest.mark.slow)])
def test_paged_equals_contiguous(lively, model, page, window, dtype):
  """Rows of different lengths, extended by single tokens and by chunks, have the same logits and rings wherever their pages lie.

  Two programs may round float32 sums differently, which may move an int8 to the next number.
  """
  if window:
    model = lively(dataclasses.replace(model.config, window=window))
  graphdef, state = nnx.split(model)

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def extend(state, tokens, cache, counts):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.extend(tokens, cache, counts)
    return model.head(hidden), cache

  rng = np.random.default_rng(0)
  rings = Cache.create(model.config, 2, 60, dtype, page=page)
  paged = Cache.create(model.config, 2, 60, dtype, page=page, pages=20)
  rows, need = paged.table.shape
  table = jnp.asarray(rng.permutation(20)[: rows * need].reshape(rows, need), jnp.int32)
  _, rings = extend(state, rng.integers(0, 256, (2, 16)), rings, np.array([16, 5], np.int32))
  paged = paged.put(jnp.arange(2), rings, table)
  for counts, width in (([1, 1], 1), ([9, 16], 16), ([1, 0], 1), ([0, 1], 1), ([1, 1], 1), ([16, 3], 16), ([1, 1], 1)):
    tokens, counts = rng.integers(0, 256, (2, width)), np.asarray(counts, np.int32)
    expected, rings = extend(state, tokens, rings, counts)
    logits, paged = extend(state, tokens, paged, counts)
    for row, count in enumerate(counts):
      np.testing.assert_allclose(logits[row, :count], expected[row, :count], atol=1e-5)
  np.testing.assert_array_equal(paged.lengths, rings.lengths)
  ours, theirs = (cache.layers["groups"][1] for cache in (paged, rings))
  for name in ("keys", "values", *(["key_scale"] if dtype else [])):
    pool, ring = getattr(ours, name), getattr(theirs, name)
    gathered = jnp.moveaxis(pool[:, table], 3, 2).reshape(ring.shape)
    np.testing.assert_allclose(gathered, ring, atol=1 if ring.dtype == jnp.int8 else 1e-5)


def prompts(count: int, seed: int) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, rng.integers(1, 90)).astype(np.int32) for _ in range(count)]


@pytest.mark.slow
def test_the_engine_queues_for_pages(model):
  """With half the pages that all rows could need, and some requests cancelled, every request gets the tokens that it gets with
  rings of its own; nothing is compiled on the way, no page has two owners, and all pages are free in the end."""
  options = {"rows": 4, "capacity": 128, "chunk": 16, "decode_steps": 4, "prefixes": 2, "max_buckets": 1}
  starts = prompts(16, 1)
  samplings = [dataclasses.replace(GREEDY, max_tokens=1 + 5 * (i % 8), temperature=i % 2, seed=i) for i in range(16)]
  expected = Engine(model, ByteTokenizer(), **options).generate(starts, samplings)
  engine = Engine(model, ByteTokenizer(), **options, pages=16, page=16)
  engine.warm_up()
  compiled = [f._cache_size() for f in engine.programs[:5]]
  names = [engine.submit(prompt, sampling) for prompt, sampling in zip(starts, samplings)]
  tokens, reasons, cancelled, waited = {name: [] for name in names}, {}, names[3::5], False
  while engine.busy:
    outputs = engine.step()
    if engine.counts["decoding"] > 1:
      outputs += [output for name in cancelled if (output := engine.cancel(name)) is not None]
    for output in outputs:
      tokens[output.request] += [output.token] * (output.token is not None)
      reasons |= {output.request: output.finish_reason} if output.finish_reason else {}
    running = [r for r in (*engine.decoding, *engine.prefilling.values()) if r is not None]
    held = [page for r in running for page in r.pages if page < 16]
    assert len(held) == len(set(held)) == 16 - engine.pages.free
    assert all(sum(r.pages < 16) == -(-(len(r.prompt) + r.sampling.max_tokens - 1) // 16) for r in running)
    waited |= engine.counts["waiting"] > 0 and len(running) < 4
  assert waited and engine.pages.free == 16 and reasons.keys() == set(names)
  for name, completion in zip(names, expected, strict=True):
    assert tokens[name] == completion.tokens[: len(tokens[name])]
    assert (reasons[name] == "cancelled") == (name in cancelled)
    assert reasons[name] == "cancelled" or len(tokens[name]) == len(completion.tokens)
  assert [f._cache_size() for f in engine.programs[:5]] == compiled


@pytest.mark.slow
def test_a_window_needs_its_pages_at_most(lively, model):
  """Prompt and text may be many times as long as the pages that a window needs, beside a request that needs few."""
  windowed = lively(dataclasses.replace(model.config, window=30))
  starts = [np.random.default_rng(7).integers(0, 256, n) for n in (150, 5)]
  options = {"rows": 2, "capacity": 30, "chunk": 16, "decode_steps": 5}
  expected = Engine(windowed, ByteTokenizer(), **options).generate(starts, GREEDY)
  engine = Engine(windowed, ByteTokenizer(), **options, pages=7, page=8)
  assert (engine.pages.most, engine.pages.needed(170), engine.pages.needed(24)) == (4, 4, 3)
  for ours, theirs in zip(engine.generate(starts, GREEDY), expected, strict=True):
    assert ours.tokens == theirs.tokens
  assert engine.pages.free == 7


def test_pages_are_taken_and_given_back():
  pages = Pages(5, 16, 3)
  first, second = pages.take(2), pages.take(3)
  assert sorted([*first[:2], *second]) == [0, 1, 2, 3, 4] and first[2] == 5 and pages.take(1) is None
  pages.give_back(first)
  assert pages.free == 2 and set(pages.take(2)[:2]) == set(first[:2])
  assert [pages.needed(n) for n in (1, 16, 17, 99)] == [1, 1, 2, 3]


def test_pages_fit_the_memory(model):
  """Sizes are counted to the byte, and impossible ones are refused with the least that works."""
  config = model.config
  row = nbytes(jax.eval_shape(lambda: Cache.create(config, 1, 128)))
  size = functools.partial(pages_within, config, rows=4, page=16, capacity=128, prefixes=1)
  for gib in (12 * row / 2**30, 5.5 * row / 2**30):
    pages = size(gib)
    taken = nbytes(jax.eval_shape(lambda pages=pages: Cache.create(config, 4, 128, page=16, pages=pages))) + 3 * row
    assert 8 <= pages <= 32 and taken <= gib * 2**30
  assert size(12 * row / 2**30) == 32 and size(5.5 * row / 2**30) < 32
  with pytest.raises(UserError, match=r"cache_gib=1e-06: 4 rows, 1 kept prefixes .* 8 pages of 16 tokens, .* at least"):
    size(1e-6)
  assert sizes_within(config, None, rows=3, page=None, shards=1, capacity=128) == {"rows": 3}
  assert sizes_within(config, 12 * row / 2**30, rows=3, page=None, shards=2, capacity=128) == {"rows": 20}
  assert sizes_within(config, 12 * row / 2**30, rows=4, page=16, shards=1, capacity=128, prefixes=1)["pages"] == 32
  raven = ModelConfig(block_pattern=("raven",), memory=MemoryConfig(enabled=False))
  for arguments, words in (((config, None, 16), "page=16: needs cache_gib"), ((config, 1.0, 24), "page=24: must be a power"),
                           ((raven, 1.0, 16), "keeps no keys and values")):
    with pytest.raises(UserError, match=words):
      sizes_within(arguments[0], arguments[1], rows=1, page=arguments[2], shards=1, capacity=128)
  for options, words in (({"pages": 7, "page": 16}, "pages=7: must be at least 8"), ({"pages": 8, "page": 20}, "page=20")):
    with pytest.raises(UserError, match=words):
      Engine(model, ByteTokenizer(), rows=1, capacity=128, **options)

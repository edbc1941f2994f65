"""Cached inference equals the full forward pass, however the tokens are cut and batched."""

from __future__ import annotations

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.errors import UserError
from atma_jax.inference.saved_state import load_state, save_state
from atma_jax.models import Atma
from atma_jax.models.cache import Cache, nbytes
from atma_jax.ops.core import streaming
from atma_jax.ops.gated_delta import reference
from atma_jax.ops.gated_delta.step import gated_delta_step
from atma_jax.ops.polar_attention.cached import api as cached_attention
from atma_jax.pytorch import from_state_dict, model_config, read_state_dict

TINY = ModelConfig(vocab_size=61, num_layers=4, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48,
                   block_pattern=("local", "global"), activation_dtype="float32")
QUICK = {"xla_backend_optimization_level": 0}  # compilation is most of these tests' time
LENGTH = 37
TOKENS = np.random.default_rng(0).integers(0, 61, (2, LENGTH)).astype(np.int32)
CHUNKS = ([1] * LENGTH, [16, 16, 5], [9, 1, 1, 16, 10])

BARE = MemoryConfig(enabled=False)
CASES = {
  "polar": {"null_length": 17},
  "polar-counts": {"count_length": 11, "num_layers": 2},
  "polar-published": {"num_layers": 9, "block_pattern": ("local", "local", "global", "local"), "init": "published",
                      "num_kv_heads": 1},
  "polar-window-bare-inlined": {"window": 5, "count_length": 3, "direction_scale": 2.5, "memory": BARE, "num_layers": 5,
                                "scan": False},
  "nope": {"attention": "nope", "num_kv_heads": 4},
  "nope-window": {"attention": "nope", "window": 11},
  "rope-bare": {"attention": "rope", "memory": BARE},
  "rope-window": {"attention": "rope", "window": 7},
}
ALL_CASES = [pytest.param(name, marks=() if name == "polar" else pytest.mark.slow) for name in CASES]
THREE_CASES = [case for case in ALL_CASES if case.values[0] in ("polar", "nope-window", "rope-window")]


def lively(config: ModelConfig, dtype: str = "float32") -> Atma:
  """A model in which no parameter is zero, so that every path reaches the logits."""
  config = dataclasses.replace(config, activation_dtype=dtype)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(1)
  return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, dtype), params))


def full_logits(model: Atma, tokens: np.ndarray) -> np.ndarray:
  graphdef, state = nnx.split(model)
  return np.asarray(jax.jit(lambda state: nnx.merge(graphdef, state)(tokens), compiler_options=QUICK)(state))


def extender(model: Atma):
  """``extend(tokens, cache, counts, cache_slots) -> (logits, cache)``, compiled."""
  graphdef, state = nnx.split(model)

  @functools.partial(jax.jit, compiler_options=QUICK, static_argnames="cache_slots")
  def extend(state, tokens, cache, counts, cache_slots):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.extend(tokens, cache, counts, cache_slots=cache_slots)
    return model.head(hidden), cache

  return lambda tokens, cache, counts=None, cache_slots=None: extend(state, tokens, cache, counts, cache_slots)


def in_chunks(extend, cache: Cache, tokens: np.ndarray, chunks: list[int], width: int) -> tuple[np.ndarray, Cache]:
  """Extends a cache by chunks: single tokens as they are, longer ones padded to `width`, so two programs serve all."""
  logits = []
  for part in np.split(tokens, np.cumsum(chunks)[:-1], axis=1):
    count = part.shape[1]
    padded = np.pad(part, ((0, 0), (0, width - count if count > 1 else 0)), constant_values=60)
    new, cache = extend(padded, cache, np.full(len(tokens), count, np.int32))
    logits.append(new[:, :count])
  return np.concatenate(logits, 1), cache


@functools.cache
def prepared(name: str):
  """The model of a case, its logits of the full pass over `TOKENS`, and its compiled `extend`, all in float64."""
  model = lively(dataclasses.replace(TINY, **CASES[name]), "float64")
  return model, full_logits(model, TOKENS), extender(model)


@pytest.mark.parametrize("name", ALL_CASES)
def test_chunks_equal_the_full_forward_pass(name, x64):
  """The logits are equal in float64 however the tokens are cut, and so are the caches that are left."""
  (model, full, extend), caches = prepared(name), []
  assert np.abs(full).max() > 0.5
  for chunks in CHUNKS:
    logits, cache = in_chunks(extend, Cache.create(model.config, 2, LENGTH), TOKENS, chunks, 16)
    np.testing.assert_allclose(logits, full, atol=1e-9)
    caches.append(cache)
  for cache in caches[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), caches[0], cache)


@pytest.mark.parametrize("name", THREE_CASES)
def test_the_ops_of_the_full_pass_fill_an_empty_cache(name, x64):
  """A padded first chunk, told that nothing came before it, leaves the cache that small chunks leave."""
  model, full, extend = prepared(name)
  counts = np.array([30, 21], np.int32)
  logits, cache = extend(np.pad(TOKENS[:, :30], ((0, 0), (0, 2))), Cache.create(model.config, 2, LENGTH), counts, 0)
  for row, count in enumerate(counts):
    np.testing.assert_allclose(logits[row, :count], full[row, :count], atol=1e-9)
    rest = TOKENS[[row, row], count : count + 16]
    after, _ = in_chunks(extend, cache.take(np.array([row, row])), rest, [rest.shape[1]], 16)
    np.testing.assert_allclose(after[0], full[row, count : count + 16], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["polar_mem1", "polar_mem0", "nope_mem1", "rope_mem1"])
def test_published_checkpoints_in_chunks(name, golden, x64):
  """Cached inference reproduces the float64 logits of the published code."""
  folder = golden.folder / f"checkpoint_{name}_win0"
  expected = golden(f"checkpoint_{name}_win0/expected.npz")
  tensors = read_state_dict(folder / "weights.pt")
  config = model_config(folder / "config.json", tensors)
  config.activation_dtype = config.param_dtype = "float64"
  extend, tokens = extender(from_state_dict(tensors, config)), expected["tokens"].astype(np.int32)
  logits, _ = in_chunks(extend, Cache.create(config, 2, 70), tokens, [16, 9, 16, 13, 16], 16)
  np.testing.assert_allclose(logits, expected["logits"], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["polar-published"])
def test_float32_error_is_that_of_the_full_pass(name, x64):
  """The error of cached float32 inference against float64 is that of the full float32 pass, up to a small factor."""
  _, exact, _ = prepared(name)
  model = lively(dataclasses.replace(TINY, **CASES[name]))
  full, extend = np.abs(full_logits(model, TOKENS) - exact).max(), extender(model)
  assert 0 < full < 1e-3
  for chunks in CHUNKS:
    logits, _ = in_chunks(extend, Cache.create(model.config, 2, LENGTH), TOKENS, chunks, 16)
    assert logits.dtype == np.float32
    assert np.abs(logits - exact).max() < 4 * full


@pytest.mark.parametrize("name", THREE_CASES)
def test_rows_of_different_lengths(name, x64):
  """Padding on the right, and calls in which a row has no new tokens, change nothing."""
  model, full, extend = prepared(name)
  cache, seen = Cache.create(model.config, 2, LENGTH), np.zeros(2, np.int32)
  for counts in ([7, 1], [0, 16], [8, 3], [1, 0], [5, 16]):
    counts = np.asarray(counts, np.int32)
    chunk = np.full((2, 16), 60, np.int32)
    for row in range(2):
      chunk[row, : counts[row]] = TOKENS[row, seen[row] : seen[row] + counts[row]]
    logits, cache = extend(chunk, cache, counts)
    for row in range(2):
      expected = full[row, seen[row] : seen[row] + counts[row]]
      np.testing.assert_allclose(logits[row, : counts[row]], expected, atol=1e-9)
    seen += counts
  np.testing.assert_array_equal(cache.lengths, seen)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "chunks"), [(None, [400, 1, 1, 298]), (300, [255, 2, 143, 300])])
def test_longer_than_a_block(window, chunks, x64):
  """The cache and the chunk span several key blocks, and the ring wraps around."""
  tokens = np.random.default_rng(2).integers(0, 61, (1, 700)).astype(np.int32)
  model = lively(dataclasses.replace(TINY, window=window, num_layers=2), "float64")
  logits, cache = in_chunks(extender(model), Cache.create(model.config, 1, 700), tokens, chunks, 400)
  np.testing.assert_allclose(logits, full_logits(model, tokens), atol=1e-9)
  assert cache.layers["groups"][1].keys.shape[3] == (768 if window is None else 512)


def test_rows_are_taken_put_and_forked(x64):
  """Gathered rows continue the sequences they hold, and nothing of a replaced row remains."""
  model, full, extend = prepared("polar")
  empty = Cache.create(model.config, 2, LENGTH)
  _, cache = in_chunks(extend, empty, TOKENS[:, :21], [16, 5], 16)

  def goes_on_from(cache: Cache, rows: list[int], start: int) -> None:
    logits, _ = in_chunks(extend, cache, TOKENS[rows, start : start + 16], [16], 16)
    np.testing.assert_allclose(logits, full[rows, start : start + 16], atol=1e-9)

  goes_on_from(cache.take(np.array([1, 0])), [1, 0], 21)
  goes_on_from(cache.take(np.array([1, 1])), [1, 1], 21)
  goes_on_from(cache.put(np.array([1]), cache.take(np.array([0]))), [0, 0], 21)
  goes_on_from(cache.put(np.array([0, 1]), empty), [0, 1], 0)


@pytest.mark.parametrize(("name", "dtype"), [
  ("polar", None), ("nope-window", None), pytest.param("rope-bare", "int8", marks=pytest.mark.slow),
  pytest.param("polar", "bfloat16", marks=pytest.mark.slow)])
def test_a_stored_state_is_continued(name, dtype, tmp_path, x64):
  """A state restored from disk into a cache of any capacity is equal bit for bit, and so is what follows."""
  model, _, extend = prepared(name)
  config = model.config
  _, cache = in_chunks(extend, Cache.create(config, 2, LENGTH, dtype), TOKENS[:, :21], [16, 5], 16)
  row, path = cache.take(np.array([1])), tmp_path / "state.npz"
  save_state(path, TOKENS[1, :21], row, config)
  tokens, restored = load_state(path, config, LENGTH, dtype)
  np.testing.assert_array_equal(tokens, TOKENS[1, :21])
  slots = 21 if config.window is None else None  # beyond them, what padding left behind
  for old, new in zip(jax.tree.leaves(row), jax.tree.leaves(restored), strict=True):
    ring = old.ndim > 3 and old.shape[3] == row.layers["groups"][1].slots
    np.testing.assert_array_equal(old[:, :, :, :slots] if ring else old, new[:, :, :, :slots] if ring else new)
  _, larger = load_state(path, config, 100, dtype)
  both = [in_chunks(extender(model), jax.tree.map(lambda x: x, c), TOKENS[1:, 21:22], [1], 1)[0] for c in (row, larger)]
  np.testing.assert_allclose(*both, atol=1e-9)
  assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_state_is_refused(tmp_path):
  """Another model, another dtype, too little room, damage and a missing file are each refused in one line."""
  path, tokens = tmp_path / "state.npz", np.arange(9, dtype=np.int32)
  cache = dataclasses.replace(Cache.create(TINY, 1, 16), lengths=jnp.array([9]))
  save_state(path, tokens, cache, TINY)
  assert load_state(path, dataclasses.replace(TINY, scan=False), 16)[1].lengths == 9
  for config, capacity, dtype, words in (
      (dataclasses.replace(TINY, attention="nope"), 16, None, "another model: it differs in attention"),
      (TINY, 8, None, "9 tokens, more than the 8"), (TINY, 16, "int8", "keys is float32, not int8")):
    with pytest.raises(UserError, match=words):
      load_state(path, config, capacity, dtype)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  for bad in (bytes(content), bytes(content[: len(content) // 2]), b"", b"text"):
    path.write_bytes(bad)
    with pytest.raises(UserError, match="not a saved state, or damaged"):
      load_state(path, TINY, 16)
  with pytest.raises(UserError, match="No such file"):
    load_state(tmp_path / "absent", TINY, 16)
  with pytest.raises(UserError, match="cannot be written"):
    save_state(tmp_path / "absent" / "state", tokens, cache, TINY)


@pytest.mark.parametrize(("T", "rtol"), [(6, 0), (1, 1e-6)])
def test_slots_out_of_sight(T, rtol):
  """What slots beyond a row's length hold, and how many there are, does not matter; with streamed blocks not in one bit."""
  rng = np.random.default_rng(3)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  q, k, v = normal(1, T, 4, 8), normal(1, T, 2, 8), normal(1, T, 2, 8)
  keys, values, lengths = normal(1, 2, 2560, 8), normal(1, 2, 2560, 8), jnp.array([700])
  scale = jnp.full((1, T, 4), 0.3)
  statistics = jax.jit(cached_attention.cached_statistics, static_argnames="cache_slots")
  few, many = (statistics(q, k, v, keys[:, :, :n], values[:, :, :n], lengths, scale) for n in (768, 2560))
  near = statistics(q, k, v, keys, values, lengths, scale, cache_slots=768)
  for other in (many, near):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * (rtol > 0)), few, other)
  joined_k, joined_v = (jnp.concatenate([jnp.swapaxes(a[:, :, :700], 1, 2), b], 1) for a, b in ((keys, k), (values, v)))
  oracle = streaming.attention_statistics(q, joined_k, joined_v, scale[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), few, oracle)


def test_state_stays_bounded_with_a_window():
  """A window's cache does not grow with the capacity, and the memory state is float32 beside bfloat16 keys."""
  small, large = (jax.eval_shape(lambda n=n: Cache.create(ModelConfig(window=1024), 1, n)) for n in (4096, 1 << 20))
  assert nbytes(small) == nbytes(large)
  past = small.layers["groups"][2]
  assert (past.keys.dtype, past.memory.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("T", [1, 6])
def test_int8_keys_and_values(T):
  """Rounding moves an element by at most 1/254 of its vector's largest, and the statistics are exactly those of the rounded keys
  and values."""
  rng = np.random.default_rng(4)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1))), jnp.float32)

  q, k, v, lengths = normal(2, T, 4, 8), normal(2, T, 2, 8), normal(2, T, 2, 8), jnp.array([700, 130])
  keys, values = normal(2, 2, 768, 8).at[0, 0, 3].set(0), normal(2, 2, 768, 8)
  scale = jnp.full((2, T, 4), 0.3)
  (keys_8, key_scale), (values_8, value_scale) = map(cached_attention.quantise, (keys, values))
  rounded = [x.astype(jnp.float32) * s[..., None] for x, s in ((keys_8, key_scale), (values_8, value_scale))]
  for wide, narrow in zip((keys, values), rounded):
    largest = np.abs(wide).max(-1, keepdims=True)
    assert np.all(np.abs(wide - narrow) <= largest / 254 * (1 + 1e-5))
  ours = cached_attention.cached_statistics(q, k, v, keys_8, values_8, lengths, scale, scales=(key_scale, value_scale))
  same = cached_attention.cached_statistics(q, k, v, *rounded, lengths, scale)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, same)


@pytest.mark.slow
def test_the_error_of_narrow_keys_and_values(x64):
  """The error of decoded logits, relative to their spread, stays below 2^-8 with int8 and bfloat16 keys and values."""
  model, full, extend = prepared("polar")
  errors = {}
  for dtype in (None, "float32", "bfloat16", "int8"):
    logits, _ = in_chunks(extend, Cache.create(model.config, 2, LENGTH, dtype), TOKENS, [1] * LENGTH, 1)
    errors[dtype] = float(np.sqrt(np.mean((logits - full) ** 2)) / full.std())
  print(errors)
  assert errors[None] < 1e-10 and errors["float32"] < 1e-6
  assert errors["bfloat16"] < 2**-8 and errors["int8"] < 2**-8


def test_step_of_the_delta_rule(x64):
  """The decoding step equals one step of the oracle."""
  rng = np.random.default_rng(5)
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, 3, 1, 4, 8)))
  arrays = {"log_gamma": -rng.random((3, 1, 4)), "beta": rng.random((3, 1, 4))}
  v, state = rng.normal(size=(3, 1, 4, 6)), rng.normal(size=(3, 4, 6, 8))
  ours = gated_delta_step(q, k, v, state=jnp.asarray(state), **arrays)
  oracle = reference.gated_delta(q, k, v, initial_state=jnp.asarray(state), **jax.tree.map(jnp.asarray, arrays))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, oracle)

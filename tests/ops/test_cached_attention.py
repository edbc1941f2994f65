"""Attention over cached keys: every implementation, kernels in interpret mode, against the definition in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.polar_attention.cached import api, chunk_gpu, pallas_gpu, pallas_tpu, xla

QUICK = {"xla_backend_optimization_level": 0}  # compilation is most of these tests' time


def normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(lengths, H=4, K=2, D=64, R=256, stack=(), dtype=jnp.float32, T=1):
  B = len(lengths)
  q, k, v = normal(0, B, T, H, D, dtype=dtype), normal(1, B, T, K, D, dtype=dtype), normal(2, B, T, K, D, dtype=dtype)
  keys, values = (normal(seed, *stack, B, K, R, D, dtype=dtype) for seed in (3, 4))
  return q, k, v, keys, values, jnp.asarray(lengths, jnp.int32), 0.3 * (1 + normal(5, B, T, H) ** 2)


def oracle(q, k, v, keys, values, lengths, scale, *, window=None, scales=None, layer=None) -> Statistics:
  """Row by row from the definition: all positions that the ring holds and the window shows, one softmax."""
  if layer is not None:
    keys, values, scales = jax.tree.map(lambda x: x[layer], (keys, values, scales))
  q, k, v, keys, values = (np.asarray(x, np.float64) for x in (q, k, v, keys, values))
  if scales is not None:
    keys, values = (x * np.asarray(s, np.float64)[..., None] for x, s in zip((keys, values), scales))
  (B, T, H, _), (K, R) = q.shape, keys.shape[1:3]
  found = []
  for b, t, h in np.ndindex(B, T, H):
    n, group = int(lengths[b]), h // (H // K)
    first = max(0, n + t + 1 - (window or n + T))
    held, own = np.arange(max(first, n - R), n), slice(max(0, first - n), t + 1)
    own_keys = np.concatenate([keys[b, group, held % R], k[b, own, group]])
    own_values = np.concatenate([values[b, group, held % R], v[b, own, group]])
    logits = float(scale[b, t, h]) * own_keys @ q[b, t, h]
    p = np.exp(logits - logits.max())
    found.append((logits.max(), p.sum(), (p * p).sum(), p @ own_values))
  return Statistics(*(np.stack(x).reshape(B, T, H, *x[0].shape) for x in zip(*found)))


@functools.partial(jax.jit, static_argnames=("window", "layer", "splits"), compiler_options=QUICK)
def gpu(*arrays, scales=None, window=None, layer=None, table=None, splits=None):
  return pallas_gpu.cached_statistics(*arrays, window=window, scales=scales, cache_slots=None, layer=layer, table=table,
                                      splits=splits, interpret=True)


@functools.partial(jax.jit, static_argnames=("window", "layer", "splits"), compiler_options=QUICK)
def tpu(*arrays, scales=None, window=None, layer=None, table=None, splits=None):
  block = 2048 if splits is None else 128 * -(-arrays[3].shape[-2] // (128 * splits))
  return pallas_tpu.cached_statistics(*arrays, window=window, scales=scales, cache_slots=None, layer=layer, table=table,
                                      block=block, interpret=True)


def plain(*arrays, scales=None, window=None, layer=None, table=None, splits=None):
  del splits
  return xla.cached_statistics(*arrays, window=window, scales=scales, cache_slots=None, layer=layer, table=table)


every_kernel = pytest.mark.parametrize("kernel", [gpu, tpu], ids=["gpu", "tpu"])


def assert_near(actual: Statistics, expected: Statistics, tolerance: float):
  """M counts only with what is relative to it: compared are the log-sum-exp, n_eff and the attended vector."""
  def seen(s):
    return np.log(s.L) + s.M, s.L**2 / s.Q, s.S / np.asarray(s.L)[..., None]

  for a, b in zip(seen(actual), seen(expected)):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths, R, H, K, D, window, layer, splits", [
  ([0, 1, 255, 256], 256, 4, 2, 64, None, None, 4),  # nothing cached, one, all but one, all
  ([70], 72, 4, 1, 128, None, 2, 2),  # a ring of no whole steps
  ([5], 8, 2, 2, 64, None, None, None),  # less than a step
  ([700, 300, 17], 512, 8, 2, 64, 300, 1, 4),  # wrapped, not yet, shorter than the window
  ([100, 90], 64, 4, 2, 64, 7, None, 1),  # of a wrapped ring only a few
  ([640], 1024, 2, 1, 64, 33, None, 8),  # blocks before the window
])
def test_attention_equals_the_definition(lengths, R, H, K, D, window, layer, splits):
  """Lengths of their own, odd ones, groups, rings that wrapped, windows, stacked layers, any number of shares."""
  arrays = inputs(lengths, H, K, D, R, stack=() if layer is None else (3,))
  options = {"window": window, "layer": layer}
  expected = oracle(*arrays, **options)
  for compute in (gpu, tpu, plain):
    assert_near(compute(*arrays, **options, splits=splits), expected, 2e-5)


@functools.partial(jax.jit, static_argnames=("window", "layer"), compiler_options=QUICK)
def chunk_kernel(*arrays, window, layer):
  tiles = Tiles(*(Tile(32, 16, 4, 2),) * 3)
  return chunk_gpu.cached_statistics(*arrays, window=window, layer=layer, tiles=tiles, interpret=True)


@pytest.mark.parametrize("lengths, T, R, H, K, D, window, layer", [
  ([0, 1, 200], 40, 256, 4, 2, 64, None, 0),
  ([70], 33, 72, 4, 1, 128, None, 2),  # a ring of no whole blocks
  ([5], 7, 8, 2, 2, 64, None, 0),  # less than a block of everything
  ([700, 300, 17], 50, 512, 4, 2, 64, 300, 1),  # wrapped, not yet, shorter than the window
  ([100, 90], 64, 64, 2, 1, 64, 7, 0),  # of the ring only a few, and of the chunk
  ([30, 64], 100, 64, 2, 2, 64, 50, 0),  # a chunk larger than the ring
])
def test_a_chunk_equals_the_definition(lengths, T, R, H, K, D, window, layer):
  arrays = inputs(lengths, H, K, D, R, stack=(3,), T=T)
  assert_near(chunk_kernel(*arrays, window=window, layer=layer), oracle(*arrays, window=window, layer=layer), 5e-5)


def test_a_chunk_of_bfloat16_errs_as_its_rounding():
  arrays = inputs([200, 64], stack=(1,), dtype=jnp.bfloat16, T=20)
  assert_near(chunk_kernel(*arrays, window=None, layer=0), oracle(*arrays, layer=0), 2**-8)


@every_kernel
def test_what_lies_beyond_the_length_is_not_looked_at(kernel):
  """NaN in slots that a row has not used, or that a window has left behind in whole steps, changes nothing."""
  q, k, v, keys, values, lengths, scale = inputs([130, 400], R=512)
  dirty = [x.at[0, :, 192:].set(jnp.nan).at[1, :, :256].set(jnp.nan).at[1, :, 448:].set(jnp.nan) for x in (keys, values)]
  options = {"window": 100, "splits": 2}
  clean, other = (kernel(q, k, v, *ring, lengths, scale, **options) for ring in ((keys, values), dirty))
  jax.tree.map(np.testing.assert_array_equal, clean, other)


@every_kernel
def test_int8_keys_and_values_are_those_they_stand_for(kernel):
  q, k, v, keys, values, lengths, scale = inputs([77, 130], R=136)
  (keys, key_scale), (values, value_scale) = api.quantise(keys), api.quantise(values)
  arrays, scales = (q, k, v, keys, values, lengths, scale), (key_scale, value_scale)
  assert_near(kernel(*arrays, scales=scales, splits=2), oracle(*arrays, scales=scales), 2e-5)


@every_kernel
@pytest.mark.parametrize("quantised", [False, True])
def test_bfloat16_errs_as_its_rounding(kernel, quantised):
  """Products of bfloat16 numbers are exact in float32; weights are rounded once, by 2^-9, before they meet the values."""
  q, k, v, keys, values, lengths, scale = inputs([200, 64], dtype=jnp.bfloat16)
  scales = None
  if quantised:
    (keys, key_scale), (values, value_scale) = api.quantise(keys), api.quantise(values)
    scales = key_scale, value_scale
  arrays = q, k, v, keys, values, lengths, scale
  assert_near(kernel(*arrays, scales=scales), oracle(*arrays, scales=scales), 2**-8)


def test_shares_of_the_keys():
  """A power of two, none of less than a step, more for few rows and long rings."""
  assert [pallas_gpu.splits_for(*case) for case in ((2, 2304), (2, 1 << 17), (512, 768), (128, 768), (2, 8))] == [
    32, 128, 1, 2, 1]


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_what_the_kernels_do_not_serve(name, monkeypatch):
  """Is left to XLA by "auto", and refused by name: head sizes they have no tiles for, some chunks, other machines."""
  monkeypatch.setattr(api.dispatch, "platform", lambda: name)
  arrays = inputs([3])
  assert api.ATTENTION.choose(*arrays) == f"pallas_{name}"
  assert api.skips_unused_slots(arrays[3], 4, jnp.dtype("float32"))
  assert not api.skips_unused_slots(inputs([3], D=8)[3], 4, jnp.dtype("float32"))
  chunk = inputs([3], T=2)
  assert api.ATTENTION.choose(*chunk) == ("pallas_gpu" if name == "gpu" else "xla")
  for other in (inputs([3], D=8), [x.astype(jnp.int8) if i in (3, 4) else x for i, x in enumerate(chunk)]):
    assert api.ATTENTION.choose(*other) == "xla"
    with pytest.raises(NotImplementedError, match=f"cached_attention: 'pallas_{name}' takes"):
      api.cached_statistics(*other, implementation=f"pallas_{name}")
  for gib in (1, 3, 5):  # beyond 4 GiB Pallas counts with 64 bits, and up to 2 GiB 32 will do
    ring = jax.ShapeDtypeStruct((1, gib << 14, 2, 512, 64), jnp.int8)
    chosen = api.ATTENTION.choose(*arrays[:3], ring, ring, *arrays[5:])
    assert chosen == ("xla" if (name, gib) == ("gpu", 3) else f"pallas_{name}")
  monkeypatch.undo()
  with pytest.raises(NotImplementedError, match=f"needs a {name.upper()}"):
    api.cached_statistics(*arrays, implementation=f"pallas_{name}")


@pytest.mark.parametrize("quantised, window, lengths", [(False, None, [0, 200, 512]), (True, 300, [700, 100, 513])])
def test_pages_are_the_rings_they_make_up(quantised, window, lengths):
  """Pages in any order, of any layer; those that a row does not have are not looked at."""
  q, k, v, keys, values, lengths, scale = inputs(lengths, R=512, stack=(2,))
  scales, page = None, 128
  if quantised:
    (keys, key_scale), (values, value_scale) = api.quantise(keys), api.quantise(values)
    scales = key_scale, value_scale
  table = np.random.default_rng(6).permutation(20)[:12].reshape(3, 4)

  def pool(rings):
    pages = jnp.moveaxis(rings.reshape(*rings.shape[:3], 4, page, *rings.shape[4:]), 3, 2)
    other = 7 if rings.dtype == jnp.int8 else jnp.nan
    return jnp.full((2, 20, *pages.shape[3:]), other, rings.dtype).at[:, table.reshape(-1)].set(
      pages.reshape(2, 12, *pages.shape[3:]))

  options = {"window": window, "layer": 1}
  expected = plain(q, k, v, keys, values, lengths, scale, **options, scales=scales)
  pools = [*map(pool, (keys, values))], jax.tree.map(pool, scales)
  owned = jnp.asarray(np.where(np.arange(4) * page < np.asarray(lengths)[:, None], table, 20), jnp.int32)
  for compute in (plain, gpu, tpu):
    assert_near(compute(q, k, v, *pools[0], lengths, scale, **options, scales=pools[1], table=owned, splits=2), expected, 2e-5)


@pytest.mark.parametrize("R, dtype, paged", [(256, jnp.float32, False), (72, jnp.int8, False), (64, jnp.bfloat16, True)])
def test_new_vectors_are_written_in_place(R, dtype, paged):
  """The kernel leaves what XLA's scatter leaves, whatever rows write; one that writes nothing may hold a table of pages that are
  another's by now."""
  lengths, counts = jnp.array([3, 70, 0, 127, 500]), jnp.array([0, 1, 1, 0, 1])
  ring, new = 10 * normal(0, 2, 11 if paged else 5, 2, R, 64), 10 * normal(1, 2, 5, 2, 1, 64)
  ring, table = ring.astype(dtype), None
  if paged:
    table = jnp.asarray(np.random.default_rng(2).permutation(10).reshape(5, 2), jnp.int32)
    table = table.at[0].set(table[1]).at[3].set(table[4]).at[2, 1].set(11)
  kernel = jax.jit(functools.partial(pallas_tpu.append, interpret=True))
  for written in (counts, counts * 0, jnp.array([1, 0, 0, 0, 0])):
    np.testing.assert_array_equal(kernel(ring, new, lengths, written, table), xla.append(ring, new, lengths, written, table))

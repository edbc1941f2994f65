"""What a query sees, how many keys that is and which blocks it meets agree with one another for all lengths and windows."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops.core import visibility
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.polar_attention.cached import xla as cached
from atma_jax.ops.polar_attention.cached.api import slots_for, tokens_since
from atma_jax.ops.polar_attention.gpu import gpu_grid
from atma_jax.ops.polar_attention.spec import AttentionSpec
from atma_jax.ops.polar_attention.tpu import tpu_grid

windows = st.one_of(st.none(), st.integers(1, 80))
lengths = st.integers(1, 60).flatmap(lambda keys: st.tuples(st.integers(1, keys), st.just(keys)))
quick = hypothesis.settings(max_examples=40, deadline=None)


def mask(T, S, window):
  """(T, S) by the definition: the keys up to a query's own, of which a window leaves the last."""
  position = np.arange(S - T, S)[:, None]
  return (np.arange(S) <= position) & (np.arange(S) > position - (window or S))


@quick
@hypothesis.given(lengths, windows)
def test_masks_and_counts_are_those_of_the_definition(size, window):
  (T, S), spec = size, AttentionSpec(window)
  positions, expected = np.arange(S - T, S), mask(*size, window)
  np.testing.assert_array_equal(spec.sees(positions[:, None] - np.arange(S)), expected)
  np.testing.assert_array_equal(spec.visible_keys(jnp.asarray(positions)), expected.sum(axis=1))
  assert visibility.visible_pairs(T, S, window) == expected.sum()
  for row, position in zip(expected, positions, strict=True):
    assert visibility.first_key(int(position), window) == row.argmax()
  if window is not None:
    for key in range(S - T, S):  # its own query sees it, and the last that does is in the sequence or beyond its end
      last = visibility.last_query(key, window)
      seen = expected[key - (S - T):, key].sum()
      assert seen == min(last, S - 1) - key + 1


@quick
@hypothesis.given(lengths, windows, st.sampled_from([8, 16]), st.sampled_from([8, 16]))
def test_gpu_blocks_cover_what_is_seen_and_leave_unmasked_only_what_all_see(size, window, block_q, block_k):
  (T, S), tile = size, Tile(block_q, block_k)
  window = None if window is None or window >= S else window
  call = gpu_grid.Call(T, S, window, Tiles(tile, tile, tile), True)
  full = mask(-(-T // block_q) * block_q + S - T, -(-T // block_q) * block_q + S - T, window)[S - T :]  # with padded queries
  full = np.pad(full, ((0, 0), (0, max(0, -(-S // block_k) * block_k - full.shape[1]))))
  for i in range(-(-T // block_q)):
    rows = full[i * block_q : (i + 1) * block_q]
    check(call.key_blocks(jnp.int32(S - T + i * block_q), tile, -(-S // block_k)),
          [rows[:, j * block_k : (j + 1) * block_k] for j in range(-(-S // block_k))])
  for j in range(-(-S // block_k)):
    columns = full[:, j * block_k : (j + 1) * block_k]
    check(call.query_blocks(jnp.int32(j * block_k - (S - T)), tile, -(-T // block_q)),
          [columns[i * block_q : (i + 1) * block_q] for i in range(-(-T // block_q))])


def check(bounds, pairs):
  """All blocks that are seen lie within the bounds, and all pairs of the unmasked middle are seen."""
  first, full, full_end, end = map(int, bounds)
  assert 0 <= first <= full <= full_end <= end <= len(pairs)
  assert {j for j, pair in enumerate(pairs) if pair.any()} <= set(range(first, end))
  assert all(pairs[j].all() for j in range(full, full_end))


@quick
@hypothesis.given(st.integers(1, 700).flatmap(lambda keys: st.tuples(st.integers(1, keys), st.just(keys))),
                  st.one_of(st.none(), st.integers(1, 800)))
def test_tpu_blocks_are_exactly_those_that_meet(size, window):
  (T, S), tile = size, Tile(128, 128)
  window = None if window is None or window >= S else window
  call = tpu_grid.Call(1, T, S, 1, 1, 64, window, Tiles(tile, tile, tile), True)
  starts, count = tpu_grid.Starts((S - T,), (0,)), call.counts(tile)
  padded = count[0] * 128 + S - T
  full = mask(padded, padded, window)[S - T :]
  full = np.pad(full, ((0, 0), (0, max(0, count[1] * 128 - full.shape[1]))))[:, : count[1] * 128]
  pairs = full.reshape(count[0], 128, count[1], 128)
  for i in range(count[0]):
    (first, end), = call.key_blocks(i, tile, starts)
    assert {j for j in range(count[1]) if pairs[i, :, j].any()} == set(range(first, end))
    for j in range(first, end):
      assert bool(call.whole(i, j, tile, starts)) == pairs[i, :, j].all()
      np.testing.assert_array_equal(call.mask(i, j, tile, starts), pairs[i, :, j].T)
  for j in range(count[1]):
    (first, end), = call.query_blocks(j, tile, starts)
    assert {i for i in range(count[0]) if pairs[i, :, j].any()} <= set(range(first, end))


@quick
@hypothesis.given(st.integers(1, 40), st.integers(0, 200))
def test_a_ring_holds_the_last_tokens_where_their_positions_say(capacity, length):
  slots = slots_for(capacity)
  held = {p % slots: p for p in range(length)}  # later tokens overwrite earlier ones
  positions = np.asarray(cached.slot_positions(jnp.asarray([length]), slots))[0]
  np.testing.assert_array_equal(positions, [held.get(slot, cached.NOWHERE) for slot in range(slots)])
  for slot, position in held.items():
    assert int(tokens_since(jnp.int32(slot), jnp.int32(length), slots)) == length - 1 - position


@pytest.mark.parametrize("name", ["window", "null_length", "count_length"])
def test_lengths_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
    AttentionSpec(**{name: 0})

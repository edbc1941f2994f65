"""The pipeline: no token lost, reshuffled epochs, mixing by weight, one number of state, any number of processes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from atma_jax.config import DataConfig
from atma_jax.data.manifest import load_manifest, open_stream, write_manifest
from atma_jax.data.pipeline import (
  TokenWindows,
  TrainingData,
  heldout_documents,
  validation_batches,
  validation_stream,
)
from atma_jax.data.prepare import prepare
from atma_jax.data.shards import TokenStream, open_shard, token_dtype, write_shard
from atma_jax.errors import UserError


def stream_of(tmp_path, tokens) -> TokenStream:
  write_shard(tmp_path / "x.bin", np.asarray(tokens), token_dtype(1 << 16))
  return TokenStream([open_shard(tmp_path / "x.bin")])


@pytest.fixture
def prepared(config, tmp_path):
  prepare(config, tmp_path / "data", workers=1, progress=False)
  return tmp_path / "data"


@pytest.fixture
def numbered(tmp_path):
  """A prepared directory whose tokens are 0, 1, 2, ... (one ready shard): shows which token went where."""
  write_shard(tmp_path / "numbers.bin", np.arange(250), token_dtype(257))
  config = DataConfig(sources=(f"bin:{tmp_path}/numbers.bin",), tokenizer="bytes", heldout_documents=0,
                      validation_documents=0, sequence_length=16, batch_size=4, prefetch=3)
  prepare(config, tmp_path / "data", workers=1, progress=False)
  return config, tmp_path / "data"


def take(data, count):
  return [batch["tokens"] for batch in itertools.islice(data, count)]


@pytest.mark.parametrize("size, length", [(100, 10), (101, 10), (109, 10), (11, 10), (10, 10), (3, 10), (1, 4)])
def test_every_token_is_a_target_once_and_none_is_lost(tmp_path, size, length):
  windows = TokenWindows(stream_of(tmp_path, np.arange(size)), length, 1 << 16, "x")
  assert len(windows) == -(-size // length)
  rows = [windows[i] for i in range(len(windows))]
  assert all(row.shape == (length + 1,) and row.dtype == np.int32 for row in rows)
  targets = collections.Counter(np.concatenate([row[1:] for row in rows]).tolist())
  assert set(targets) == set(range(size))
  assert sum(targets.values()) == len(windows) * length  # only the last window repeats, from the stream's start
  for row in rows:
    np.testing.assert_array_equal(row, (row[0] + np.arange(length + 1)) % size)


def test_epochs_hold_every_window_once_in_another_order(numbered):
  config, directory = numbered  # 250 tokens: 16 windows of 16, four batches an epoch
  starts = [tokens[:, 0].tolist() for tokens in take(TrainingData(config, directory), 12)]
  epochs = [list(itertools.chain(*starts[first:first + 4])) for first in (0, 4, 8)]
  assert all(sorted(epoch) == list(range(0, 250, 16)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_is_decided_by_the_seed(config, prepared):
  first = take(TrainingData(config, prepared), 5)
  np.testing.assert_array_equal(first, take(TrainingData(config, prepared), 5))
  other = dataclasses.replace(config, shuffle_seed=1)
  assert (np.array(first) != np.array(take(TrainingData(other, prepared), 5))).any()


@pytest.mark.parametrize("prefetch", [0, 1, 7])
def test_read_ahead_changes_nothing(config, prepared, prefetch):
  expected = take(TrainingData(config, prepared), 6)
  data = TrainingData(dataclasses.replace(config, prefetch=prefetch), prepared)
  np.testing.assert_array_equal(take(data, 6), expected)
  assert data.get_state()["next_sequence"] == 6 * config.batch_size


@pytest.mark.parametrize("consumed", [0, 1, 5, 70])  # 70 batches are beyond the first epoch
def test_resumes_exactly(with_recall, tmp_path, consumed):
  prepare(with_recall, tmp_path / "data", workers=1, progress=False)
  data = TrainingData(with_recall, tmp_path / "data")
  take(data, consumed)
  state = json.loads(json.dumps(data.get_state()))
  expected = take(data, 8)
  fresh = TrainingData(with_recall, tmp_path / "data")
  fresh.set_state(state)
  np.testing.assert_array_equal(take(fresh, 8), expected)
  data.set_state(state)  # back in the same object, threads running
  np.testing.assert_array_equal(take(data, 8), expected)
  assert data.get_state() == fresh.get_state()


def global_batches(config, directory, process_count, batches, state=None):
  """What `process_count` processes read together, (batches, B, T + 1), and the state that all of them are left in."""
  parts = [TrainingData(config, directory, parts=[i], part_count=process_count) for i in range(process_count)]
  for part in parts:
    if state is not None:
      part.set_state(state)
  read = [np.concatenate([next(part)["tokens"] for part in parts]) for _ in range(batches)]
  states = [json.loads(json.dumps(part.get_state())) for part in parts]
  for part in parts:
    part.close()
  assert all(state == states[0] for state in states)
  return np.stack(read), states[0]


@pytest.mark.slow
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(with_recall, tmp_path, process_count):
  prepare(with_recall, tmp_path / "data", workers=1, progress=False)
  expected = take(TrainingData(with_recall, tmp_path / "data"), 9)
  read, _ = global_batches(with_recall, tmp_path / "data", process_count, 9)
  np.testing.assert_array_equal(read, expected)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 7), min_size=2, max_size=4),
       process_counts=st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4))
def test_stopped_anywhere_it_goes_on_with_any_number_of_processes(numbered, stops, process_counts):
  config, directory = numbered  # four batches an epoch, so that most runs cross several
  whole, final = global_batches(config, directory, 1, sum(stops))
  parts, state = [], None
  for batches, process_count in zip(stops, process_counts):
    read, state = global_batches(config, directory, process_count, batches, state)
    parts.append(read)
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert state == final


def test_seeking_does_not_read_what_it_skips(numbered, monkeypatch):
  config, directory = numbered
  reads = []
  read = TokenStream.read
  monkeypatch.setattr(TokenStream, "read", lambda *args: reads.append(args) or read(*args))
  data = TrainingData(dataclasses.replace(config, prefetch=0), directory)
  data.set_state({**data.get_state(), "next_sequence": 10**9})
  next(data)
  assert len(reads) <= 2 * config.batch_size


def test_reading_costs_little(tmp_path):
  """About half a millisecond a batch of 16; the bound leaves room for slow and busy machines."""
  for index in range(2):
    write_shard(tmp_path / f"{index}.bin", np.arange(200_000) % 256, token_dtype(257))
  config = DataConfig(sources=(f"bin:{tmp_path}/0.bin", f"bin:{tmp_path}/1.bin"), weights=(0.75, 0.25), prefetch=0,
                      tokenizer="bytes", heldout_documents=0, validation_documents=0, sequence_length=256,
                      batch_size=16)
  prepare(config, tmp_path / "data", workers=1, progress=False)
  data = TrainingData(config, tmp_path / "data")
  next(data)
  times = []
  for _ in range(10):
    start = time.process_time()
    take(data, 20)
    times.append((time.process_time() - start) / 20)
  assert min(times) < 3e-3


def test_another_batch_size_goes_on_at_the_same_sequence(config, prepared):
  rows = np.concatenate(take(TrainingData(config, prepared), 6))
  data = TrainingData(config, prepared)
  take(data, 3)
  smaller = TrainingData(dataclasses.replace(config, batch_size=4), prepared)
  smaller.set_state(data.get_state())
  np.testing.assert_array_equal(np.concatenate(take(smaller, 6)), rows[3 * 8:])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.1), (2.0, 1.0)])
def test_sources_are_mixed_by_weight(tmp_path, weights):
  for index in range(2):
    write_shard(tmp_path / f"{index}.bin", np.full(1000, index), token_dtype(257))
  config = DataConfig(sources=(f"bin:{tmp_path}/0.bin", f"bin:{tmp_path}/1.bin"), weights=weights, tokenizer="bytes",
                      heldout_documents=0, validation_documents=0, sequence_length=8, batch_size=16)
  prepare(config, tmp_path / "data", workers=1, progress=False)
  drawn = np.array(take(TrainingData(config, tmp_path / "data"), 100))[..., 0].ravel()
  assert drawn.mean() == pytest.approx(weights[1] / sum(weights), abs=0.005)
  assert set(np.unique(drawn)) == {0, 1}


def test_validation_once_through_in_order(config, prepared):
  stream = validation_stream(prepared)
  batches = [batch["tokens"] for batch in validation_batches(config, prepared, 4, 32)]
  assert all(batch.shape == (4, 33) and batch.dtype == np.int32 for batch in batches)
  windows = -(-len(stream) // 32)
  assert len(batches) == -(-windows // 4)
  starts = np.arange(4 * len(batches)) % windows * 32
  expected = stream[(starts[:, None] + np.arange(33)) % len(stream)]
  np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_heldout_documents_longest_first(config, prepared, corpus):
  documents = heldout_documents(prepared)
  tokenizer = TrainingData(config, prepared).tokenizer
  longest = sorted((path.read_text() for path in corpus.iterdir()), key=len, reverse=True)[:3]
  assert [tokenizer.decode(document) for document in documents] == longest
  assert all(document[0] == tokenizer.eot_id and tokenizer.eot_id not in document[1:] for document in documents)


def test_without_evaluation_documents(numbered):
  config, directory = numbered
  with pytest.raises(UserError, match=r"without validation documents: set config\.data\.validation_documents above 0"):
    validation_batches(config, directory, 2, 8)
  with pytest.raises(UserError, match=r"config\.data\.heldout_documents"):
    heldout_documents(directory)


def test_tokens_of_another_tokenizer(tmp_path):
  write_shard(tmp_path / "x.bin", np.full(100, 50256), token_dtype(50304))
  config = DataConfig(sources=(f"bin:{tmp_path}/x.bin",), tokenizer="bytes", heldout_documents=0,
                      validation_documents=0, sequence_length=8, batch_size=2)
  prepare(config, tmp_path / "data", workers=1, progress=False)
  with pytest.raises(UserError, match=r"holds token 50256, but config\.data\.tokenizer has 257 tokens"):
    next(TrainingData(config, tmp_path / "data"))


@pytest.mark.parametrize(("parts", "count"), [((0, 1), 4), ((1, 2), 4), ((0, 3), 4), ((0, 2, 5, 7), 8), ((6, 7, 4, 5), 8)])
def test_any_parts_of_a_batch(config, prepared, parts, count):
  """A process whose devices hold some parts of the batch gets their rows, in the order it names them."""
  whole = take(TrainingData(config, prepared), 3)
  data = TrainingData(config, prepared, parts=parts, part_count=count)
  size = config.batch_size // count
  for batch, rows in zip(whole, take(data, 3)):
    np.testing.assert_array_equal(rows, np.concatenate([batch[p * size : (p + 1) * size] for p in parts]))


def test_refusals(config, prepared, tmp_path):
  with pytest.raises(UserError, match=r"no prepared data \(manifest\.json is missing\)"):
    TrainingData(config, tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"config\.data\.batch_size=8: must be a multiple of 3 parts"):
    TrainingData(config, prepared, part_count=3)
  with pytest.raises(UserError, match=r"prepared with config\.data\.heldout_documents 3, now it is 5"):
    TrainingData(dataclasses.replace(config, heldout_documents=5), prepared)
  data = TrainingData(config, prepared)
  with pytest.raises(UserError, match=r"config\.data\.directory: the checkpoint was trained on other prepared data"):
    data.set_state({**data.get_state(), "manifest": "another"})
  shard = prepared / data.manifest.train[0]["shards"][0]["path"]
  shard.write_bytes(shard.read_bytes()[:-2])
  with pytest.raises(UserError, match=r"00000\.bin is truncated or damaged"):
    TrainingData(config, prepared)


def test_stored_tokenizer_must_be_the_recorded_one(config, prepared, tmp_path):
  values = json.loads((prepared / "tokenizer.json").read_text())
  manifest = load_manifest(prepared)
  assert open_stream(prepared, manifest.train[0]).shards
  write_manifest(prepared, dataclasses.replace(manifest, tokenizer=manifest.tokenizer | {"fingerprint": "0" * 64}))
  assert values["kind"] == "bytes"
  with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that manifest\.json records"):
    TrainingData(config, prepared)

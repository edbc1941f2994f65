"""Token shards: the nanoGPT-style format, byte for byte, and streams over several of them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from atma_jax.data.files import write_atomically
from atma_jax.data.shards import MAGIC, Shard, TokenStream, open_shard, token_dtype, write_shard
from atma_jax.errors import UserError


def raw_shard(tokens, bytes_per_token, *, magic=MAGIC, version=1, count=None) -> bytes:
  header = np.zeros(256, "<i4")
  header[:4] = magic, version, len(tokens) if count is None else count, bytes_per_token
  return header.tobytes() + np.asarray(tokens, "<u4" if bytes_per_token == 4 else "<u2").tobytes()


@pytest.mark.parametrize("bytes_per_token, largest", [(0, 65535), (2, 65535), (4, 2**31 - 1)])
def test_reads_the_format(tmp_path, bytes_per_token, largest):
  tokens = [0, 1, 50256, largest]
  path = tmp_path / "x.bin"
  path.write_bytes(raw_shard(tokens, bytes_per_token))
  shard = open_shard(path)
  assert shard.tokens == 4
  assert isinstance(shard.open(), np.memmap) and not shard.open().flags.writeable
  np.testing.assert_array_equal(shard.open(), tokens)
  stream = TokenStream([shard]).read(0, 4)
  assert stream.dtype == np.int32
  np.testing.assert_array_equal(stream, tokens)


@pytest.mark.parametrize("vocab_size, bytes_per_token", [(257, 2), (65536, 2), (65537, 4)])
def test_writes_the_format(tmp_path, vocab_size, bytes_per_token):
  tokens = np.array([0, 7, vocab_size - 1])
  path = tmp_path / "deep" / "x.bin"
  assert write_shard(path, [tokens[:1], tokens[1:]], token_dtype(vocab_size)) == 3
  assert path.read_bytes() == raw_shard(tokens, bytes_per_token)
  assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("content, message", [
    (b"", "not a token shard"),
    (b"text, not tokens" * 100, "not a token shard: the first int32 must be 20240520"),
    (raw_shard([1, 2], 2, magic=7), "not a token shard"),
    (raw_shard([1, 2], 2, version=2), "version 2 is not supported; legal: 1"),
    (raw_shard([1, 2], 3), "3 bytes per token; legal: 2, 4"),
    (raw_shard([1, 2], 2, count=3), "truncated or damaged: 1028 bytes where its header of 3 tokens says 1030"),
    (raw_shard([1, 2], 2)[:-1], "truncated or damaged"),
    (raw_shard([1, 2], 2) + b"more", "truncated or damaged"),
    (raw_shard([], 2, count=-1), "truncated or damaged"),
    (raw_shard([1], 2)[:100], "truncated or damaged"),
])
def test_foreign_and_damaged_files(tmp_path, content, message):
  path = tmp_path / "x.bin"
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    open_shard(path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_shard(tmp_path):
  with pytest.raises(UserError, match=r"cannot read token shard .*x\.bin: No such file"):
    open_shard(tmp_path / "x.bin")


def test_stream_crosses_shards_wraps_and_pickles(tmp_path):
  sizes = (5, 0, 3, 9)
  everything = np.arange(sum(sizes))
  start = 0
  for index, size in enumerate(sizes):
    write_shard(tmp_path / f"{index}.bin", everything[start:start + size], token_dtype(300))
    start += size
  stream = TokenStream([open_shard(tmp_path / f"{index}.bin") for index in range(len(sizes))])
  assert len(stream) == len(everything)
  for first in range(len(everything)):
    for length in (1, 4, 17, 40):
      expected = everything[np.arange(first, first + length) % len(everything)]
      np.testing.assert_array_equal(stream.read(first, first + length), expected)
  copy = pickle.loads(pickle.dumps(stream))
  assert len(pickle.dumps(stream)) < 2000  # paths, not tokens
  np.testing.assert_array_equal(copy.read(3, 12), everything[3:12])


def test_a_stream_may_use_the_head_of_a_shard(tmp_path):
  write_shard(tmp_path / "x.bin", np.arange(10), token_dtype(300))
  whole = open_shard(tmp_path / "x.bin")
  head = TokenStream([Shard(whole.path, 4, whole.dtype)])
  np.testing.assert_array_equal(head.read(0, 6), [0, 1, 2, 3, 0, 1])


def test_a_failed_write_leaves_the_old_file_and_says_so(tmp_path):
  path = tmp_path / "x.bin"
  path.write_bytes(b"old")

  def full_disk(file):
    file.write(b"new")
    raise OSError(28, "No space left on device")

  with pytest.raises(UserError, match=r"cannot write .*x\.bin: No space left on device"):
    write_atomically(path, full_disk)
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]

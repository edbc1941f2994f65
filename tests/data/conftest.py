"""Small corpora for the data tests."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from atma_jax.config import DataConfig

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "tall", "trees", "sway",
         "near", "an", "old", "stone", "bridge", "and", "rain", "falls", "softly", "on", "every", "roof", "of", "town")


def make_text(seed: int, words: int) -> str:
  """Random lines of words, some indented, each ending with a number."""
  rng = np.random.default_rng(seed)
  lines = []
  while words > 0:
    count = int(rng.integers(3, 12))
    words -= count
    lines.append("  " * int(rng.integers(0, 3)) + " ".join(rng.choice(WORDS, count)) + f" {rng.integers(0, 10**6)}")
  return "\n".join(lines) + "\n"


@pytest.fixture
def corpus(tmp_path):
  """The path of a folder of 30 text files of different lengths."""
  folder = tmp_path / "corpus"
  folder.mkdir()
  for index in range(30):
    (folder / f"{index:02d}.txt").write_text(make_text(index, 60 + 40 * index))
  return folder


@pytest.fixture
def config(corpus):
  """Byte-level options for `corpus`: 3 held-out and 4 validation documents, several shards."""
  return DataConfig(sources=(f"text:{corpus}",), tokenizer="bytes", heldout_documents=3, validation_documents=4,
                    shard_tokens=20_000, sequence_length=64, batch_size=8, prefetch=4)


@pytest.fixture
def with_recall(config):
  """`config` with recall material mixed in, one window for every two of text."""
  source = config.sources[0]
  return dataclasses.replace(config, sources=(source, f"recall:{source}"), weights=(2.0, 1.0))


def json_lines(rows) -> bytes:
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def write_rows():
  """Writes {"text": ...} rows as .jsonl, .jsonl.gz, .jsonl.zst or .parquet by the path's suffix."""

  def write(path, texts):
    rows = json_lines({"text": text} for text in texts)
    if path.suffix == ".gz":
      path.write_bytes(gzip.compress(rows))
    elif path.suffix == ".zst":
      path.write_bytes(zstandard.compress(rows))
    elif path.suffix == ".parquet":
      pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)
    else:
      path.write_bytes(rows)

  return write

"""Tokenizers and corpora from strangers: a value or one line, and no file is waited for."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import os
import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers as huggingface

from atma_jax.data import documents
from atma_jax.data.documents import SourceFile, read_documents
from atma_jax.data.shards import open_shard
from atma_jax.data.sources import parse_source
from atma_jax.data.tokenizers import load_tokenizer, tokenizer_from_dict, train_sentencepiece
from atma_jax.errors import UserError


@functools.cache
def trained(kind: str) -> bytes:
  """The file of a small tokenizer that works."""
  sample = "def f(x):\n    return x + 12345\n" * 20
  if kind == ".model":
    return train_sentencepiece([sample], 300).to_bytes()
  model = huggingface.Tokenizer(huggingface.models.BPE())
  model.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = huggingface.pre_tokenizers.ByteLevel.alphabet()
  model.train_from_iterator([sample], huggingface.trainers.BpeTrainer(
    vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet))
  return model.to_str().encode()


def with_vocabulary(vocabulary: dict[str, int]) -> bytes:
  """A word-level tokenizer.json."""
  values = json.loads(trained(".json"))
  values |= {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}, "added_tokens": []}
  return json.dumps(values).encode()


def use(path: pathlib.Path) -> None:
  """Loads a tokenizer and uses it; what is raised must be one line about the file."""
  try:
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode("def f(x): 1 \N{PARTY POPPER}")
    assert ids.dtype == np.int32 and 0 < tokenizer.vocab_size <= 1 << 28
    tokenizer.decode(ids)
  except UserError as error:
    assert str(path) in str(error) and len(" ".join(str(error).split())) < 1500
    raise


@pytest.mark.parametrize(("name", "content", "reason"), [
  ("deep.json", b"[" * 100_000 + b"]" * 100_000, "deep"),
  ("digits.json", b'{"kind": ' + b"9" * 10_000 + b"}", "digits"),
  ("utf16.json", trained(".json").decode().encode("utf-16"), "not UTF-8"),
  ("latin.json", b'{"kind": "\xe9"}', "not UTF-8"),
  ("list.json", b"[]", "not a Hugging Face tokenizer"),
  ("kind_list.json", json.dumps({"kind": [], "base64": ""}).encode(), "kind"),
  ("kind_only.json", json.dumps({"kind": "bytes"}).encode(), "base64"),
  ("base64.json", json.dumps({"kind": "huggingface", "base64": base64.b64encode(b"\xff").decode()}).encode(), "not UTF-8"),
  ("named.json", json.dumps({"kind": "named", "base64": base64.b64encode(b"\xff").decode()}).encode(), "not UTF-8"),
  ("empty_vocabulary.json", with_vocabulary({}), "vocabulary|tokenizer"),
  ("huge_id.json", with_vocabulary({"<unk>": 0, "</s>": 1, "x": 2**32 - 1}), "an id of 4294967295"),
  ("empty.model", b"", "empty"),
  ("zeros.model", b"\0" * 100, "not a SentencePiece model|vocabulary"),
  ("text.model", b"hello", "not a SentencePiece model|vocabulary"),
  ("empty_fields.model", b"\x12\x00", "SentencePiece|vocabulary|pieces"),
  ("empty_vocabulary.model", b"\x12\x02\x18\x01", "SentencePiece|vocabulary|pieces"),
])
def test_malformed_tokenizers(tmp_path, name, content, reason):
  """Each is named, with what is wrong."""
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=reason):
    use(tmp_path / name)


@pytest.mark.parametrize("kind", [".json", ".model"])
def test_damaged_tokenizers(tmp_path_factory, kind):
  """A file with changed bytes is a tokenizer or ends in one line."""
  folder = tmp_path_factory.mktemp("tokenizers")

  @given(st.data())
  @settings(max_examples=60, deadline=None)
  def check(data: st.DataObject) -> None:
    content = bytearray(trained(kind))
    for _ in range(data.draw(st.integers(1, 4))):
      place = data.draw(st.integers(0, len(content) - 1))
      content[place:place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=6))
    (folder / f"damaged{kind}").write_bytes(content)
    try:
      use(folder / f"damaged{kind}")
    except UserError as error:
      assert str(folder) in str(error) and "\n" not in str(error)

  check()


@given(st.dictionaries(st.sampled_from(["kind", "base64"]), st.none() | st.integers() | st.text(max_size=9) | st.just("bytes")
                       | st.just("huggingface") | st.just("sentencepiece") | st.just("named") | st.lists(st.integers())))
@settings(max_examples=100, deadline=None)
def test_stored_tokenizers(values):
  """Whatever a checkpoint stores in the place of a tokenizer."""
  try:
    tokenizer_from_dict(values)
  except UserError as error:
    assert str(error).startswith("stored tokenizer")


def test_special_files(tmp_path):
  """A FIFO as a tokenizer, a corpus, a shard: nobody waits."""
  os.mkfifo(tmp_path / "fifo")
  for read in (lambda path: load_tokenizer(path), lambda path: parse_source(f"text:{path}").files(),
               lambda path: parse_source(f"bin:{path}").shards(), open_shard,
               lambda path: list(read_documents(SourceFile(path, path)))):
    with pytest.raises(UserError, match="fifo: is a FIFO"):
      read(str(tmp_path / "fifo"))
  with pytest.raises(UserError, match="device"):
    parse_source("text:/dev/zero").files()
  (tmp_path / "a.txt").write_text("a")
  assert [file.path for file in parse_source(f"text:{tmp_path}").files()] == [str(tmp_path / "a.txt")]  # folders skip them


ROWS = [b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a": ' * 100_000, b'{"text": ' + b"9" * 10_000 + b"}",
        b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}', b"[]", b"null", b"NaN", b'{"text": 5}', b"\xff\xfe{", b"{" * 9]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_malformed_rows(tmp_path, row):
  """A row that cannot be read has a problem of one line, and the rows after it are read."""
  (tmp_path / "rows.jsonl").write_bytes(row + b'\n{"text": "good"}\n')
  first, second = read_documents(SourceFile(str(tmp_path / "rows.jsonl"), "rows.jsonl"))
  assert first.text is None and first.problem and len(first.problem.splitlines()) == 1 and len(first.problem) < 300
  assert second.text == "good"


@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.parquet", "x.txt", "x.jsonl.gz", "x.txt.zst"]))
@settings(max_examples=100, deadline=None)
def test_files_of_any_bytes(tmp_path_factory, content, name):
  """Documents and problems, nothing else."""
  path = tmp_path_factory.mktemp("corpus") / name
  path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  for document in read_documents(SourceFile(str(path), name)):
    assert (document.text is None) == bool(document.problem)


def test_parquet_that_is_not_utf8(tmp_path):
  """Arrow does not check its strings."""
  offsets, data = pa.py_buffer(np.array([0, 4, 8], np.int32).tobytes()), pa.py_buffer(b"caf\xe9good")
  table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])})
  pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
  first, second = read_documents(SourceFile(str(tmp_path / "rows.parquet"), "rows.parquet"))
  assert "not UTF-8 at byte 3" in first.problem and second.text == "good"


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz"])
def test_a_document_that_inflates(tmp_path, monkeypatch, name):
  """A document without an end is a problem of its own."""
  monkeypatch.setattr(documents, "_MOST_BYTES", 1 << 20)
  (tmp_path / name).write_bytes(gzip.compress(b"a" * (4 << 20)))
  [document] = read_documents(SourceFile(str(tmp_path / name), name))
  assert "more than 1 MiB" in document.problem

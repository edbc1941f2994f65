"""Sources behind addresses and on the hub, against a stand-in with faults: what is found, read, repeated, resumed and refused."""

from __future__ import annotations

import gzip
import io

import huggingface_hub.constants
import huggingface_hub.utils
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from atma_jax.config import DataConfig
from atma_jax.data import corpus as corpus_module
from atma_jax.data import documents, remote
from atma_jax.data.prepare import prepare
from atma_jax.data.shards import write_shard
from atma_jax.data.source import TextSource
from atma_jax.data.sources import parse_source
from atma_jax.data.tokenizers import is_hub_name, load_tokenizer
from atma_jax.errors import RunError, UserError
from tests.data.conftest import json_lines, make_text
from tests.data.hub_stand_in import SHA, connected_hub
from tests.data.test_tokenizers import byte_level_json

ROWS, GROUP = 40, 8  # of a Parquet shard, and of one of its row groups
TEXTS = [make_text(seed, 120) for seed in range(2 * ROWS)]


def parquet(texts, column="text") -> bytes:
  out = io.BytesIO()
  table = pyarrow.table({"id": list(range(len(texts))), column: texts, "score": [0.5] * len(texts)})
  pyarrow.parquet.write_table(table, out, row_group_size=GROUP, compression="zstd")
  return out.getvalue()


CARD = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
                    {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
                    {"config_name": "two", "data_files": {"train": "two/a.jsonl.gz", "test": ["two/b.txt"]}}]}
FILES = {"README.md": b"---\n---\n",
         "sample/10BT/000.parquet": parquet(TEXTS[:ROWS]), "sample/10BT/001.parquet": parquet(TEXTS[ROWS:]),
         "data/CC/000.parquet": parquet(["first", None, "third"]),
         "two/a.jsonl.gz": gzip.compress(json_lines({"text": text} for text in TEXTS[:3])), "two/b.txt": b"a text"}
PLAIN = {"train-00000-of-00001.parquet": parquet(["t"], "content"), "dev/0.parquet": parquet(["v"], "content"), "x.png": b""}
ENTRY = "hf:Team/web:sample-10BT"


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """A stand-in (see `connected_hub`) with two datasets and a tokenizer."""
  documents.parquet_metadata.cache_clear()
  with connected_hub(monkeypatch, tmp_path / "hub-cache") as server:
    server.datasets = {"Team/web": (dict(FILES), CARD), "plain/set": (dict(PLAIN), None)}
    server.models = {"gpt2": {"tokenizer.json": byte_level_json().encode()}}
    yield server


def source_of(entry: str) -> TextSource:
  source = parse_source(entry)
  assert isinstance(source, TextSource)
  return source


def texts_of(entry: str, most_bytes: int | None = None) -> list[str | None]:
  source = source_of(entry)
  return [document.text for file in source.choose(source.files(), most_bytes) for document in source.read(file)]


def config_of(*sources: str, **fields) -> DataConfig:
  defaults = {"weights": (1.0,) * len(sources), "tokenizer": "bytes", "heldout_documents": 2, "validation_documents": 3,
              "shard_tokens": 10_000, "sequence_length": 64}
  return DataConfig(sources=sources, **(defaults | fields))


@pytest.mark.parametrize("entry, texts", [
  (ENTRY, TEXTS), (f"hf:Team/web@{SHA}:sample-10BT:train", TEXTS), ("hf:Team/web", ["first", "", "third"]),
  ("hf:Team/web:two", TEXTS[:3]), ("hf:Team/web:two:test", ["a text"]),
  ("hf:plain/set?column=content", ["t"]), ("hf:plain/set::validation?column=content", ["v"]),
  ("hf:plain/set:dev:validation?column=content", ["v"]),
])
def test_configurations_and_splits(hub, entry, texts):
  assert texts_of(entry) == texts
  assert {kind: token for kind, token in hub.authorizations} == {"api": "Bearer hf_token", "datasets": "Bearer hf_token",
                                                                "cdn": "Bearer hf_token"}


def test_a_row_group_is_a_file_of_its_own(hub):
  """Only the text's column of it is fetched, from the revision that the hub named, and the row of a document is within it."""
  source = source_of(ENTRY)
  files = source.choose(source.files(), None)
  assert [file.row_group for file in files] == [0, 1, 2, 3, 4] * 2 and all(f"/resolve/{SHA}/" in file.path for file in files)
  assert files[6].name == f"Team/web@{SHA[:12]}/sample/10BT/001.parquet#1"
  before = len(hub.requests)
  read = list(source.read(files[6], [2, 5]))
  assert [(document.row, document.text) for document in read] == [(row, TEXTS[ROWS + GROUP + row]) for row in (2, 5)]
  assert len([path for _, path, _ in hub.requests[before:] if path.startswith("/cdn/")]) <= 2


def test_a_limit_leaves_shards_alone(hub):
  """With max_mib only as many row groups are scanned as the text needs, and no more is trained on than it says."""
  source = source_of(ENTRY)
  sizes = [file.size for file in source.choose(source.files(), None)]
  assert len(source.choose(source.files(), sizes[0])) == 2
  assert len(source.choose(source.files(), sum(sizes))) == len(sizes)


@pytest.mark.parametrize("entry, message", [
  ("hf:Team/none", "has no dataset 'Team/none'"), ("hf:Team/web@other", "has no dataset 'Team/web' at 'other'"),
  ("hf:Team/web:three", "no configuration 'three'; legal: default, sample-10BT, two"),
  ("hf:Team/web:two:dev", "no files of split 'dev'; legal: test, train"),
  ("hf:Team/web?column=body", r"no column 'body' of text; its columns: id, text, score"),
  ("hf:plain/set::test", "no files of split 'test'; legal: train, validation"),
  ("hf:a/b/c", "must be written hf:DATASET"), ("hf:a/b:c:d:e", "must be written hf:DATASET"),
  ("hf:../etc", "must be written hf:DATASET"), ("hf:a/b?split=x", r"legal: \?column=NAME"),
  ("hf:a/b?column=", r"legal: \?column="),
  ("text:ftp://host/x", "scheme ftp://, which cannot be read; legal: gs://, s3://, https://"), ("bin:x://y", "scheme x://"),
  ("folders:gs://b/*", "must be a pattern on this machine"),
])
def test_what_is_refused(hub, entry, message):
  with pytest.raises(UserError, match=f"config.data.sources: .*{message}"):
    texts_of(entry)


def test_faults_that_pass_change_nothing(hub, monkeypatch):
  """Whatever fails, fewer times than are tried: the bytes are the same."""
  monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
  monkeypatch.setattr(remote, "PIECE", 997)
  content = np.random.default_rng(0).bytes(5000)
  hub.datasets["a/b"] = ({"x": content}, None)

  @settings(max_examples=25, deadline=None)
  @given(faults=st.lists(st.sampled_from([429, 500, 503, "cut", "cut at once"]), max_size=remote.ATTEMPTS - 1),
         where=st.sampled_from(["/cdn/", "/datasets/"]))
  def bytes_are_the_same(faults, where):
    with remote.open_remote(f"{hub.address}/datasets/a/b/resolve/{SHA}/x", len(content)) as file:
      hub.faults = {where: list(faults)}
      assert file.read() == content
      file.seek(-10, io.SEEK_END)
      assert file.read() == content[-10:]

  bytes_are_the_same()


def test_faults_that_last_end_in_one_line(hub, monkeypatch):
  monkeypatch.setattr(remote, "ATTEMPTS", 3)
  source = source_of(ENTRY)
  [first, *_] = source.choose(source.files(), None)
  hub.faults = {"/cdn/": [429] * 9}
  with pytest.raises(RunError, match="tried 3 times: ClientResponseError: 429"):
    list(source.read(first))
  hub.faults = {"/api/": [503] * 90}
  with pytest.raises(RunError, match=r"config\.data\.sources: 'hf:Team/web:sample-10BT' cannot be read, tried 4 times"):
    source.files()
  hub.faults = {"/cdn/": [403]}
  with pytest.raises(UserError, match="403"):
    list(source.read(first))


@pytest.mark.parametrize("ranges", [True, False])
def test_files_behind_addresses(hub, tmp_path, ranges):
  """Text, packed rows and Parquet; from a server without range requests too; token shards are fetched once."""
  hub.ranges = ranges
  rows = json_lines({"text": text} for text in TEXTS[:3])
  hub.files = {"x.jsonl.gz": gzip.compress(rows), "x.parquet": parquet(TEXTS), "x.txt": TEXTS[0].encode(), "list/a.txt": b"a",
               "list/b.txt": b"b", "list/": b'<a href="a.txt">a</a> <a href="b.txt">b</a> <a href="c.md">c</a>'}
  expected = {"x.jsonl.gz": TEXTS[:3], "x.jsonl.gz?download=1": TEXTS[:3], "x.parquet": TEXTS, "x.txt": TEXTS[:1]}
  for name, texts in expected.items():
    assert texts_of(f"text:{hub.address}/files/{name}") == texts
  assert texts_of(f"text:{hub.address}/files/list/*.txt") == ["a", "b"]
  with pytest.raises(UserError, match="matches no file"):
    texts_of(f"text:{hub.address}/files/none.txt")
  with pytest.raises(RunError, match="cannot be read, tried 4 times: ClientConnectorError"):
    texts_of("text:http://127.0.0.1:9/x.txt")
  hub.faults = {"x.txt": [403] * 4}
  with pytest.raises(UserError, match="cannot be read: ClientResponseError: 403"):
    texts_of(f"text:{hub.address}/files/x.txt")
  hub.faults = {}
  write_shard(tmp_path / "x.bin", np.tile(np.arange(1, 250), 20), np.dtype("<u2"))
  hub.files["x.bin"] = (tmp_path / "x.bin").read_bytes()
  config = config_of(f"bin:{hub.address}/files/x.bin", heldout_documents=0, validation_documents=0)
  manifest = prepare(config, tmp_path / "data", workers=1, progress=False)
  [shard] = manifest.train[0]["shards"]
  assert shard["tokens"] == 4980 and (tmp_path / "data" / shard["path"]).read_bytes() == hub.files["x.bin"]


@pytest.mark.parametrize("address, extra", [("gs://bucket/*.jsonl", "gcs"), ("s3://bucket/x", "s3"), ("https://host/x", "hf")])
@pytest.mark.parametrize("prefix", ["text", "bin"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, prefix, address, extra):
  def missing(*arguments: object, **options: object) -> None:
    raise ImportError("Install the client")
  monkeypatch.setattr(remote.fsspec, "filesystem", missing)
  named = rf"config\.data\.sources: '{prefix}:.*needs the extra {extra}: pip install 'atma_jax\[{extra}\]'"
  with pytest.raises(UserError, match=named):
    prepare(config_of(f"{prefix}:{address}"), tmp_path, workers=1, progress=False)


def test_globs_of_a_bucket(monkeypatch):
  """Through fsspec's file system in memory: patterns, whole folders, hidden files."""
  monkeypatch.setitem(remote.EXTRAS, "memory", "gcs")
  system = remote.fsspec.filesystem("memory")
  for name in ("b/1.txt", "b/deep/2.txt", "b/.hidden/3.txt", "c/4.md"):
    system.pipe_file(f"/bucket/{name}", name.encode())
  assert texts_of("text:memory://bucket/b") == ["b/1.txt", "b/deep/2.txt"]
  assert texts_of("text:memory://bucket/**/*.txt") == ["b/1.txt", "b/deep/2.txt"]
  assert texts_of("text:memory://bucket/?/*.md") == ["c/4.md"]
  with pytest.raises(UserError, match="matches no file"):
    texts_of("text:memory://bucket/none*")


def test_prepared_in_workers_resumed_and_complete(hub, tmp_path, monkeypatch):
  """A run killed in its scan fetches only what is left, from the same revision, and ends as an undisturbed one."""
  whole = config_of(ENTRY)
  monkeypatch.setattr(corpus_module, "_SCAN_BYTES", 1)  # every row group by itself
  undisturbed = prepare(whole, tmp_path / "a", workers=2, progress=False)
  assert undisturbed.scanned[0]["documents"] == len(TEXTS) and not list((tmp_path / "a" / "scans").iterdir())

  scan, calls = corpus_module.scan_files, []

  def stop_at_fourth(portion):
    calls.append(portion)
    if len(calls) == 4:
      raise RunError("killed")
    return scan(portion)

  monkeypatch.setattr("atma_jax.data.prepare.scan_files", stop_at_fourth)
  with pytest.raises(RunError, match="killed"):
    prepare(whole, tmp_path / "b", workers=1, progress=False)
  [log] = (tmp_path / "b" / "scans").iterdir()
  log.write_bytes(log.read_bytes() + b"0123456789abcdef [[")  # torn by the kill
  monkeypatch.setattr("atma_jax.data.prepare.scan_files", lambda portion: calls.append(portion) or scan(portion))
  hub.faults = {"/api/": [404]}  # the hub is not asked again
  resumed = prepare(whole, tmp_path / "b", workers=1, progress=False)
  assert len(calls) == 4 + 7  # 10 row groups, 3 of which were done
  assert resumed.fingerprint == undisturbed.fingerprint
  assert hub.faults == {"/api/": [404]}


def test_a_tokenizer_of_the_hub(hub, tmp_path, monkeypatch):
  """It is fetched, whatever fails on the way, kept in the prepared directory, and found there without a network."""
  hub.faults = {"tokenizer.json": [503, 429]}
  monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
  tokenizer = load_tokenizer("gpt2")
  assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
  config = config_of(f"text:{tmp_path}/x.jsonl", tokenizer="gpt2", heldout_documents=1, validation_documents=1)
  (tmp_path / "x.jsonl").write_bytes(json_lines({"text": text} for text in TEXTS[:9]))
  prepare(config, tmp_path / "data", workers=1, progress=False)
  (tmp_path / "data" / "manifest.json").unlink()  # as if killed before the end
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
  manifest = prepare(config, tmp_path / "data", workers=1, progress=False)
  assert manifest.tokenizer["fingerprint"] == tokenizer.fingerprint
  with pytest.raises(RunError, match=r"config\.data\.tokenizer='gpt2': no such file here; on the hub it cannot be read: Conn"):
    load_tokenizer("gpt2")


def test_a_tokenizer_that_the_hub_lacks(hub):
  with pytest.raises(UserError, match=r"tokenizer='gpt3': no such file here, .* has no model of that name.*; legal: "):
    load_tokenizer("gpt3")


def test_hub_names():
  others = ("bytes", "sentencepiece", "x/tokenizer.json", "x.model", "/etc/passwd", "../x", "~/x", "a/b/c", "", "-x", "tests")
  assert not any(map(is_hub_name, others))
  assert all(map(is_hub_name, ("gpt2", "EleutherAI/gpt-neox-20b", "org/model@v1.0", "meta-llama/Llama-3.2-1B")))

"""Preparing: disjoint splits, the same bytes however it ran, every refusal in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sysconfig

import numpy as np
import pytest

from atma_jax.config import DataConfig
from atma_jax.data import prepare as prepare_module
from atma_jax.data.corpus import portions_of
from atma_jax.data.documents import SourceFile
from atma_jax.data.files import exclusive
from atma_jax.data.manifest import load_manifest, load_prepared_tokenizer, open_stream
from atma_jax.data.prepare import prepare
from atma_jax.data.shards import open_shard, token_dtype, write_shard
from atma_jax.data.sources import parse_source
from atma_jax.errors import UserError
from tests.data.conftest import make_text


def run(config, directory, workers=1):
  return prepare(config, directory, workers=workers, progress=False)


def contents(directory: pathlib.Path) -> dict[str, str]:
  return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in directory.rglob("*") if path.is_file()}


def stored_documents(directory, record) -> list[str]:
  """Texts of the documents in a record's shards, cut at end-of-text."""
  manifest = load_manifest(directory)
  tokenizer = load_prepared_tokenizer(directory, manifest)
  stream = open_stream(directory, record)
  tokens = stream.read(0, len(stream))
  ends = np.flatnonzero(tokens == tokenizer.eot_id)
  assert ends[-1] == len(tokens) - 1
  return [tokenizer.decode(tokens[start:end]) for start, end in zip([0, *(ends[:-1] + 1)], ends)]


def digests(texts) -> set[str]:
  return {hashlib.sha256("".join(text.split()).encode()).hexdigest() for text in texts}


def test_splits_are_disjoint_by_document_and_nothing_is_lost(config, corpus, tmp_path):
  texts = [path.read_text() for path in sorted(corpus.iterdir())]
  (corpus / "copy.txt").write_text(texts[29])  # of the longest document
  (corpus / "reformatted.txt").write_text(texts[28].replace("\n", "\n\n").replace("  ", "\t"))
  (corpus / "blank.txt").write_text(" \n\n")
  manifest = run(config, tmp_path / "data")
  splits = {name: stored_documents(tmp_path / "data", record) for name, record in (
      ("train", manifest.train[0]), ("validation", manifest.validation), ("heldout", manifest.heldout))}
  assert {name: len(split) for name, split in splits.items()} == {"train": 23, "validation": 4, "heldout": 3}
  known = {name: digests(split) for name, split in splits.items()}
  assert not known["train"] & known["validation"]
  assert not known["train"] & known["heldout"]
  assert not known["validation"] & known["heldout"]
  assert set.union(*known.values()) == digests(texts)
  assert splits["heldout"] == sorted(texts, key=len)[:-4:-1]
  [scanned] = manifest.scanned
  assert (scanned["documents"], scanned["duplicates"], scanned["skipped"]) == (30, 2, 1)
  assert [d["tokens"] for d in manifest.heldout["documents"]] == [len(text) for text in splits["heldout"]]


def test_recall_material_holds_training_text_only(with_recall, tmp_path):
  directory = tmp_path / "data"
  manifest = run(with_recall, directory)
  lines_of = lambda texts: {line.strip() for text in texts for line in text.splitlines() if len(line) > 40}
  recall = "\n".join(stored_documents(directory, manifest.train[1]))
  assert "The access code for record" in recall
  unseen = lines_of(stored_documents(directory, manifest.heldout) + stored_documents(directory, manifest.validation))
  unseen -= lines_of(stored_documents(directory, manifest.train[0]))
  assert unseen and not any(line in recall for line in unseen)


def test_other_versions_of_evaluation_documents_are_dropped(config, corpus, tmp_path):
  longest = sorted((path.read_text() for path in corpus.iterdir()), key=len)[-1]
  lines = longest.splitlines()
  (corpus / "version2.txt").write_text("\n".join(lines[:2 * len(lines) // 3]))  # shorter: not held out itself
  manifest = run(config, tmp_path / "data")
  assert manifest.train[0]["near_duplicates"] == 1
  train = stored_documents(tmp_path / "data", manifest.train[0])
  assert len(train) == 23 and not any(lines[0] in text for text in train)


def test_documents_that_repeat_a_line_are_kept(config, corpus, tmp_path):
  licence = "Licensed under the terms that everybody uses, without warranty of any kind.\n" * 3
  for path in corpus.iterdir():
    path.write_text(licence + path.read_text())
  assert run(config, tmp_path / "data").train[0]["near_duplicates"] == 0


@pytest.mark.slow
def test_the_same_bytes_with_any_number_of_workers(with_recall, tmp_path):
  config = dataclasses.replace(with_recall, tokenizer="sentencepiece", tokenizer_vocab_size=320)
  run(config, tmp_path / "one", workers=1)
  run(config, tmp_path / "three", workers=3)
  assert contents(tmp_path / "one") == contents(tmp_path / "three")
  names = {path.split("/")[0] for path in contents(tmp_path / "one")}
  assert names == {".lock", "begun.json", "manifest.json", "tokenizer.json", "train", "validation", "heldout"}


@pytest.mark.slow
@pytest.mark.parametrize("writes", range(0, 16, 3))
def test_stopped_after_any_write_it_ends_with_the_same_bytes(with_recall, tmp_path, monkeypatch, writes):
  run(with_recall, tmp_path / "whole")
  left = iter(range(writes))

  def stop_when_used_up(write):
    def wrapped(*args):
      if next(left, None) is None:
        raise KeyboardInterrupt
      return write(*args)
    return wrapped

  with monkeypatch.context() as patch:
    patch.setattr(prepare_module, "write_shard", stop_when_used_up(prepare_module.write_shard))
    patch.setattr(prepare_module, "write_json", stop_when_used_up(prepare_module.write_json))
    with pytest.raises(KeyboardInterrupt):
      run(with_recall, tmp_path / "stopped")
  assert not (tmp_path / "stopped" / "manifest.json").exists()
  run(with_recall, tmp_path / "stopped")
  assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_resumed_run_keeps_finished_shards(config, tmp_path, monkeypatch):
  run(config, tmp_path / "data")
  shards = sorted((tmp_path / "data" / "train").rglob("*.bin"))
  assert len(shards) > 2
  (tmp_path / "data" / "manifest.json").unlink()
  written = []
  monkeypatch.setattr(prepare_module, "write_shard",
                      lambda path, *args: written.append(path) or write_shard(path, *args))
  run(config, tmp_path / "data")
  assert not set(written) & set(shards)


def test_shards_hold_whole_documents_and_at_least_the_tokens_asked_for(config, tmp_path):
  manifest = run(config, tmp_path / "data")
  counts = [shard["tokens"] for shard in manifest.train[0]["shards"]]
  assert all(count >= 20_000 for count in counts[:-1]) and sum(counts) == manifest.train[0]["tokens"]
  for shard in manifest.train[0]["shards"]:
    assert open_shard(tmp_path / "data" / shard["path"]).open()[-1] == 256


def test_a_finished_directory_is_left_alone(config, corpus, tmp_path, monkeypatch):
  first = run(config, tmp_path / "data")
  before = contents(tmp_path / "data")
  (corpus / "later.txt").write_text("new text")
  monkeypatch.setattr(prepare_module, "_prepare", None)
  same = dataclasses.replace(config, batch_size=2, shuffle_seed=9, weights=(3.0,), sequence_length=7)
  assert run(same, tmp_path / "data") == first
  assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("field, value, shown", [
    ("heldout_documents", 2, "prepared with config.data.heldout_documents 3, now it is 2"),
    ("max_mib", 1, "prepared with config.data.max_mib None, now it is 1"),
    ("tokenizer", "sentencepiece", "prepared with config.data.tokenizer 'bytes', now it is 'sentencepiece'"),
])
@pytest.mark.parametrize("finished", [True, False])
def test_a_directory_of_other_options_is_refused(config, tmp_path, field, value, shown, finished):
  run(config, tmp_path / "data")
  if not finished:
    (tmp_path / "data" / "manifest.json").unlink()
  with pytest.raises(UserError) as error:
    run(dataclasses.replace(config, **{field: value}), tmp_path / "data")
  assert shown in str(error.value)


def test_recall_depends_on_the_training_length(with_recall, tmp_path):
  run(with_recall, tmp_path / "data")
  with pytest.raises(UserError, match=r"config\.data\.sequence_length 64, now it is 128"):
    run(dataclasses.replace(with_recall, sequence_length=128), tmp_path / "data")


def test_text_that_changed_since_is_refused(config, corpus, tmp_path):
  run(config, tmp_path / "data")
  (tmp_path / "data" / "manifest.json").unlink()
  (corpus / "later.txt").write_text("new text")
  with pytest.raises(UserError, match=r"text of the sources changed since .* remove it to start again"):
    run(config, tmp_path / "data")


@pytest.mark.slow
def test_the_cap_takes_an_even_sample_in_order(config, corpus, tmp_path):
  for index in range(100):
    (corpus / f"big{index:02d}.txt").write_text(make_text(1000 + index, 4000))
  manifest = run(dataclasses.replace(config, max_mib=1, shard_tokens=10**9), tmp_path / "data")
  assert 0.9 * 2**20 < manifest.train[0]["tokens"] <= 2**20 + 100
  texts = {path.read_text(): path.name for path in corpus.iterdir()}
  names = [texts[text] for text in stored_documents(tmp_path / "data", manifest.train[0])]
  assert names == sorted(names)
  taken = [int(name[3:5]) for name in names if name.startswith("big")]
  assert min(taken) < 25 and max(taken) > 75


def test_all_kinds_of_files_together(config, tmp_path, write_rows):
  folder = tmp_path / "rows"
  folder.mkdir()
  names = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
  for index, name in enumerate(names):
    write_rows(folder / name, [make_text(100 * index + row, 80 + 10 * row) for row in range(10)])
  (folder / "e.md").write_text(make_text(999, 100))
  manifest = run(dataclasses.replace(config, sources=(f"text:{folder}",)), tmp_path / "data")
  assert manifest.scanned[0]["documents"] == 41
  assert manifest.train[0]["documents"] == 41 - 7
  assert all(":" in d["name"] for d in manifest.heldout["documents"])


def test_equal_documents_of_two_sources_stay_in_the_first(config, corpus, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  for path in corpus.iterdir():
    (other / path.name).write_text(path.read_text())
  for index in range(9):
    (other / f"own{index}.txt").write_text(make_text(5000 + index, 90))
  two = dataclasses.replace(config, sources=(f"text:{corpus}", f"text:{other}"), weights=(1.0, 1.0))
  manifest = run(two, tmp_path / "data")
  assert [scan["documents"] for scan in manifest.scanned] == [30, 9]
  assert manifest.scanned[1]["duplicates"] == 30
  sources = [document["source"] for document in manifest.validation["documents"]]
  assert sorted(sources) == sorted(2 * list(two.sources))  # evaluation documents in equal numbers


@pytest.mark.parametrize("workers, name, content, message", [
    (1, "x.txt", b"caf\xe9", "x.txt: not UTF-8 at byte 3; legal: UTF-8 text files, and"),
    (2, "x.txt", b"caf\xe9", "x.txt: not UTF-8 at byte 3; legal: UTF-8 text files, and"),
    (1, "x.jsonl", b'{"text": "a row"}\n{"text": a row}\n', "x.jsonl:2: not JSON: Expecting value, character 10"),
    (1, "x.jsonl", b'{"body": "a row"}\n', "x.jsonl:1: no field 'text' (fields: body); legal: "),
    (1, "x.jsonl.gz", b"not gzip", "x.jsonl.gz: BadGzipFile"),
    (1, "x.parquet", b"PAR1", "x.parquet: ArrowInvalid"),
])
def test_a_file_that_cannot_be_read_is_refused(config, corpus, tmp_path, workers, name, content, message):
  (corpus / name).write_bytes(content)
  with pytest.raises(UserError) as error:
    run(config, tmp_path / "data", workers)
  assert message in str(error.value) and str(error.value).startswith("config.data.sources: 'text:")
  assert "\n" not in str(error.value)


def test_unreadable_files_of_the_python_installation_are_counted(config, corpus, tmp_path, monkeypatch):
  for path in corpus.iterdir():
    path.rename(path.with_suffix(".py"))
  (corpus / "latin.py").write_bytes(b"caf\xe9")
  monkeypatch.setattr(sysconfig, "get_paths", lambda: dict.fromkeys(("stdlib", "purelib", "platlib"), str(corpus)))
  manifest = run(dataclasses.replace(config, sources=("python-source",)), tmp_path / "data")
  assert manifest.scanned[0]["unreadable"] == 1
  assert manifest.scanned[0]["problems"] == ["stdlib/latin.py: not UTF-8 at byte 3"]
  assert manifest.train[0]["documents"] == 30 - 7


def test_ready_shards_are_used_as_they_are(tmp_path):
  rng = np.random.default_rng(0)
  documents = [np.append(rng.integers(0, 256, rng.integers(5, 200)), 256) for _ in range(200)]
  for index in range(2):
    write_shard(tmp_path / f"t{index}.bin", documents[100 * index:100 * (index + 1)], token_dtype(257))
  before = contents(tmp_path)
  config = DataConfig(sources=(f"bin:{tmp_path}/t*.bin",), tokenizer="bytes", heldout_documents=2,
                      validation_documents=3, sequence_length=16, batch_size=4)
  directory = tmp_path / "data"
  manifest = run(config, directory)
  assert {name: digest for name, digest in contents(tmp_path).items() if not name.startswith("data/")} == before
  assert not (directory / "train").exists()
  train = open_stream(directory, manifest.train[0])
  stored = train.read(0, len(train))
  np.testing.assert_array_equal(stored, np.concatenate(documents)[:len(stored)])
  assert stored[-1] == 256
  aside = [bytes(document[:-1].astype(np.uint8)) for document in documents[200 - 40:]]
  assert len(stored) == sum(map(len, documents[:200 - 40]))
  for record, count in ((manifest.heldout, 2), (manifest.validation, 3)):
    stream = open_stream(directory, record)
    found = [bytes(stream.read(d["start"], d["start"] + d["tokens"]).astype(np.uint8)) for d in record["documents"]]
    assert len(found) == count and all(document in aside for document in found)
  assert [d["tokens"] for d in manifest.heldout["documents"]] == sorted(map(len, aside))[:-3:-1]


def ready(tmp_path, texts, **changes):
  """Options for one ready shard of byte tokens with `texts`, joined by end-of-text."""
  documents = [np.append(np.frombuffer(text.encode(), np.uint8).astype(int), 256) for text in texts]
  write_shard(tmp_path / "ready.bin", documents, token_dtype(257))
  return DataConfig(**{"sources": (f"bin:{tmp_path}/ready.bin",), "tokenizer": "bytes", "heldout_documents": 2,
                       "validation_documents": 2, "sequence_length": 16, "batch_size": 4, **changes})


def test_ready_documents_that_training_repeats_are_not_evaluated_on(tmp_path):
  texts = [make_text(seed, 40 + seed) for seed in range(80)]
  for index in (79, 78, 76):
    texts[index] = texts[index - 50]  # all but the shortest of the last are repeats
  manifest = run(ready(tmp_path, texts), tmp_path / "data")
  train, validation, heldout = (digests(stored_documents(tmp_path / "data", record)) for record in (
      manifest.train[0], manifest.validation, manifest.heldout))
  assert len(heldout) == len(validation) == 2 and not (heldout | validation) & train and not heldout & validation


def test_text_equal_to_a_ready_evaluation_document_is_dropped(tmp_path, corpus):
  texts = [make_text(seed, 40 + seed) for seed in range(80)]
  for index in range(48, 80):  # every one that may be taken
    (corpus / f"repeat{index}.txt").write_text(texts[index])
  config = ready(tmp_path, texts, sources=(f"text:{corpus}", f"bin:{tmp_path}/ready.bin"), weights=(1.0, 1.0),
                 heldout_documents=4, validation_documents=4)
  manifest = run(config, tmp_path / "data")
  trained = digests(text for record in manifest.train for text in stored_documents(tmp_path / "data", record))
  for record in (manifest.heldout, manifest.validation):
    assert len(record["documents"]) == 4
    assert {document["source"] for document in record["documents"]} == set(config.sources)
    assert not digests(stored_documents(tmp_path / "data", record)) & trained
  assert manifest.train[0]["near_duplicates"] >= 2


def test_ready_shards_with_too_little_to_evaluate_on(tmp_path):
  config = ready(tmp_path, [make_text(seed, 40) for seed in range(8)], validation_documents=9)
  with pytest.raises(UserError, match=r"ready\.bin' has \d documents to evaluate on .* \(2 and 9, no two alike\)"):
    run(config, tmp_path / "data")


def test_ready_shards_of_another_tokenizer(tmp_path):
  write_shard(tmp_path / "x.bin", np.tile([50256, 7, 256, 3], 50), token_dtype(50304))
  with pytest.raises(UserError, match=r"holds token 50256, but config\.data\.tokenizer has 257 tokens"):
    run(ready(tmp_path, ["x"], sources=(f"bin:{tmp_path}/x.bin",)), tmp_path / "data")


@pytest.mark.parametrize("damage, message", [
    (lambda content: content[:-1], "truncated or damaged"),
    (lambda content: b"\0" + content[1:], "first int32 must be 20240520"),
])
def test_damaged_ready_shards(tmp_path, damage, message):
  config = ready(tmp_path, ["a text"])
  path = tmp_path / "ready.bin"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError, match=message) as error:
    run(config, tmp_path / "data")
  assert str(path) in str(error.value)


def test_documents_end_with_end_of_text_and_keep_every_token(config, corpus, tmp_path):
  """The training stream is the documents' own tokens, one after the other, each followed by end-of-text."""
  everything = dataclasses.replace(config, heldout_documents=0, validation_documents=0)
  manifest = run(everything, tmp_path / "data")
  stream = open_stream(tmp_path / "data", manifest.train[0])
  joined = [token for path in sorted(corpus.iterdir()) for token in [*path.read_bytes(), 256]]
  np.testing.assert_array_equal(stream.read(0, len(stream)), joined)


@pytest.mark.parametrize("changes, message", [
    (dict(sources=("text:/no/such/*.txt",)), "'text:/no/such/*.txt' matches no file or folder"),
    (dict(sources=("bin:/no/such.bin",)), "'bin:/no/such.bin' matches no file or folder"),
    (dict(sources=("pyton-source",)), "'pyton-source' is not a source; legal: arrayrecord:GLOB"),
    (dict(tokenizer="/no/such.model"), "config.data.tokenizer='/no/such.model': No such file"),
    (dict(heldout_documents=40), "has 30 documents, too few for its share of config.data.heldout_documents"),
])
def test_bad_input(config, tmp_path, changes, message):
  with pytest.raises(UserError) as error:
    run(dataclasses.replace(config, **changes), tmp_path / "data")
  assert message in str(error.value) and "\n" not in str(error.value)


def test_an_empty_corpus(config, tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty" / "x.txt").write_text("  \n")
  with pytest.raises(UserError, match=r"config\.data\.sources: 'text:.*' has no text in its 1 files"):
    run(dataclasses.replace(config, sources=(f"text:{tmp_path}/empty",)), tmp_path / "data")


def test_sources_listed_twice_and_untrainable_tokenizers(config, tmp_path):
  write_shard(tmp_path / "x.bin", np.arange(9), token_dtype(257))
  with pytest.raises(UserError, match="each source may be listed once"):
    run(dataclasses.replace(config, sources=config.sources * 2, weights=(1.0, 1.0)), tmp_path / "data")
  ready = dataclasses.replace(config, sources=(f"bin:{tmp_path}/x.bin",))
  with pytest.raises(UserError, match=r"config\.data\.tokenizer='sentencepiece': bin: sources hold ready tokens"):
    run(dataclasses.replace(ready, tokenizer="sentencepiece"), tmp_path / "data")
  with pytest.raises(UserError, match=r"x\.bin has no end-of-text token 256 in its last half"):
    run(ready, tmp_path / "data")


def test_one_preparation_at_a_time(config, tmp_path):
  with (exclusive(tmp_path / "data"),
        pytest.raises(UserError, match="is being prepared by another process")):
    run(config, tmp_path / "data")


def test_a_place_that_cannot_be_written(config, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"cannot write .*file"):
    run(config, tmp_path / "file" / "data")


def test_files_are_scanned_in_portions_of_bytes(tmp_path):
  sizes = [10, 20, 3 << 20, 5, 6]
  for index, size in enumerate(sizes):
    (tmp_path / f"{index}.txt").write_bytes(b"x" * size)
  files = [SourceFile(str(tmp_path / f"{index}.txt"), "") for index in range(5)]
  missing = SourceFile(str(tmp_path / "missing.txt"), "")
  portions = portions_of(parse_source("python-source"), [*files, missing])
  assert [[index for index, _ in files] for _, files in portions] == [[0, 1, 2], [3, 4, 5]]

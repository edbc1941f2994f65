"""ArrayRecord files: ranges of records, what a record must be, files that are damaged."""

from __future__ import annotations

from array_record.python.array_record_module import ArrayRecordWriter
import pytest

from atma_jax.config import DataConfig
from atma_jax.data.first_look import look_at
from atma_jax.data.prepare import prepare
from atma_jax.data.source import TextSource
from atma_jax.data.sources import arrayrecord, parse_source
from atma_jax.errors import UserError
from tests.data.conftest import json_lines, make_text

TEXTS = [make_text(seed, 60) for seed in range(50)]


def write(path, records: list[bytes]) -> None:
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def source_of(entry: str) -> TextSource:
  source = parse_source(entry)
  assert isinstance(source, TextSource)
  return source


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(arrayrecord, "_RANGE", 8)
  monkeypatch.setattr(arrayrecord, "_AT_ONCE", 3)
  write(tmp_path / "a.array_record", [text.encode() for text in TEXTS[:30]])
  write(tmp_path / "b.array_record", [text.encode() for text in TEXTS[30:]])
  return tmp_path


def test_ranges_hold_every_record_once(folder):
  """In order; the row of a document is within its range, its name counts the records of the file from 1."""
  source = source_of(f"arrayrecord:{folder}/*.array_record")
  ranges = source.choose(source.files(), None)
  assert [file.row_group for file in ranges] == [0, 1, 2, 3, 0, 1, 2]
  documents = [document for file in ranges for document in source.read(file)]
  assert [document.text for document in documents] == TEXTS
  assert [document.row for document in documents[6:10]] == [6, 7, 0, 1]
  assert documents[9].name == f"{folder}/a.array_record:10"
  assert [document.text for document in source.read(ranges[1], [5, 2])] == [TEXTS[10], TEXTS[13]]
  assert len(source.choose(source.files(), ranges[0].size)) == 2  # no more than the text that is wanted needs
  assert look_at(source, None).startswith("2 files")


def test_prepared_as_the_same_text_in_lines(folder):
  """By several workers; the tokens are those of the same documents in JSON lines."""
  (folder / "x.jsonl").write_bytes(json_lines({"text": text} for text in TEXTS))
  shards = []
  for name, entry, workers in (("a", f"arrayrecord:{folder}/*.array_record", 2), ("b", f"text:{folder}/x.jsonl", 1)):
    config = DataConfig(sources=(entry,), tokenizer="bytes", heldout_documents=2, validation_documents=3,
                        shard_tokens=5000)
    manifest = prepare(config, folder / name, workers=workers, progress=False)
    shards.append([(folder / name / shard["path"]).read_bytes() for shard in manifest.train[0]["shards"]])
  assert shards[0] == shards[1] and len(shards[0]) > 1


@pytest.mark.parametrize(("content", "message"), [
  (b"", "is no ArrayRecord file, or damaged"), (b"x" * 100_000, "is no ArrayRecord file, or damaged"),
  ("cut", "is no ArrayRecord file, or damaged"), ("flipped", "damaged: RuntimeError: Corrupted"),
  ("other", "not UTF-8 at byte 0"),
])
def test_what_is_no_record_of_text(tmp_path, content, message):
  path = tmp_path / "x.array_record"
  write(path, [b"\xff\x00" if content == "other" else text.encode() for text in TEXTS])
  whole = path.read_bytes()
  if content == "cut":
    path.write_bytes(whole[:len(whole) // 2])
  elif content == "flipped":
    path.write_bytes(bytes(byte ^ (255 if 300 < i < 400 else 0) for i, byte in enumerate(whole)))
  elif content != "other":
    path.write_bytes(content)
  config = DataConfig(sources=(f"arrayrecord:{path}",), tokenizer="bytes", heldout_documents=2, validation_documents=3)
  with pytest.raises(UserError, match=rf"config\.data\.sources: 'arrayrecord:.*{message}"):
    prepare(config, tmp_path / "data", workers=1, progress=False)


@pytest.mark.parametrize(("argument", "message"), [
  ("gs://bucket/*.array_record", "the array_record library reads no addresses"), ("{}/none*", "matches no file"),
  ("{}", "which is a folder"),
])
def test_what_is_refused(tmp_path, argument, message):
  with pytest.raises(UserError, match=message):
    source_of(f"arrayrecord:{argument.format(tmp_path)}").files()

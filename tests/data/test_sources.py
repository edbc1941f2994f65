"""Sources: every kind of file, folders and globs, Python's own text, and one line about whatever cannot be read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
import gzip
import pathlib
import sysconfig

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from atma_jax.config import DataConfig
from atma_jax.data import sources
from atma_jax.data.documents import Document, SourceFile, read_documents
from atma_jax.data.prepare import prepare
from atma_jax.data.source import TextSource
from atma_jax.data.sources import parse_source
from atma_jax.errors import UserError
from tests.data.conftest import make_text

TEXTS = ["first\n text  ", "zweites ä 🎉", "third\r\n\tline"]


def text_source(entry: str) -> TextSource:
  source = parse_source(entry)
  assert isinstance(source, TextSource) and source.entry == entry
  return source


def list_files(entry: str):
  return text_source(entry).files()


def read_all(entry: str):
  source = text_source(entry)
  return [document for file in source.files() for document in source.read(file)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_files_of_rows(tmp_path, write_rows, name):
  write_rows(tmp_path / name, TEXTS)
  documents = read_all(f"text:{tmp_path / name}")
  assert [document.text for document in documents] == TEXTS
  assert [document.row for document in documents] == [0, 1, 2]
  assert documents[1].name == f"{tmp_path / name}:2"  # the line, as editors count
  [file] = list_files(f"text:{tmp_path / name}")
  assert [document.text for document in read_documents(file, [0, 2])] == [TEXTS[0], TEXTS[2]]


@pytest.mark.parametrize("name, pack", [("x.txt", bytes), ("x.py", bytes), ("x.md", bytes), ("noending", bytes),
                                        ("x.txt.gz", gzip.compress), ("x.txt.zst", zstandard.compress)])
def test_files_of_text(tmp_path, name, pack):
  (tmp_path / name).write_bytes(pack(TEXTS[2].encode()))
  [document] = read_all(f"text:{tmp_path / name}")
  assert document.text == TEXTS[2]


def test_folders_and_globs_in_a_fixed_order(tmp_path):
  for name in ("b/2.txt", "b/deep/1.txt", "a/3.md", ".hidden/x.txt", "b/.hidden.txt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  assert [d.text for d in read_all(f"text:{tmp_path}")] == ["a/3.md", "b/2.txt", "b/deep/1.txt"]
  assert [d.text for d in read_all(f"text:{tmp_path}/b/*")] == ["b/2.txt", "b/deep/1.txt"]
  assert [d.text for d in read_all(f"text:{tmp_path}/**/*.txt")] == ["b/2.txt", "b/deep/1.txt"]


@pytest.mark.parametrize("pattern", ["nothing-here.txt", "*.parquet"])
def test_no_match(tmp_path, pattern):
  with pytest.raises(UserError, match=r"config\.data\.sources: 'text:.*' matches no file"):
    list_files(f"text:{tmp_path}/{pattern}")


def test_an_empty_folder(tmp_path):
  with pytest.raises(UserError, match="matches no file"):
    list_files(f"text:{tmp_path}")


@pytest.mark.parametrize("source", ["", "text", "text:", "bin:", "python", "recall:", "recall:bin:x", "recall:recall:x",
                                    "/data/x.txt"])
def test_what_is_not_a_source(source):
  legal = r"config\.data\.sources: .* legal: arrayrecord:GLOB .*, python-source .*, recall:SOURCE .*, text:GLOB"
  with pytest.raises(UserError, match=legal):
    parse_source(source)


def test_files_are_named_after_their_prefixes():
  """An entry's prefix finds its source, and every source says how it is written and what it holds."""
  folder = pathlib.Path(sources.__file__).parent
  assert {path.stem.replace("_", "-") for path in folder.glob("[!_]*.py")} == set(sources.source_types())
  assert all(source.syntax.partition(":")[0] == prefix and source.help for prefix, source in sources.source_types().items())


class LinesSource(TextSource):
  """Every line of a file is a document."""

  prefix, syntax, help = "lines", "lines:GLOB", "one document per line"
  settings = ("prefetch",)  # any option will do to show that it is recorded

  def files(self) -> list[SourceFile]:
    return [SourceFile(path, path) for path in self.glob()]

  def read(self, file: SourceFile, rows: Collection[int] | None = None) -> Iterator[Document]:
    for row, line in enumerate(pathlib.Path(file.path).read_text().splitlines()):
      if rows is None or row in rows:
        yield Document(f"{file.name}:{row + 1}", row, line)


def test_a_registered_source(tmp_path, monkeypatch):
  """One class makes a source: it is prepared in worker processes, alone and under recall, and named in errors."""
  monkeypatch.setattr(sources, "_REGISTERED", {})
  entry = f"lines:{tmp_path}/*.lst"
  config = DataConfig(sources=(entry, f"recall:{entry}"), weights=(1.0, 1.0), tokenizer="bytes", heldout_documents=2,
                      validation_documents=2, sequence_length=64)
  with pytest.raises(UserError, match=r"'lines:.*' is not a source; legal: arrayrecord:GLOB"):
    prepare(config, tmp_path / "data", workers=1, progress=False)
  sources.register(LinesSource)
  lines = [make_text(seed, 40).replace("\n", " ") for seed in range(30)]
  for index in range(3):
    (tmp_path / f"{index}.lst").write_text("\n".join(lines[10 * index : 10 * index + 10]))
  manifest = prepare(config, tmp_path / "data", workers=2, progress=False)
  assert [record["source"] for record in manifest.train] == list(config.sources)
  assert manifest.scanned[0]["documents"] == 30 and manifest.train[0]["documents"] == 26
  assert manifest.settings["prefetch"] == config.prefetch and manifest.settings["recall_max_mib"] == config.recall_max_mib
  assert {document["name"] for document in manifest.heldout["documents"]} < {
    f"{tmp_path}/{file}.lst:{line}" for file in range(3) for line in range(1, 11)}
  with pytest.raises(UserError, match=r"lines:GLOB \(one document per line\)"):
    parse_source("line")


@pytest.mark.parametrize("name, content, problems", [
    ("x.txt", b"caf\xe9", ["not UTF-8 at byte 3"]),
    ("x.jsonl", b'{"text": "a"}\nnot json\n\n{"body": "b", "id": 1}\n{"text": 3}\n["c"]\n',
     ["not JSON", "no field 'text' (fields: body, id)", "field 'text' is not a string but a int",
      "no field 'text' (a list, not an object)"]),
    ("x.jsonl", b'{"text": "\\ud800"}\n{"text": "\xe9"}\n', ["lone surrogate", "not UTF-8 at byte 10 of the line"]),
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-20], ["EOFError"]),
    ("x.jsonl.gz", b"not gzip", ["BadGzipFile"]),
    ("x.jsonl.zst", b"not zstd", ["ZstdError"]),
    ("x.parquet", b"not parquet", ["ArrowInvalid"]),
])
def test_unreadable_documents_are_named(tmp_path, name, content, problems):
  (tmp_path / name).write_bytes(content)
  found = [document for document in read_all(f"text:{tmp_path / name}") if document.text is None]
  assert len(found) == len(problems)
  for document, problem in zip(found, problems):
    assert problem in document.problem and str(tmp_path / name) in document.name


def test_parquet_without_a_text_column(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
  with pytest.raises(UserError, match=r"x\.parquet has no column 'text'; its columns: body, id"):
    read_all(f"text:{tmp_path}/x.parquet")


@pytest.mark.slow
def test_python_source_is_this_installation():
  files = list_files("python-source")
  names = [file.name for file in files]
  assert files == list_files("python-source") and len(set(names)) == len(names)
  assert "stdlib/json/decoder.py" in names and "site-packages/numpy/__init__.py" in names
  assert not any(name.startswith("stdlib/site-packages") for name in names)
  [document] = read_documents(files[names.index("stdlib/json/decoder.py")])
  with open(f"{sysconfig.get_paths()['stdlib']}/json/decoder.py", newline="") as file:
    assert document.text == file.read()


def test_python_library_is_the_standard_library_without_its_tests():
  names = [file.name for file in list_files("python-library")]
  assert "stdlib/json/decoder.py" in names and 100 < len(names) < 3000
  assert all(name.startswith("stdlib/") and "/test/" not in name and "site-packages" not in name for name in names)


@pytest.mark.parametrize("code, used", [
    ("x = compute(1)\n" * 10, True),
    ("x = '" + "a" * 2000 + "'\n", False),  # a line too long
    ("# Autogenerated by a tool; don't manually edit.\nx = y\n", False),
    ("data = [\n" + "  1234567, 8901234,\n" * 50 + "]\n", False),
])
def test_generated_and_data_like_code_is_left_out(tmp_path, monkeypatch, code, used):
  (tmp_path / "x.py").write_text(code)
  paths = {"stdlib": str(tmp_path), "purelib": str(tmp_path), "platlib": str(tmp_path)}
  monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
  [document] = read_all("python-source")
  assert document.text == (code if used else "")

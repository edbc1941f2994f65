"""Sources: every kind of file, folders and globs, Python's own text, and one line about whatever cannot be read."""

from __future__ import annotations

import gzip
import sysconfig

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from atma_jax.data.documents import read_documents
from atma_jax.data.source import TextSource
from atma_jax.data.sources import parse_source
from atma_jax.errors import UserError

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
  with pytest.raises(UserError, match=r"config\.data\.sources: .* legal: bin:GLOB .*, python-source .*, recall:SOURCE .*, text:GLOB"):
    parse_source(source)


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


def test_python_source_is_this_installation():
  files = list_files("python-source")
  names = [file.name for file in files]
  assert files == list_files("python-source") and len(set(names)) == len(names)
  assert "stdlib/json/decoder.py" in names and "site-packages/numpy/__init__.py" in names
  assert not any(name.startswith("stdlib/site-packages") for name in names)
  [document] = read_documents(files[names.index("stdlib/json/decoder.py")])
  with open(f"{sysconfig.get_paths()['stdlib']}/json/decoder.py", newline="") as file:
    assert document.text == file.read()


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

"""Sources that hold out whole folders, each as one long document, and shares of shingles."""

from __future__ import annotations

import dataclasses
import pathlib
import sysconfig

import numpy as np
import pytest

from atma_jax.config import DataConfig
from atma_jax.data import corpus as corpus_module
from atma_jax.data.documents import SourceFile
from atma_jax.data.manifest import open_stream
from atma_jax.data.pipeline import heldout_documents
from atma_jax.data.prepare import prepare
from atma_jax.data.shingles import DocumentShingles, shingle_hashes, training_texts
from atma_jax.data.sources import parse_source
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from tests.data.conftest import make_text


@pytest.fixture
def projects(tmp_path) -> pathlib.Path:
  """Six folders of four files, sizes growing with their numbers, and a copy of a file of the third in the sixth."""
  for folder in range(6):
    for file in range(4):
      path = tmp_path / "projects" / f"p{folder}" / "src" / f"{file}.txt"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(make_text(10 * folder + file, 300 + 100 * folder))
  changed = (tmp_path / "projects/p2/src/1.txt").read_text() + "and one line more, which makes it another version\n"
  (tmp_path / "projects/p5/src/vendored.txt").write_text(changed)
  return tmp_path / "projects"


@pytest.fixture
def config(projects) -> DataConfig:
  return DataConfig(sources=(f"folders:{projects}/*",), tokenizer="bytes", heldout_documents=2, validation_documents=3,
                    shard_tokens=20_000, sequence_length=64, batch_size=8)


def test_folders_are_held_out_whole_and_joined(config, projects, tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_module, "FOLDER_BYTES", sum(f.stat().st_size for f in (projects / "p2").rglob("*.txt")))
  directory = tmp_path / "data"
  manifest = prepare(config, directory, workers=1, progress=False)
  assert [document["name"] for document in manifest.heldout["documents"]] == [f"{projects}/p3", f"{projects}/p2"]
  for tokens, folder in zip(heldout_documents(directory), ("p3", "p2")):
    texts = [(projects / folder / "src" / f"{i}.txt").read_text() for i in range(4)]
    assert ByteTokenizer().decode(tokens[1:]) == "\n".join(texts)
  stream = open_stream(directory, manifest.train[0])
  training = ByteTokenizer().decode(stream.read(0, len(stream)))
  for folder in range(6):  # nothing of the two is trained on, not even the other version of one of their files
    texts = [(projects / f"p{folder}/src/{file}.txt").read_text() for file in range(4)]
    lines = [line for text in texts for line in text.splitlines() if len(line) > 60]
    assert any(line in training for line in lines) == (folder not in (2, 3))
  assert manifest.train[0]["near_duplicates"] == 1 and manifest.train[0]["documents"] == 17 - 3


def test_too_few_folders_and_loose_files_are_refused(config, projects, tmp_path):
  with pytest.raises(UserError, match=r"has 6 folders, too few to hold 6 out"):
    prepare(dataclasses.replace(config, heldout_documents=6), tmp_path / "data", workers=1, progress=False)
  (projects / "README").write_text("A file beside the folders.")
  with pytest.raises(UserError, match=r"matches .*README, which is no folder"):
    prepare(config, tmp_path / "other", workers=1, progress=False)


def test_recall_material_shares_the_folders_held_out(config, tmp_path):
  source = config.sources[0]
  both = dataclasses.replace(config, sources=(source, f"recall:{source}"), weights=(1.0, 1.0))
  manifest = prepare(both, tmp_path / "data", workers=1, progress=False)
  held = heldout_documents(tmp_path / "data")
  text = "\n".join(training_texts(tmp_path / "data", ByteTokenizer()))
  assert len(held) == 2 and len(manifest.train) == 2 and "access code" in text
  shingles = DocumentShingles([tokens[1:] for tokens in held], ByteTokenizer())
  shingles.look_in([text])
  assert max(shingles.share(i, 0, len(tokens) - 1) for i, tokens in enumerate(held)) < 0.05


def test_packages_of_python(tmp_path, monkeypatch):
  paths = {"stdlib": str(tmp_path / "lib"), "purelib": str(tmp_path / "site"), "platlib": str(tmp_path / "site")}
  monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
  for name in ("lib/os.py", "lib/json/decoder.py", "site/six.py", "site/rich/a.py", "site/rich/deep/b.py"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("# Copyright\n#\n\nimport this\n# kept\n")
  source = parse_source("python-packages")
  folders = dict(zip([file.name for file in source.files()], source.folders(source.files())))
  assert folders == {"stdlib/os.py": "stdlib", "stdlib/json/decoder.py": "stdlib/json", "site-packages/six.py": "site-packages",
                     "site-packages/rich/a.py": "site-packages/rich", "site-packages/rich/deep/b.py": "site-packages/rich"}
  assert source.join(["# Copyright\n\nimport this\n# kept\n", "x = 1\n", "# only\n"]) == "import this\n# kept\n\nx = 1\n\n"
  assert parse_source("python-source").folders([SourceFile("a", "a")]) is None


def test_shares_of_shingles():
  words = [f"w{i}" for i in range(3000)]
  document = " ".join(words)
  tokenizer = ByteTokenizer()
  tokens = np.asarray(tokenizer.encode(document))
  shingles = DocumentShingles([tokens], tokenizer, block=1024)
  assert shingles.share(0, 0, len(tokens)) == 0
  shingles.look_in(["unrelated", " ".join(words[1000:1500])])
  assert len(shingle_hashes(" ".join(words[:16]))) == 1 and not len(shingle_hashes(" ".join(words[:15])))
  np.testing.assert_allclose(shingles.share(0, 0, len(tokens)), (500 - 15) / (3000 - 15), rtol=0.1)
  assert shingles.share(0, 0, 3000) == 0
  inside = len(" ".join(words[:1100])), len(" ".join(words[:1300]))
  assert shingles.share(0, *inside) > 0.8

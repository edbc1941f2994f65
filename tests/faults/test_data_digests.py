"""Damaged data: whatever happens to a file of a prepared directory, what is read is what was written, or one line says which."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pathlib
import shutil

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from atma_jax.data.manifest import MANIFEST, Manifest, load_manifest, open_stream, verify, write_manifest
from atma_jax.data.pipeline import TrainingData, heldout_documents, validation_stream
from atma_jax.data.prepare import prepare
from atma_jax.data.process_pool import Pool
from atma_jax.errors import RunError, UserError
from tests.faults import tiny_run
from tests.faults.test_ablation_inputs import BROKEN, JSON, paths_of


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
  shutil.copytree(tiny_run.prepared(), tmp_path / "data")
  return tmp_path / "data"


def read_all(directory: pathlib.Path) -> list[np.ndarray]:
  """Everything that training and evaluation read."""
  config = tiny_run.recipe().data
  data = TrainingData(config, directory)
  try:
    batches = [next(data)["tokens"] for _ in range(20)]
  finally:
    data.close()
  stream = open_stream(directory, data.manifest.train[0])
  return [*batches, stream.read(0, len(stream)), validation_stream(directory), *heldout_documents(directory)]


def replace(path: pathlib.Path, content: bytes) -> None:
  """Puts another file in the place of one that a thread may still have mapped."""
  path.unlink()
  path.write_bytes(content)


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
  return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_a_flipped_bit_anywhere_is_found(directory):
  """By training or evaluation when they read it, and by --verify."""
  draw, whole = tiny_run.drawn("bits of data"), read_all(directory)
  files = [path for path in sorted(directory.rglob("*")) if path.suffix in (".bin", ".json") and
           path.name not in ("progress.json", "begun.json")]
  assert len([path for path in files if path.suffix == ".bin"]) >= 5
  for path in files * 4:
    content = path.read_bytes()
    bit = draw.randrange(8 * len(content))
    replace(path, content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:])
    try:
      found = read_all(directory)
    except UserError as error:
      assert str(directory) in str(error)
      with pytest.raises(UserError):
        verify(directory, load_manifest(directory))
    else:
      assert equal(found, whole), (path, bit)
    replace(path, content)
  assert equal(read_all(directory), whole)


def test_all_tokens_changed_or_shards_exchanged(directory):
  shards = [directory / shard["path"] for shard in load_manifest(directory).train[0]["shards"]]
  contents = [path.read_bytes() for path in shards]
  replace(shards[0], contents[0][:1024] + bytes(byte ^ (i % 2 == 0) for i, byte in enumerate(contents[0][1024:])))
  with pytest.raises(UserError, match=r"00000\.bin is damaged, its digest"):
    read_all(directory)
  replace(shards[0], contents[1])
  replace(shards[1], contents[0])
  with pytest.raises(UserError, match=r"0000[01]\.bin"):
    read_all(directory)
  with pytest.raises(UserError, match=r"2 of \d+ shards are damaged"):
    verify(directory, load_manifest(directory))


def test_mains_say_so_in_one_line(main, directory, tmp_path):
  verified = main("prepare_data", f"--config={tiny_run.recipe_file()}", f"--directory={directory}", "--verify")
  assert verified.returncode == 0 and "MB/s" in verified.stdout, verified.stderr
  for path in directory.glob("train/*/*.bin"):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
  recipe = f"--config={tiny_run.recipe_file()}"
  tiny_run.one_line(main("prepare_data", recipe, f"--directory={directory}", "--verify"), "digest")
  done = main("train", recipe, f"--config.data.directory={directory}", f"--workdir={tmp_path / 'run'}")
  tiny_run.one_line(done, ".bin is damaged, its digest")


def as_first_version(directory: pathlib.Path) -> Manifest:
  """Takes the digests away, as an older version left them out; returns what the manifest was."""
  manifest = load_manifest(directory)
  values = json.loads((directory / MANIFEST).read_text())
  del values["digest"]
  for record in (*values["train"], values["validation"], values["heldout"]):
    for shard in record["shards"]:
      del shard["sha256"]
  (directory / MANIFEST).write_text(json.dumps(values | {"version": 1}))
  return manifest


def test_a_manifest_of_the_first_version_is_read_and_that_is_said_once(directory, caplog):
  whole = read_all(directory)
  manifest = as_first_version(directory)
  assert equal(read_all(directory), whole)
  assert sum("first version" in record.getMessage() for record in caplog.records) == 1
  shards, size, bare = verify(directory, load_manifest(directory))
  assert bare == shards > 0 == size
  old = load_manifest(directory).fingerprint
  assert old in manifest.fingerprints and old != manifest.fingerprint  # a run goes on after its data was prepared anew


@pytest.mark.parametrize("content", BROKEN)
def test_files_that_are_none(directory, content):
  for name in (MANIFEST, "tokenizer.json"):
    before = (directory / name).read_bytes()
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
      read_all(directory)
    (directory / name).write_bytes(before)
  (directory / MANIFEST).unlink()
  progress = next(directory.rglob("progress.json"))
  for path in (progress, directory / "begun.json"):
    before = path.read_bytes()
    path.write_bytes(content)
    if content != b"[]" or path != progress:  # nothing done yet
      with pytest.raises(UserError, match=path.name):
        prepare(tiny_run.recipe().data, directory, workers=1, progress=False)
    path.write_bytes(before)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_value_of_another_kind_in_a_manifest_is_refused_or_harmless(tmp_path_factory, data):
  """Of a manifest of the first version, which has no digest: values of other types, and of other sizes."""
  directory = tmp_path_factory.mktemp("data")
  for path in tiny_run.prepared().iterdir():
    if path.name != MANIFEST:
      (directory / path.name).symlink_to(path)
  shutil.copy(tiny_run.prepared() / MANIFEST, directory)
  as_first_version(directory)
  values = json.loads((directory / MANIFEST).read_text())
  changed = copy.deepcopy(values)
  *path, last = data.draw(st.sampled_from([path for path in paths_of(values) if path]))
  owner = changed
  for key in path:
    owner = owner[key]
  owner[last] = data.draw(JSON)
  (directory / MANIFEST).write_text(json.dumps(changed))
  try:
    manifest, read = load_manifest(directory), read_all(directory)
    verify(directory, manifest)
  except UserError as error:
    assert str(directory) in str(error) and "\n" not in str(error)
  else:  # what it says is what was read; documents begin with end-of-text
    assert dataclasses.asdict(manifest) == changed
    assert [len(document) - 1 for document in read[22:]] == [document["tokens"] for document in changed["heldout"]["documents"]]
    assert (len(read[20]), len(read[21])) == (changed["train"][0]["tokens"], changed["validation"]["tokens"])


def test_a_manifest_written_by_hand_needs_its_digest(directory):
  manifest = load_manifest(directory)
  manifest.heldout["documents"][0]["tokens"] -= 1
  values = json.loads((directory / MANIFEST).read_text())
  (directory / MANIFEST).write_text(json.dumps(values | {"heldout": manifest.heldout}))
  with pytest.raises(UserError, match="its digest differs"):
    load_manifest(directory)
  write_manifest(directory, manifest)
  assert load_manifest(directory) == manifest


@pytest.mark.parametrize("prefetch", [0, 1, 3, 100, 10**5, 10**9, 10**30])
def test_reading_ahead_is_bounded(directory, prefetch):
  config = tiny_run.recipe().data
  config.prefetch = prefetch
  if prefetch > 4096:
    with pytest.raises(UserError, match=r"config\.data\.prefetch=1\d+: must be at most 4096 batches"):
      TrainingData(config, directory)
    return
  data, usual = TrainingData(config, directory), TrainingData(tiny_run.recipe().data, directory)
  assert all(np.array_equal(next(data)["tokens"], next(usual)["tokens"]) for _ in range(10))
  data.close()
  usual.close()


def test_a_worker_that_is_killed_is_one_line():
  with pytest.raises(RunError, match="worker processes was killed"), Pool(2, os._exit) as pool:
    list(pool.map([9] * 4))

"""Shards fetched from a stand-in of the hub: faults, cuts, what is there already, wrong digests, no room."""

from __future__ import annotations

import collections
import os

import numpy as np
import pytest

from atma_jax.config import DataConfig
from atma_jax.data import ready_shards
from atma_jax.data.prepare import prepare
from atma_jax.data.ready_shards import PRESETS, fetch, preset_of
from atma_jax.data.shards import write_shard
from atma_jax.errors import RunError, UserError
from tests.data.test_remote_sources import hub  # noqa: F401

PRESET = PRESETS["fineweb-edu-gpt2-10B"]
TRAIN = [f"finewebedu_train_{number:06d}.bin" for number in range(1, 5)]
VALIDATION = "finewebedu_val_000000.bin"


@pytest.fixture
def shards(hub, tmp_path):  # noqa: F811
  """Five shards on the stand-in, by name."""
  rng = np.random.default_rng(0)
  for number, name in enumerate((*TRAIN, VALIDATION)):
    tokens = rng.integers(0, 50_257, 30_000 + number)
    tokens[::500] = 50_256
    write_shard(tmp_path / "made", tokens, np.dtype("<u2"))
    hub.datasets.setdefault(PRESET.dataset, ({"README.md": b"x"}, None))[0][name] = (tmp_path / "made").read_bytes()
  return hub.datasets[PRESET.dataset][0]


def downloads(hub) -> collections.Counter[str]:  # noqa: F811
  return collections.Counter(path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/cdn/" in path)


def test_everything_and_then_nothing(hub, shards, tmp_path):  # noqa: F811
  """All files are equal to the hub's; a second call fetches none; fewer shards are the first ones."""
  some = fetch(PRESET, tmp_path / "out", shards=2, progress=False)
  assert [file.name for file in some.files] == [*TRAIN[:2], VALIDATION]
  fetched = fetch(PRESET, tmp_path / "out", progress=False)
  assert (fetched.kept, len(fetched.files), fetched.unchecked, fetched.tokens) == (3, 5, 0, 120_006)
  for name in (*TRAIN, VALIDATION):
    assert (tmp_path / "out" / name).read_bytes() == shards[name]
  assert downloads(hub) == dict.fromkeys((*TRAIN, VALIDATION), 1)
  assert fetch(PRESET, tmp_path / "out", progress=False).kept == 5 and sum(downloads(hub).values()) == 5
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", *TRAIN, VALIDATION]


def test_they_are_what_the_bin_source_reads(shards, tmp_path):
  fetch(PRESET, tmp_path / "out", progress=False)
  (tmp_path / "gpt2").mkdir()
  config = DataConfig(sources=(f"bin:{tmp_path}/out/{PRESET.train}",), tokenizer="gpt2", heldout_documents=0,
                      validation_documents=0)
  assert prepare(config, tmp_path / "data", workers=1, progress=False).train[0]["tokens"] == 120_006


def test_faults_that_pass(hub, shards, tmp_path):  # noqa: F811
  """A busy server, a cut connection and a lost one change nothing."""
  hub.faults = {"/api/": [503], "train_000002": [429, "cut"], "train_000003": ["cut", 503, "cut at once"]}
  fetch(PRESET, tmp_path / "out", progress=False)
  assert all((tmp_path / "out" / name).read_bytes() == shards[name] for name in (*TRAIN, VALIDATION))


def test_a_run_that_was_cut_goes_on(hub, shards, tmp_path, monkeypatch):  # noqa: F811
  """What came before the cut is asked for no more, and whole files are kept."""
  monkeypatch.setattr(ready_shards, "CONNECTIONS", 1)
  monkeypatch.setattr("atma_jax.data.remote.ATTEMPTS", 1)
  monkeypatch.setattr("atma_jax.data.remote.PIECE", 1 << 14)
  monkeypatch.setattr(ready_shards, "PIECE", 1 << 14)
  hub.faults = {f"/cdn/.*{TRAIN[1]}": ["whole", "whole", "cut", *["cut at once"] * 60]}
  with pytest.raises(RunError, match=f"{TRAIN[1]} cannot be read"):
    fetch(PRESET, tmp_path / "out", progress=False)
  assert [path.name for path in (tmp_path / "out").glob("*.bin")] == TRAIN[:1]
  hub.faults, before = {}, len(hub.requests)
  assert fetch(PRESET, tmp_path / "out", progress=False).kept == 1
  asked = [wanted for method, path, wanted in hub.requests[before:] if method == "GET" and path.endswith(TRAIN[1])]
  assert asked[0] == "bytes=32768-49151"
  assert (tmp_path / "out" / TRAIN[1]).read_bytes() == shards[TRAIN[1]]


def test_damaged_files_are_fetched_again(shards, tmp_path):
  """A file of the right size with other bytes, and one that is too short."""
  fetch(PRESET, tmp_path / "out", progress=False)
  first, second = (tmp_path / "out" / name for name in TRAIN[:2])
  first.write_bytes(first.read_bytes()[:-2] + b"\0\0")
  second.write_bytes(second.read_bytes()[:-2])
  assert fetch(PRESET, tmp_path / "out", progress=False).kept == 3
  assert first.read_bytes() == shards[TRAIN[0]] and second.read_bytes() == shards[TRAIN[1]]


def test_what_is_refused(hub, shards, tmp_path, monkeypatch):  # noqa: F811
  """A digest that differs, no room, too many shards, no such preset or dataset, a file that is no shard."""
  hub.digests[TRAIN[0]] = "0" * 64
  with pytest.raises(RunError, match=f"{TRAIN[0]}: what came has another size or digest than the hub says; it was removed"):
    fetch(PRESET, tmp_path / "out", progress=False)
  assert not (tmp_path / "out" / TRAIN[0]).exists()
  hub.digests.clear()
  usage = collections.namedtuple("Usage", "free")(1000)
  with monkeypatch.context() as patch:
    patch.setattr(ready_shards.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"--output=.*GB are still to be fetched, and 0\.00 GB are free"):
      fetch(PRESET, tmp_path / "room", progress=False)
  with pytest.raises(UserError, match="--shards=5: must be at least 1 and at most 4"):
    fetch(PRESET, tmp_path / "out", shards=5, progress=False)
  with pytest.raises(UserError, match="--preset 'fineweb' does not exist; did you mean 'fineweb-"):
    preset_of("fineweb")
  shards[TRAIN[2]] = b"x" * 5000
  with pytest.raises(UserError, match=f"{TRAIN[2]}.*part is not a token shard"):
    fetch(PRESET, tmp_path / "out", progress=False)
  del hub.datasets[PRESET.dataset]
  with pytest.raises(UserError, match="has no dataset 'kjj0/finewebedu10B-gpt2'"):
    fetch(PRESET, tmp_path / "out", progress=False)


def test_the_command(main, hub, shards, tmp_path):  # noqa: F811
  done = main("fetch_data", "--preset=fineweb-edu-gpt2-10B", f"--output={tmp_path}/out", "--shards=1", environ=dict(os.environ))
  assert done.returncode == 0, done.stderr
  assert f"--config.data.sources=bin:{tmp_path}/out/finewebedu_train_*.bin --config.data.tokenizer=gpt2" in done.stdout

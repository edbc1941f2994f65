"""``train --check``: what would make a run fail is found, in one line, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import time

import numpy as np
import pytest

from atma_jax.claims import hold
from atma_jax.config import Config
from atma_jax.data.documents import SourceFile
from atma_jax.data.prepare import prepare
from atma_jax.data.shards import write_shard
from atma_jax.data.sources.python_source import SOURCE as PythonSource
from atma_jax.errors import RunError, UserError
from atma_jax.recipe_files import load_recipe, recipe_names
from atma_jax.training import preflight
from atma_jax.training.preflight import Target, check
from tests.data.test_remote_sources import ENTRY, hub  # noqa: F401

V6E = Target.parse("v6e:16", "tpu")


@pytest.fixture
def config(tmp_path) -> Config:
  """A recipe that would run: bytes of twenty small texts."""
  (tmp_path / "texts").mkdir()
  for number in range(20):
    (tmp_path / "texts" / f"{number:02d}.txt").write_text(f"text {number} " * 40)
  config = load_recipe("debug")
  config.data.sources = (f"text:{tmp_path}/texts/*.txt",)
  return config.validate()


def lines(config: Config, workdir: object, target: Target = Target(), **options) -> list[str]:  # noqa: B008
  return list(check(config.validate(), str(workdir), target, **options))


def test_a_run_that_can_start(config, tmp_path):
  """Every line says ok, and nothing was made; so does a directory that is prepared."""
  before = sorted(tmp_path.rglob("*"))
  found = lines(config, tmp_path / "run")
  assert all(line.startswith("ok  ") for line in found)
  [line] = [line for line in found if f"text:{tmp_path}/texts/*.txt: 20 files" in line]
  assert line.endswith("the first document has 280 characters")
  assert sorted(tmp_path.rglob("*")) == before
  prepare(config.data, tmp_path / "run" / "data", workers=1, progress=False)
  assert any("is prepared, " in line for line in lines(config, tmp_path / "run"))
  config.data.max_mib = 7
  with pytest.raises(UserError, match=r"was prepared with config\.data\.max_mib 1, now it is 7"):
    lines(config, tmp_path / "run")


def broken(config: Config, folder: pathlib.Path, what: str) -> tuple[str, str]:
  """Breaks a recipe; returns the working directory and the message to expect."""
  workdir = folder / "run"
  match what:
    case "nothing":
      config.data.sources = (f"text:{folder}/none/*.txt",)
      return str(workdir), r"config\.data\.sources: 'text:.*' matches no file"
    case "column":
      (folder / "rows.jsonl").write_text(json.dumps({"content": "x"}) + "\n")
      config.data.sources = (f"text:{folder}/rows.jsonl",)
      return str(workdir), r"rows\.jsonl:1: no field 'text' \(fields: content\)"
    case "conversation":
      (folder / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "bot", "content": "x"}]}) + "\n")
      config.data.sources = (f"chat:{folder}/chats.jsonl",)
      return str(workdir), r"chats\.jsonl:1: .*\"bot\".*; legal: .*\"assistant\", \"content\""
    case "not text":
      (folder / "texts" / "00.txt").write_bytes(b"\xff\xfe")
      return str(workdir), "not UTF-8 at byte 0"
    case "tokens of another":
      write_shard(folder / "x.bin", np.arange(1000, 1300), np.dtype("<u2"))
      config.data.sources = (f"bin:{folder}/x.bin",)
      return str(workdir), "holds token 1299, but config.data.tokenizer has 257 tokens"
    case "shard":
      (folder / "x.bin").write_bytes(b"x" * 2000)
      config.data.sources = (f"bin:{folder}/x.bin",)
      return str(workdir), "is not a token shard"
    case "tokenizer":
      config.data.tokenizer = f"{folder}/none.model"
      return str(workdir), r"config\.data\.tokenizer='.*none\.model': No such file"
    case "vocabulary":
      config.model.vocab_size = 100
      return str(workdir), r"config\.model\.vocab_size=100: must be at least 257"
    case "trained vocabulary":
      config.data.tokenizer = "sentencepiece"
      return str(workdir), r"config\.data\.tokenizer_vocab_size=8192: must be at most config\.model\.vocab_size=257"
    case "mesh":
      config.mesh.fsdp = 3
      return str(workdir), r"config\.mesh: .*does not fit 1 device"
    case "file":
      workdir.write_text("x")
      return str(workdir), "--workdir=.*run: cannot be written: .*run is a file"
    case "start":
      config.train.init_from = f"{folder}/none"
      return str(workdir), r"config\.train\.init_from=.*none: no such directory"
    case "memory":
      config.model.width, config.model.num_layers = 1 << 16, 400
      return str(workdir), "config: training needs at least .* GiB"
  raise AssertionError(what)


@pytest.mark.parametrize("what", ["nothing", "conversation", "column", "not text", "tokens of another", "shard", "tokenizer",
                                  "vocabulary", "trained vocabulary", "mesh", "file", "start", "memory"])
def test_what_would_fail(config, tmp_path, what):
  """One error for each, before anything is made."""
  workdir, message = broken(config, tmp_path, what)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match=message):
    lines(config, workdir)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_closed(config, tmp_path):
  (tmp_path / "closed").mkdir(mode=0o500)
  with pytest.raises(UserError, match="no permission to write to"):
    lines(config, tmp_path / "closed" / "run")


def test_a_directory_in_use(config, tmp_path):
  (tmp_path / "run").mkdir()
  claim = hold(tmp_path / "run", "--workdir=x")
  with pytest.raises(UserError, match=f"in use by {socket.gethostname()}:{os.getpid()}"):
    lines(config, tmp_path / "run")
  claim.release()
  assert lines(config, tmp_path / "run")


@pytest.mark.parametrize(("flag", "fields", "message"), [
  ("v6e:48", {}, "a multiple of mesh data\\*fsdp=48"),
  ("v6e:16:3", {}, "does not fit|multiple of the 3 slices"),
  ("v5e:1", {"model.width": 8192, "model.num_layers": 64}, r"but a v5e has 15\.75 GiB"),
])
def test_devices_that_are_not_here(config, tmp_path, flag, fields, message):
  config.data.batch_size, config.mesh.data = 64, -1
  for name, value in fields.items():
    setattr(config.model, name.partition(".")[2], value)
  with pytest.raises(UserError, match=message):
    lines(config, tmp_path, Target.parse(flag, None))


def test_other_machines(config, tmp_path):
  """Their files are not looked for, and that is said; a relative pattern that matches nothing is an error there."""
  config.data.batch_size = 16
  config.data.directory, config.data.tokenizer = "/mnt/data", "bytes"
  config.data.sources = ("text:/mnt/nowhere/*.txt",)
  found = lines(config, "/mnt/run", V6E)
  assert [line.split(":")[0] for line in found if line.startswith("not")] == [
    "not checked  --workdir=/mnt/run", "not checked  text", "not checked  data"]
  config.data.sources = ("text:nowhere/*.txt",)
  with pytest.raises(UserError, match="a relative pattern is looked for in the checkout"):
    lines(config, "/mnt/run", V6E)
  config.data.sources = ("text:s3://bucket/*.txt",)
  with pytest.raises(UserError, match="needs the extra s3, and the other machines get gcs, hf, tpu"):
    lines(config, "/mnt/run", V6E)
  config.data.sources = ("python-source",)
  with pytest.raises(UserError, match="--wandb=p: needs the extra wandb"):
    lines(config, "/mnt/run", V6E, wandb="p")


def test_sources_of_the_hub(hub, config, tmp_path, monkeypatch):  # noqa: F811
  """The dataset is asked for, one row group is read; what is wrong with it, and a hub that is silent, are said."""
  config.data.sources, config.data.tokenizer, config.model.vocab_size = (ENTRY,), "gpt2", 50_304
  found = lines(config, tmp_path / "run")
  assert any(f"{ENTRY}: 2 files" in line for line in found) and any("tokenizer: gpt2, " in line for line in found)
  assert sum("/sample/" in path for method, path, _ in hub.requests if path.startswith("/cdn/")) < 20
  config.data.sources = (f"{ENTRY}?column=body",)
  with pytest.raises(UserError, match="no column 'body' of text; its columns: id, text, score"):
    lines(config, tmp_path / "run")
  config.data.sources = (ENTRY,)
  monkeypatch.setattr(preflight, "LIMIT", 0.2)
  monkeypatch.setattr(preflight, "look_at", lambda *arguments: time.sleep(5))
  with pytest.raises(RunError, match="hf:Team/web:sample-10BT': no answer within 0 s"):
    lines(config, tmp_path / "run")


def test_remote_shards(hub, config, tmp_path):  # noqa: F811
  """The header and the first tokens of one are read, no more."""
  write_shard(tmp_path / "x.bin", np.tile(np.arange(250), 2000), np.dtype("<u2"))
  hub.files = {"x.bin": (tmp_path / "x.bin").read_bytes()}
  config.data.sources = (f"bin:{hub.address}/files/x.bin",)
  [line] = [line for line in lines(config, tmp_path / "run") if "bin:" in line]
  assert "1 shard to fetch, 0.95 MiB; the first has 500,000 tokens" in line
  hub.files["x.bin"] = hub.files["x.bin"][:-1]
  with pytest.raises(UserError, match="is truncated or damaged"):
    lines(config, tmp_path / "run")


@pytest.mark.parametrize(("flag", "elsewhere", "message"), [
  ("v9:4", None, "--check_for=v9:4: must be KIND:DEVICES"), ("v6e", None, "must be KIND:DEVICES"),
  ("v6e:0", None, "must be KIND:DEVICES"), ("v6e:1:2:3", None, "must be KIND:DEVICES"), ("gpu:99999999", None, "must be KIND"),
  (None, "tpus", "--check_elsewhere=tpus: must be extras"),
])
def test_flags_that_are_wrong(flag, elsewhere, message):
  with pytest.raises(UserError, match=message):
    Target.parse(flag, elsewhere)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_as_it_stands(hub, name, tmp_path, monkeypatch):  # noqa: F811
  """Each recipe passes, with stand-ins for the datasets and the tokenizer of the hub."""
  python = pathlib.Path(preflight.__file__)
  monkeypatch.setattr(PythonSource, "files", lambda self: [SourceFile(str(python), python.name)])  # 3 s for all of them
  config = load_recipe(name).validate()
  if config.train.init_from:  # of a run that there is not
    config.train.init_from, config.data.tokenizer, config.data.tokenizer_vocab_size = "", "sentencepiece", config.model.vocab_size
  for entry in config.data.sources:
    if entry.startswith("hf:"):
      dataset, _, sample = entry.removeprefix("hf:").partition(":")
      files, card = hub.datasets["Team/web"]
      hub.datasets[dataset] = (files, {"configs": [{**card["configs"][1], "config_name": sample}]})
  devices = {"atma_7b": "v5p:128", "debug": "v5e:1", "quickstart": "v5e:1", "headline": "v6e:4"}.get(name, "v6e:16")
  found = lines(config, tmp_path / "run", Target.parse(devices, None))
  assert all(line.startswith("ok") for line in found), found


def test_the_command(main, config, tmp_path):
  """Prints the lines and what they come to; one line and exit code 2 for what is wrong."""
  arguments = ("--config=debug", f"--workdir={tmp_path}/run", f"--config.data.sources={config.data.sources[0]}", "--check")
  done = main("train", *arguments, "--check_for=gpu:8")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.endswith("checked: nothing was found that would make the run fail; 1 not checked\n")
  done = main("train", "--config=debug", f"--workdir={tmp_path}/run", "--check_for=gpu:3")
  assert (done.returncode, done.stderr) == (2, "error: --check_for=gpu:3: is for --check\n")
  assert not (tmp_path / "run").exists()

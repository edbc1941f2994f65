"""Bad input on a command line ends in one line that names the field and the legal values, and in exit code 2.

Most cases run in forked children, see tests/conftest.py.
"""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DEBUG = "--config=configs/debug.py"
OUTPUT = {"train": "--workdir", "prepare_data": "--directory"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Forty short text files."""
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(40):
    (folder / f"{i:02}.txt").write_text(f"Document {i}. " + "The quick brown fox jumps over the lazy dog. " * (5 + i))
  return folder


def small(corpus: pathlib.Path) -> list[str]:
  """A model and a byte-level corpus small enough to train in a moment."""
  return [
    DEBUG, f"--config.data.sources=('text:{corpus}/*.txt',)", "--config.data.weights=(1.0,)",
    "--config.data.tokenizer=bytes", "--config.data.sequence_length=64", "--config.data.batch_size=2",
    "--config.data.validation_documents=4", "--config.data.heldout_documents=4", "--config.train.steps=1",
    "--config.train.validate_every=0", "--config.train.accumulation=1", "--config.model.vocab_size=512",
  ]


@pytest.fixture(scope="module")
def trained(main, corpus, tmp_path_factory):
  """A work directory after one step."""
  workdir = tmp_path_factory.mktemp("trained")
  done = main("train", *small(corpus), f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  return workdir


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str):
  """Exit code 2; one line beginning with "error:", the last one, which holds every word; no traceback."""
  lines = result.stderr.splitlines()
  errors = [line for line in lines if line.startswith("error:")]
  assert result.returncode == 2, result.stderr
  assert errors == lines[-1:], result.stderr
  assert "Traceback" not in result.stdout + result.stderr
  assert [word for word in words if word not in errors[0]] == [], errors[0]


@pytest.mark.parametrize(("arguments", "words"), [
  (["--config.model.atention=polar"], ["config.model", "atention", "did you mean", "attention", "num_heads"]),
  (["--config.modle.attention=polar"], ["modle", "model", "optimizer"]),
  (["--config.model.attention=linear"], ["config.model.attention", "linear", "polar, nope, rope"]),
  (["--config.train.steps=many"], ["config.train.steps", "many", "int"]),
  (["--config.train.steps=2.5"], ["config.train.steps", "2.5", "int"]),
  (["--config.train.steps=0"], ["config.train.steps", "0", "greater than 0"]),
  (["--config.model.memory.enabled=perhaps"], ["config.model.memory.enabled", "perhaps", "true", "false"]),
  (["--config.data.batch_size=6", "--config.train.accumulation=4"], ["config.train.accumulation", "6", "divisor"]),
  (["--config.data.sequence_length=64", "--config.mesh.context=3"],
   ["config.data.sequence_length", "64", "multiple of", "mesh.context=3"]),
  (["--config.mesh.fsdp=3"], ["mesh", "fsdp=3", "1 device"]),
  (["--wrkdir=elsewhere"], ["wrkdir", "workdir"]),
  (["elsewhere"], ["elsewhere", "--"]),
], ids=lambda value: value[0] if isinstance(value, list) else None)
def test_train_flags(main, tmp_path, arguments, words):
  """A wrong name, type or value on the command line, before anything is read or written."""
  assert_one_line(main("train", DEBUG, f"--workdir={tmp_path}/run", *arguments), *words)
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["train", "prepare_data"])
def test_recipe_is_required_and_found(main, tmp_path, name):
  """No recipe, an absent one, and one that does not parse."""
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  (tmp_path / "empty.py").write_text("")
  output = f"{OUTPUT[name]}={tmp_path}"
  assert_one_line(main(name, output), "--config")
  assert_one_line(main(name, "--config=configs/absent.py", output), "configs/absent.py")
  assert_one_line(main(name, f"--config={tmp_path}/broken.py", output), "broken.py")
  assert_one_line(main(name, f"--config={tmp_path}/empty.py", output), "empty.py", "get_config")


def test_workdir_is_required(main):
  """Without --workdir nothing is written."""
  assert_one_line(main("train", DEBUG), "--workdir")


@pytest.mark.parametrize("name", ["train", "prepare_data"])
def test_missing_data(main, tmp_path, name):
  """A glob without files is named, with the field it stands in."""
  sources = f"--config.data.sources=('text:{tmp_path}/absent/*.txt',)"
  assert_one_line(main(name, DEBUG, sources, "--config.data.weights=(1.0,)",
                       f"{OUTPUT[name]}={tmp_path}/run"), "data.sources", f"{tmp_path}/absent/*.txt")


def test_unknown_source(main, tmp_path):
  """An unknown kind of source is refused with a list of the kinds."""
  sources = "--config.data.sources=('sql:everything',)"
  assert_one_line(main("train", DEBUG, sources, "--config.data.weights=(1.0,)", f"--workdir={tmp_path}/run"),
                  "data.sources", "sql:everything", "python-source", "text:", "bin:")


def test_empty_corpus(main, tmp_path):
  """Files without text are refused."""
  (tmp_path / "empty.txt").write_text("")
  arguments = small(tmp_path)
  assert_one_line(main("train", *arguments, f"--workdir={tmp_path}/run"), "data.sources", f"{tmp_path}/*.txt", "empty")


def test_missing_tokenizer(main, corpus, tmp_path):
  """A tokenizer file that does not exist."""
  arguments = [*small(corpus), f"--config.data.tokenizer={tmp_path}/absent.model"]
  assert_one_line(main("train", *arguments, f"--workdir={tmp_path}/run"), "data.tokenizer", "absent.model", "bytes")


@pytest.mark.slow
def test_vocabulary_mismatch(main, corpus, tmp_path):
  """The tokenizer knows more tokens than the model has rows."""
  arguments = [*small(corpus), "--config.model.vocab_size=100"]
  assert_one_line(main("train", *arguments, f"--workdir={tmp_path}/run"), "model.vocab_size", "100", "at least")


@pytest.mark.slow
@pytest.mark.parametrize(("change", "words"), [
  (["--config.model.attention=nope"], ["model.attention", "polar", "nope"]),
  (["--config.model.mlp_width=96"], ["model.mlp_width", "96"]),
])
def test_checkpoint_of_another_architecture(main, corpus, trained, change, words):
  """Going on in a work directory that holds a checkpoint of another model."""
  assert_one_line(main("train", *small(corpus), *change, f"--workdir={trained}"), str(trained), *words)


@pytest.mark.slow
def test_data_of_another_recipe(main, corpus, trained, tmp_path):
  """Shards prepared from other sources are not trained on silently."""
  arguments = [*small(tmp_path), f"--config.data.directory={trained}/data"]
  (tmp_path / "other.txt").write_text("Something else. " * 100)
  assert_one_line(main("train", *arguments, f"--workdir={tmp_path}/run"), "data.sources", f"{trained}/data")


@pytest.mark.slow
def test_evaluate_flags(main, trained, tmp_path):
  """A missing checkpoint or step, an unknown suite, and values that are not legal."""
  output = f"--output={tmp_path}/evaluation"
  checkpoint = f"--checkpoint={trained}"
  assert_one_line(main("evaluate", "--suite=loss", output), "--checkpoint")
  assert_one_line(main("evaluate", f"--checkpoint={tmp_path}/absent", "--suite=loss", output), f"{tmp_path}/absent")
  assert_one_line(main("evaluate", checkpoint, "--step=7", "--suite=loss", output), "7", "1")
  assert_one_line(main("evaluate", checkpoint, "--suite=loss,neddle", output), "neddle", "loss", "needle")
  assert_one_line(main("evaluate", checkpoint, "--suite=loss", "--multiples=long", output), "multiples", "long")
  assert_one_line(main("evaluate", checkpoint, "--suite=retrieval", "--depths=10,200", output), "--depths=10,200", "0 to 100")
  assert_one_line(main("evaluate", checkpoint, "--suite=loss", "--memory_gib=0", output), "--memory_gib=0", "greater than 0")
  assert_one_line(main("evaluate", checkpoint, "--suite=loss", "--null_length=-1", output), "--null_length=-1")
  assert_one_line(main("evaluate", checkpoint, "--suite=babilong", output), "--babilong_train=FOLDER", "--babilong_test")
  assert_one_line(main("evaluate", "--report", f"--output={tmp_path}/nothing"), "--report", f"{tmp_path}/nothing/results.jsonl")


@pytest.mark.parametrize(("arguments", "words"), [
  ([], ["--checkpoint"]), (["--checkpoint=/nowhere", "--port=0"], ["/nowhere"]), (["--checkpoint=x", "--port=99999"], ["65535"]),
  (["--checkpoint=x", "--queue=-1"], ["queue=-1", "from 0 to"]), (["--checkpoint=x", "--grace_s=nan"], ["grace_s=nan"]),
  (["--checkpoint=x", "--cache_dtype=int4"], ["int4", "int8", "bfloat16"]),
  (["--checkpoint=x", "--tensor=3"], ["--tensor=3", "1 device"]),
  (["--checkpoint=x", "--host=nowhere.invalid", "--port=0"], ["--host=nowhere.invalid"]),
], ids=lambda value: value[-1] if value and value[-1].startswith("--") else None)
def test_serve_flags(main, arguments, words):
  """Bad flags are refused before a model is read."""
  assert_one_line(main("serve", *arguments), *words)


@pytest.mark.slow
def test_serve_sizes(main, trained):
  """Sizes that do not fit the model of the checkpoint are refused, and so is a port that is taken."""
  checkpoint = [f"--checkpoint={trained}", "--port=0"]
  assert_one_line(main("serve", *checkpoint, "--cache_gib=0.00001"), "cache_gib=1e-05", "at least")
  assert_one_line(main("serve", *checkpoint, "--chunk=100"), "chunk=100", "power of two")
  assert_one_line(main("serve", *checkpoint, "--step=7"), "--step=7", "1")
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert_one_line(main("serve", f"--checkpoint={trained}", f"--port={port}"), f"--port={port}", "in use")


@pytest.mark.parametrize("name", ["train", "evaluate", "prepare_data", "serve"])
def test_help(main, name):
  """--help lists the main's own flags."""
  result = main(name, "--help")
  said = result.stdout + result.stderr
  assert "--config" in said or "--checkpoint" in said
  assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("command", "words"), [
  (["train", DEBUG, "--workdir=/nowhere", "--config.model.atention=polar"], ["atention", "attention"]),
  (["evaluate", "--checkpoint=/nowhere", "--suite=loss", "--output=/nowhere"], ["/nowhere"]),
  (["prepare_data", "--config=configs/absent.py"], ["configs/absent.py"]),
])
def test_in_a_process_of_its_own(command, words):
  """The same in a process as a shell starts it, with its imports and the exit of the interpreter."""
  result = subprocess.run([sys.executable, "-m", f"atma_jax.{command[0]}", *command[1:]], cwd=REPOSITORY,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
  assert_one_line(result, *words)


PIPED = """
import os, socket, sys
from atma_jax import cli

def elsewhere():
  one, other = socket.socketpair()
  other.close()
  one.send(b"x")

def printing():
  print("text\\n" * 100_000)

sys.argv = sys.argv[:1]
cli.run({"stdout": printing, "elsewhere": elsewhere}[WHICH])
"""


@pytest.mark.parametrize(("which", "code"), [("stdout", 141), ("elsewhere", 1)])
def test_a_reader_that_has_gone(which, code):
  """Output piped into head ends the program quietly; a broken pipe to somewhere else is an error like any other."""
  process = subprocess.Popen([sys.executable, "-c", PIPED.replace("WHICH", repr(which))], cwd=REPOSITORY, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  if which == "stdout":
    process.stdout.close()
  error = process.stderr.read()
  assert process.wait(60) == code
  assert ("BrokenPipeError" in error) == (which == "elsewhere"), error

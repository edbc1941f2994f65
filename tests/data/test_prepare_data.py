"""python -m atma_jax.prepare_data: what it prints, how it ends, and that kill -9 changes nothing."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data.conftest import make_text

RECIPE = """
from atma_jax.config import Config, DataConfig

def get_config():
  return Config(data=DataConfig(
      sources=("text:{corpus}", "recall:text:{corpus}"), weights=(1.0, 1.0), tokenizer_vocab_size=400,
      heldout_documents=3, validation_documents=4, shard_tokens=20_000, sequence_length=64, batch_size=8))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
  """A recipe over a folder of 200 documents; beside it lies a file that cannot be read."""
  folder = tmp_path_factory.mktemp("recipe")
  (folder / "big").mkdir()
  for index in range(200):
    (folder / "big" / f"{index:03d}.txt").write_text(make_text(index, 1500 + index))
  (folder / "bad.jsonl").write_text("no JSON\n")
  (folder / "recipe.py").write_text(RECIPE.format(corpus=folder / "big"))
  return folder / "recipe.py"


def command(*arguments) -> list[str]:
  return [sys.executable, "-m", "atma_jax.prepare_data", *map(str, arguments)]


def finish(*arguments) -> subprocess.CompletedProcess:
  return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def contents(directory: pathlib.Path) -> dict[str, str]:
  return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in directory.rglob("*") if path.is_file()}


def children(pid: int) -> list[int]:
  return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
  except OSError:
    return True


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches processes through /proc")
def test_killed_again_and_again_it_ends_with_the_same_bytes(recipe, tmp_path):
  whole = finish(f"--config={recipe}", f"--directory={tmp_path / 'whole'}", "--workers=1")
  assert whole.returncode == 0, whole.stderr
  directory = tmp_path / "killed"
  total = len(list((tmp_path / "whole" / "train").rglob("*.bin")))
  assert total > 20
  kills = 0
  moments = np.random.default_rng()  # any moment must do, so let every run try others
  for wanted, delay in ((0, moments.uniform(0.3, 1.0)), (1, 0.0), (total // 3, moments.uniform(0, 0.1)),
                        (2 * total // 3, moments.uniform(0, 0.1))):
    process = subprocess.Popen(command(f"--config={recipe}", f"--directory={directory}", "--workers=2"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(directory.glob("train/*/*.bin"))) < wanted:
      time.sleep(0.002)
    time.sleep(delay)
    workers = children(process.pid) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not all(map(gone, workers)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert all(map(gone, workers)), "workers outlive their parent"
  assert kills >= 2
  resumed = finish(f"--config={recipe}", f"--directory={directory}", "--workers=2")
  assert resumed.returncode == 0, resumed.stderr
  leftovers = [name for name in contents(directory) if name.endswith(".tmp")]
  assert not leftovers
  assert contents(directory) == contents(tmp_path / "whole")
  assert resumed.stdout.replace(str(directory), "") == whole.stdout.replace(str(tmp_path / "whole"), "")


@pytest.mark.slow
def test_prints_what_was_written_and_does_nothing_twice(recipe, tmp_path):
  directory = tmp_path / "data"
  first = finish(f"--config={recipe}", f"--config.data.directory={directory}", "--config.data.max_mib=1")
  assert first.returncode == 0, first.stderr
  for part in ("tokenizer   sentencepiece, 400 tokens", "200 documents", "train       recall:text:", "3 documents",
               f"prepared: {directory}"):
    assert part in first.stdout
  assert "tokenise" in first.stderr  # the progress bar
  before = {path: os.stat(path).st_mtime_ns for path in directory.rglob("*")}
  second = finish(f"--config={recipe}", f"--directory={directory}", "--config.data.max_mib=1")
  assert (second.returncode, second.stdout) == (0, first.stdout)
  assert {path: os.stat(path).st_mtime_ns for path in directory.rglob("*")} == before


@pytest.mark.parametrize("arguments, message", [
    (["--directory=x"], "--config=RECIPE is required"),
    (["--config={recipe}"], "--directory is missing"),
    (["--config={recipe}", "--directory={tmp}/x", "--config.data.sources=('text:{tmp}/none/*',)",
      "--config.data.weights=(1.0,)"], "matches no file or folder"),
    (["--config={recipe}", "--directory={tmp}/x", "--config.data.heldout_documents=-1"],
     "config.data.heldout_documents=-1: must be at least 0"),
    (["--config={recipe}", "--directory={tmp}/x", "--config.data.weights=(1.0,)"],
     "config.data.weights=(1.0,): must be 2 numbers, one per source"),
])
def test_bad_options_are_one_line_and_exit_code_2(recipe, tmp_path, arguments, message):
  result = finish(*(argument.format(recipe=recipe, tmp=tmp_path) for argument in arguments))
  assert result.returncode == 2
  assert message in result.stderr and "Traceback" not in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


def test_a_file_that_cannot_be_read_is_one_line_after_the_progress_bar(recipe, tmp_path):
  result = finish(f"--config={recipe}", f"--directory={tmp_path}/x",
                  f"--config.data.sources=('text:{recipe.parent}/big','text:{recipe.parent}/bad.jsonl')")
  assert result.returncode == 2 and "Traceback" not in result.stderr
  assert re.match(r"error: config\.data\.sources: .*bad\.jsonl:1: not JSON", result.stderr.splitlines()[-1])

"""Disks that are full, small or read-only: training goes on while it can, and ends with one line and the last good checkpoint."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import time

import pytest

from atma_jax.checkpoints.load import load_model
from tests.faults import tiny_run

LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
FILL = """
import errno
from atma_jax.training import loop
original = loop.Loop.next_batch
calls = [0]

def next_batch(self):
  calls[0] += 1
  if calls[0] == {step}:
    self.checkpointer.settle()
    with open({file!r}, "wb", buffering=0) as file:
      try:
        while True:
          file.write(bytes(4096))
      except OSError as error:
        assert error.errno == errno.ENOSPC
  return original(self)

loop.Loop.next_batch = next_batch
"""
SECONDS = 90  # a run takes a few; what must not happen is that it never ends


def run(main, workdir: pathlib.Path, *options: str, first: str = "") -> subprocess.CompletedProcess[str]:
  began = time.monotonic()
  done = main("train", f"--config={tiny_run.recipe_file()}", f"--workdir={workdir}", *options, first=first, timeout=SECONDS)
  assert time.monotonic() - began < SECONDS
  return done


def good_steps(workdir: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())


@pytest.mark.parametrize("share", [0.1, pytest.param(0.9, marks=pytest.mark.slow),
                                   pytest.param(1.3, marks=pytest.mark.slow), pytest.param(2.2, marks=pytest.mark.slow)])
def test_a_small_disk(main, tmp_path, share):
  """The size is drawn: too small for anything, for one checkpoint, for the ones that are kept, and enough for one or two."""
  tiny_run.prepared()
  size = sum(file.stat().st_blocks // 2 for file in (tiny_run.finished() / "checkpoints" / str(tiny_run.STEPS)).rglob("*"))
  kibibytes = round(size * share * tiny_run.drawn(f"disk {share}").uniform(0.9, 1.1))
  with tiny_run.small_disk(tmp_path / "disk", kibibytes) as mounted:
    if not mounted:
      pytest.skip("only root may mount a disk")
    done = run(main, tmp_path / "disk" / "run")
    print(kibibytes, done.returncode, done.stderr[-3000:])
    if done.returncode:
      tiny_run.one_line(done, codes=(1, 2))
      assert "No space left" in done.stderr or "are free: make room" in done.stderr
    if good_steps(tmp_path / "disk" / "run"):
      assert load_model(tmp_path / "disk" / "run").step in good_steps(tmp_path / "disk" / "run")
    else:
      assert done.returncode


def test_files_that_may_not_grow(main, tmp_path):
  """RLIMIT_FSIZE is drawn: every write past it fails, of the log too."""
  tiny_run.prepared()
  kibibytes = tiny_run.drawn("limit").randrange(1, 300)
  done = run(main, tmp_path, first=LIMIT.format(kibibytes << 10))
  print(kibibytes, done.returncode, done.stderr[-3000:])
  tiny_run.one_line(done, "ulimit -f")


def test_a_disk_that_fills_up_while_training(main, tmp_path):
  """Metrics that cannot be written are counted and said, the checkpoint that cannot be written too; nothing waits."""
  tiny_run.prepared()
  with tiny_run.small_disk(tmp_path / "disk", 2000) as mounted:
    if not mounted:
      pytest.skip("only root may mount a disk")
    fill = FILL.format(file=str(tmp_path / "disk" / "filler"), step=3)
    done = run(main, tmp_path / "disk" / "run", first=fill)
    print(done.stderr[-3000:])
    tiny_run.one_line(done, "step 8 could not be written in 3 attempts", "No space left", codes=(1,))
    assert "training goes on" in done.stderr and "records of metrics could not be written" in done.stderr
    assert f"step {tiny_run.STEPS}/{tiny_run.STEPS}" in done.stderr
    assert load_model(tmp_path / "disk" / "run").step == 2
    (tmp_path / "disk" / "filler").unlink()
    done = run(main, tmp_path / "disk" / "run")
    assert done.returncode == 0 and "resuming at step 2" in done.stderr, done.stderr


def test_a_read_only_disk(main, tmp_path):
  """A run that is done says so; one that is not ends with one line."""
  finished = tiny_run.finished()
  with tiny_run.small_disk(tmp_path / "disk", 4000) as mounted:
    if not mounted:
      pytest.skip("only root may mount a disk")
    shutil.copytree(finished, tmp_path / "disk" / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
    done = run(main, tmp_path / "disk" / "run")
    assert done.returncode == 0 and "already holds step 8 of 8" in done.stderr, done.stderr
    tiny_run.one_line(run(main, tmp_path / "disk" / "run", "--config.train.steps=9"), "--workdir", "Read-only")

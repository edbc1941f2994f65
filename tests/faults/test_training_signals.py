"""SIGTERM and Ctrl-C: saved and resumed, or left at once where there is nothing to save, even while the main thread compiles."""

from __future__ import annotations

import json
import pathlib
import signal
import time

import pytest

from tests.faults import tiny_run

# The main thread waits for a lock inside the C library, where no Python handler runs, as it does while XLA compiles.
STUCK = """
import ctypes
from atma_jax.checkpoints import store
from atma_jax.training import loop

def stuck(*_, **__):
  print("stuck", file=__import__("sys").stderr, flush=True)
  mutex, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
  library.pthread_mutex_lock(mutex)
  library.pthread_mutex_lock(mutex)

{0} = stuck
"""
SLOWLY = """
import time
from atma_jax.training import loop
original = loop.Loop.next_batch
loop.Loop.next_batch = lambda self: (time.sleep(0.3), original(self))[1]
"""


@pytest.fixture
def start(forking, tmp_path):
  """Starts training in `tmp_path`; its stderr goes to a file there."""
  return lambda first="": forking.start("train", f"--config={tiny_run.recipe_file()}", f"--workdir={tmp_path}",
                                        stderr=tmp_path / "stderr", first=first)


def wait_for(path: pathlib.Path, words: str, process) -> None:
  deadline = time.monotonic() + 120
  while words not in (path.read_text() if path.exists() else ""):
    assert process.poll() is None and time.monotonic() < deadline, path.read_text()
    time.sleep(0.02)


def ends_within(process, seconds: float) -> int:
  began = time.monotonic()
  code = process.wait(timeout=120)
  assert time.monotonic() - began < seconds
  return code


@pytest.mark.parametrize(("number", "code"), [
  (signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_while_compiling_there_is_nothing_to_save(start, tmp_path, number, code):
  tiny_run.prepared()
  process = start(STUCK.format("loop.Loop._compile"))
  wait_for(tmp_path / "stderr", "stuck", process)
  process.send_signal(number)
  assert ends_within(process, 10) == code
  text = (tmp_path / "stderr").read_text()
  assert "nothing to save" in text and "Traceback" not in text
  assert json.loads((tmp_path / "claim.0").read_text())["released"]


def test_ctrl_c_saves_and_the_same_command_goes_on(start, tmp_path):
  finished = tiny_run.finished()
  process = start(SLOWLY)
  wait_for(tmp_path / "stderr", "step 3/8", process)
  process.send_signal(signal.SIGINT)
  code, text = process.wait(timeout=120), (tmp_path / "stderr").read_text()
  assert code == 130 and "interrupted: step " in text and "Traceback" not in text, text
  assert start().wait(timeout=120) == 0, (tmp_path / "stderr").read_text()
  assert "resuming at step" in (tmp_path / "stderr").read_text()
  records = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (tmp_path, finished)]
  ours, theirs = ([(record["step"], record["loss"]) for record in found] for found in records)
  assert ours == theirs


def test_a_second_signal_ends_at_once(start, tmp_path):
  """The first one made it save, and saving takes for ever."""
  tiny_run.prepared()
  process = start(SLOWLY + STUCK.format("store.Checkpointer.save_last"))
  wait_for(tmp_path / "stderr", "step 1/8", process)
  process.terminate()
  wait_for(tmp_path / "stderr", "stuck", process)
  process.terminate()  # a launcher's
  time.sleep(1)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  assert ends_within(process, 10) == 130
  assert "after another signal" in (tmp_path / "stderr").read_text()


def test_ctrl_c_that_the_launcher_ignores_stays_ignored(start, tmp_path):
  """As of a command in the background of a script, such as launch/run.sh, which sends SIGTERM instead."""
  tiny_run.prepared()
  process = start("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SLOWLY)
  wait_for(tmp_path / "stderr", "step 1/8", process)
  process.send_signal(signal.SIGINT)
  time.sleep(0.1)
  process.terminate()
  assert process.wait(timeout=120) == 75
  assert "pre-empted: step" in (tmp_path / "stderr").read_text()

"""Real processes of one program: kill -9, SIGTERM to one of them, other process counts and meshes, failures of one alone."""

from __future__ import annotations

import collections
from collections.abc import Iterable
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from atma_jax.sharding import make_mesh
from atma_jax.training.checkpointing import load_model
from atma_jax.training.state import params_of

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
HEARTBEAT = 5  # seconds; what a machine under load still manages
STEPS, EVERY = 10, 3
RECIPE = """
from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig

def get_config():
  return Config(
    name="processes",
    model=ModelConfig(vocab_size=264, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=("local",), activation_dtype="float32"),  # what compiles quickly: the mechanics are the same
    data=DataConfig(directory={directory!r}, sources=("text:{corpus}/*.txt",), tokenizer="bytes", validation_documents=3,
                    heldout_documents=4, shard_tokens=100_000, sequence_length=32, batch_size=8),
    train=TrainConfig(steps={steps}, log_every=1, checkpoint_every={every}, checkpoint_keep=9, validate_every={steps},
                      validation_batches=1, validation_lengths=(1, 2)))
"""
# Training as it is, but for a pause after each step (so that a signal finds it running), a list of the rows each process
# read, by their place in the run, and what `FAULT` does.
MAIN = """
import os, runpy, sys, time, zlib
from atma_jax.data.pipeline import TrainingData
from atma_jax.training import checkpointing
fetch = TrainingData.__next__
rows = open(os.environ["ROWS"], "a", buffering=1)

def marked(self):
  time.sleep(float(os.environ["PAUSE"]))
  batch = fetch(self)
  size = self._config.batch_size // self._part_count
  first = self._next_sequence - self._config.batch_size
  for place, row in enumerate(batch["tokens"]):
    print(first + self._parts[place // size] * size + place % size, zlib.crc32(row.tobytes()), file=rows)
  return batch

TrainingData.__next__ = marked
exec(os.environ.get("FAULT", ""))
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("atma_jax.train", run_name="__main__", alter_sys=True)
"""
FAIL_TO_WRITE_ONCE = """
import tensorstore, orbax.checkpoint as ocp
original = ocp.PyTreeCheckpointHandler.async_save
left = [1]
async def full(self, *args, **options):
  if left[0] and "--process_id=1" in sys.argv:
    left[0] -= 1
    raise OSError(28, "No space left on device")
  return await original(self, *args, **options)
ocp.PyTreeCheckpointHandler.async_save = full
from orbax.checkpoint._src.multihost import multihost
multihost._DEFAULT_BARRIER_TIMEOUT = 5
checkpointing.WRITE_SECONDS = 30
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("processes")
  for i in range(30):
    (folder / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 8)
  path = folder / "recipe.py"
  path.write_text(RECIPE.format(directory=str(folder / "prepared"), corpus=folder, steps=STEPS, every=EVERY))
  return path


class Run:
  """`count` processes of `devices` CPU devices each that train one recipe; killed when the block ends."""

  def __init__(self, recipe: pathlib.Path, workdir: pathlib.Path, count: int, devices: int, *options: str, pause: float = 0.0,
               fault: str = "", workdirs: Iterable[pathlib.Path] = (), module: str | None = None):
    self.workdir, self.count = workdir, count
    workdir.mkdir(exist_ok=True)
    with socket.socket() as found:
      found.bind(("127.0.0.1", 0))
      port = found.getsockname()[1]
    workdirs = list(workdirs) or [workdir] * count
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COORDINATOR_ADDRESS")}
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PAUSE": str(pause), "FAULT": fault}
    self.processes = []
    for i in range(count):
      together = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}",
                  f"--heartbeat_seconds={HEARTBEAT}"] if count > 1 else []
      start = ["-m", module] if module else ["-c", MAIN, f"--config={recipe}", f"--workdir={workdirs[i]}"]
      self.processes.append(subprocess.Popen(
        [sys.executable, *start, *together, *options], cwd=REPOSITORY, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=(workdir / f"stderr-{i}").open("w"),
        env=environ | {"ROWS": str(workdir / f"rows-{i}")}))

  def __enter__(self) -> Run:
    return self

  def __exit__(self, *_) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def codes(self, timeout: float = 600) -> list[int]:
    """The exit codes, once all have ended."""
    deadline = time.monotonic() + timeout
    return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

  def errors(self) -> list[str]:
    return [(self.workdir / f"stderr-{i}").read_text() for i in range(self.count)]

  def wait_for_step(self, step: int) -> None:
    deadline = time.monotonic() + 400
    while all(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
      if max(losses(self.workdir), default=0) >= step:
        return
      time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {self.errors()}")


def losses(workdir: pathlib.Path) -> dict[int, float]:
  path = workdir / "metrics.jsonl"
  found = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):  # being written
      record = json.loads(line)
      found |= {record["step"]: record["loss"]} if "loss" in record else {}
  return found


def rows(workdir: pathlib.Path) -> dict[int, set[str]]:
  """Checksums of every row that any process read, by its number in the run."""
  found = collections.defaultdict(set)
  for path in workdir.glob("rows-*"):
    for line in path.read_text().splitlines():
      number, _, checksum = line.partition(" ")
      found[int(number)].add(checksum)
  return dict(found)


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  model = load_model(workdir, mesh=make_mesh(devices=jax.devices()[:1]))[1]
  return {name: np.asarray(value) for name, value in params_of(model).items()}


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> pathlib.Path:
  """An uninterrupted run of one process with two devices, parameters split."""
  workdir = tmp_path_factory.mktemp("alone")
  with Run(recipe, workdir, 1, 2, "--config.mesh.data=1", "--config.mesh.fsdp=2") as run:
    assert run.codes() == [0], run.errors()
  return workdir


def assert_the_same(workdir: pathlib.Path, expected: pathlib.Path):
  """Bit for bit: the sum of two devices' parts does not depend on who comes first."""
  assert losses(workdir) == losses(expected)
  assert rows(workdir) == rows(expected) and len(rows(expected)) == 8 * STEPS
  a, b = weights(workdir), weights(expected)
  assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_kill_one_of_two_then_resume_is_bitwise(recipe, alone, tmp_path):
  rng = np.random.default_rng(time.time_ns())
  victim, moment = int(rng.integers(2)), int(rng.integers(2, STEPS - 1))
  mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
  with Run(recipe, tmp_path, 2, 1, *mesh, pause=0.2) as run:
    run.wait_for_step(moment)
    time.sleep(rng.uniform(0, 0.2))
    run.processes[victim].kill()
    killed = time.monotonic()
    codes = run.codes()
    seconds = time.monotonic() - killed
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 2, 75), (victim, moment, codes)
    assert seconds < 2 * HEARTBEAT + 5, (victim, moment, seconds)
    assert "another task died" in run.errors()[1 - victim]
  with Run(recipe, tmp_path, 2, 1, *mesh) as run:
    assert run.codes() == [0, 0], run.errors()
    assert "resuming at step" in run.errors()[0] or moment <= EVERY
    assert "INFO" not in run.errors()[1] and "step 10/10" not in run.errors()[1]  # process 0 tells what all do
  assert_the_same(tmp_path, alone)


def test_four_processes_then_two_then_one(recipe, alone, tmp_path):
  """Every SIGTERM reaches one process only; all save the same step and exit 75. Meshes: 2x2x2, fsdp 8, data 8."""
  plans = [(4, 2, {"data": 2, "fsdp": 2, "tensor": 2}, 2), (2, 4, {"data": 1, "fsdp": 8}, 5), (1, 8, {"data": 8}, None)]
  saved = 0
  for count, devices, mesh, until in plans:
    options = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    with Run(recipe, tmp_path, count, devices, *options, pause=0.3 if until else 0) as run:
      if until:
        run.wait_for_step(until)
        run.processes[-1].terminate()
      assert run.codes() == [75 if until else 0] * count, run.errors()
      if saved:
        assert f"resuming at step {saved}" in run.errors()[0]
      if until:
        saved = int(re.search(r"pre-empted: step (\d+) is saved", run.errors()[0])[1])
        assert until < saved < STEPS and (tmp_path / "checkpoints" / str(saved)).is_dir()
  assert rows(tmp_path) == rows(alone) and len(rows(tmp_path)) == 8 * STEPS
  # Sums over devices are taken in another order: 2^-24 times the square root of their length a step, kept relative by the
  # optimizers, and grown by ten steps at a learning rate of 0.3 (as in tests/multidevice).
  moved, expected = losses(tmp_path), losses(alone)
  assert sorted(moved) == sorted(expected) == list(range(1, STEPS + 1))
  np.testing.assert_allclose([moved[s] for s in sorted(moved)], [expected[s] for s in sorted(moved)], rtol=5e-5)


def test_a_write_that_fails_in_one_process_is_agreed_counted_and_retried(recipe, alone, tmp_path):
  with Run(recipe, tmp_path, 2, 1, "--config.mesh.data=1", "--config.mesh.fsdp=2", fault=FAIL_TO_WRITE_ONCE) as run:
    assert run.codes() == [0, 0], run.errors()
    assert "checkpoints/3 could not be written (1 failed so far)" in run.errors()[0]
    assert "process 1: OSError: [Errno 28] No space left on device" in run.errors()[0]
  counts = {r["step"]: r["failed_saves"] for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
            if "failed_saves" in r}
  assert counts[2] == 0 and counts[STEPS] == 1
  assert {path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")} == {"5", "6", "9", "10"}  # 3 again at 3 + 2
  assert_the_same(tmp_path, alone)


@pytest.mark.parametrize(("options", "private", "message"), [
  (["--config.data.sources=text:/nowhere/*.txt", "--config.data.directory=DIR"], False, "/nowhere"),
  ([], True, "does not show what process 0 wrote there"),
], ids=["no-data", "workdir-not-shared"])
def test_what_one_process_finds_wrong_ends_all_with_the_message(recipe, tmp_path, options, private, message):
  options = [option.replace("DIR", str(tmp_path / "data")) for option in options]
  workdirs = [tmp_path / "0", tmp_path / "1"] if private else [tmp_path] * 2
  with Run(recipe, tmp_path, 2, 1, *options, workdirs=workdirs) as run:
    assert run.codes() == [2, 2], run.errors()
    for text in run.errors():
      errors = [line for line in text.splitlines() if line.startswith("error:")]
      assert len(errors) == 1 and message in errors[0] and "Traceback" not in text, text

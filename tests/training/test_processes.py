"""Real processes that train together: kill -9 or SIGTERM to one of them, changes of number and mesh, failures of a single one."""

from __future__ import annotations

import collections
from collections.abc import Iterable
import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from atma_jax.checkpoints.load import load_model
from atma_jax.evaluation.api import evaluate
from atma_jax.models.definition import params_of
from atma_jax.sharding import make_mesh

pytestmark = pytest.mark.slow
SPLIT = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
HEARTBEAT = 5  # seconds; what a machine under load still manages
STEPS, EVERY = 14, 4
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
# Training as it is, but for a pause after each step (so that a signal finds it running) and a list of the rows each process
# read, by their place in the run.
WATCHED = """
import os, sys, time, zlib
from atma_jax.data.pipeline import TrainingData
from atma_jax.checkpoints import store
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
# The other process gives up waiting soon, and afterwards waits as long as it does outside this test.
from orbax.checkpoint._src.multihost import multihost
usual = multihost._DEFAULT_BARRIER_TIMEOUT, store.WRITE_SECONDS
multihost._DEFAULT_BARRIER_TIMEOUT, store.WRITE_SECONDS = 5, 10
failed = store.Checkpointer.write_failed
def patient(self, *arguments):
  multihost._DEFAULT_BARRIER_TIMEOUT, store.WRITE_SECONDS = usual
  failed(self, *arguments)
store.Checkpointer.write_failed = patient
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("processes")
  for i in range(30):
    (folder / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 8)
  path = folder / "recipe.py"
  path.write_text(RECIPE.format(directory=str(folder / "prepared"), corpus=folder, steps=STEPS, every=EVERY))
  return path


def together(port: int, count: int, i: int) -> list[str]:
  """The flags that make one process the `i`-th of `count`."""
  return [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}",
          f"--heartbeat_seconds={HEARTBEAT}"] if count > 1 else []


class Run:
  """A context in which `count` processes of `devices` CPU devices each train a recipe, or evaluate; its end kills them."""

  def __init__(self, forking, recipe: pathlib.Path, workdir: pathlib.Path, count: int, devices: int, *options: str,
               pause: float = 0.0, fault: str = "", workdirs: Iterable[pathlib.Path] = (),
               checkpoint: pathlib.Path | None = None):
    self.workdir, self.count, self.pause = workdir, count, pause
    workdir.mkdir(exist_ok=True)
    for i in range(count):
      (workdir / f"stderr-{i}").write_text("")
    with socket.socket() as found:
      found.bind(("127.0.0.1", 0))
      port = found.getsockname()[1]
    workdirs = list(workdirs) or [workdir] * count
    environ = {name: value for name, value in os.environ.items() if name != "JAX_COORDINATOR_ADDRESS"}
    environ["XLA_FLAGS"] = re.sub(r"\S+device_count=\d+", "", environ.get("XLA_FLAGS", ""))
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PAUSE": str(pause)}
    self.processes = []
    for i in range(count):
      command = ["train", f"--config={recipe}", f"--workdir={workdirs[i]}"]
      if checkpoint is not None:
        command = ["evaluate", f"--checkpoint={checkpoint}", f"--output={workdirs[i]}"]
      self.processes.append(forking.start(
        *command, *together(port, count, i), *options, stdout=workdir / f"stdout-{i}", stderr=workdir / f"stderr-{i}",
        environ=environ | {"ROWS": str(workdir / f"rows-{i}")}, first=WATCHED + fault))

  def __enter__(self) -> Run:
    return self

  def __exit__(self, *_) -> None:
    for process in self.processes:
      process.kill()
      process.wait(60)

  def lose(self, rng: np.random.Generator, step: int, number: int) -> tuple[int, list[int]]:
    """Sends a random process a signal at a random moment after a step; returns its index, and all exit codes in the end."""
    self.wait_for_step(step)
    time.sleep(rng.uniform(0, self.pause))
    which = int(rng.integers(self.count))
    self.processes[which].send_signal(number)
    return which, self.codes()

  def codes(self, timeout: float = 600) -> list[int]:
    """Waits until all processes have ended and returns their exit codes."""
    deadline = time.monotonic() + timeout
    return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

  def errors(self) -> list[str]:
    return [(self.workdir / f"stderr-{i}").read_text() for i in range(self.count)]

  def wait_for_step(self, step: int) -> None:
    deadline = time.monotonic() + 400
    while all(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
      # Not a loss from before a resumption: those after the step that it goes on from are dropped before it compiles.
      if "compiled the step" in self.errors()[0] and max(losses(self.workdir), default=0) >= step:
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
def run(forking, recipe):
  """`Run` of the recipe, by processes that `forking` starts."""
  return functools.partial(Run, forking, recipe)


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> pathlib.Path:
  """An uninterrupted run of one process that shards the parameters over two devices."""
  workdir = tmp_path_factory.mktemp("alone")
  with run(workdir, 1, 2, *SPLIT) as started:
    assert started.codes() == [0], started.errors()
  return workdir


def assert_the_same(workdir: pathlib.Path, expected: pathlib.Path):
  """Asserts equality bit for bit, because a sum of two terms does not depend on their order."""
  assert losses(workdir) == losses(expected)
  assert rows(workdir) == rows(expected) and len(rows(expected)) == 8 * STEPS
  a, b = weights(workdir), weights(expected)
  assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def assert_lost(started: Run, victim: int, codes: list[int], began: float):
  """Asserts that after one process was killed the others ended in time and said why."""
  assert time.monotonic() - began < 2 * HEARTBEAT + 5, victim
  assert codes.pop(victim) == -signal.SIGKILL and not {0, 2, 75} & set(codes), (victim, codes)
  errors = started.errors()
  del errors[victim]
  assert all("another task died" in text for text in errors), errors


def test_kill_one_of_two_then_resume_is_bitwise(run, alone, tmp_path):
  rng = np.random.default_rng(time.time_ns())
  moment = int(rng.integers(2, STEPS - 1))
  with run(tmp_path, 2, 1, *SPLIT, pause=0.2) as started:
    started.wait_for_step(moment)
    began = time.monotonic()
    assert_lost(started, *started.lose(rng, moment, signal.SIGKILL), began)
  with run(tmp_path, 2, 1, *SPLIT) as started:
    assert started.codes() == [0, 0], started.errors()
    errors = started.errors()
    assert "resuming at step" in errors[0] or moment <= EVERY
    assert "INFO" not in errors[1] and f"step {STEPS}/{STEPS}" not in errors[1]  # process 0 tells what all do
  assert_the_same(tmp_path, alone)


def mesh(**axes: int) -> list[str]:
  return [f"--config.mesh.{axis}={size}" for axis, size in axes.items()]


def pre_empted(started: Run) -> int:
  """The step that was saved before the processes ended."""
  saved = int(re.search(r"pre-empted: step (\d+) is saved", started.errors()[0])[1])
  assert (started.workdir / "checkpoints" / str(saved)).is_dir()
  return saved


def leave_half_written(workdir: pathlib.Path) -> int:
  """Adds two steps after the newest one: one with half of its arrays, and one that Orbax has not renamed yet."""
  folder = workdir / "checkpoints"
  good = max(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())
  for name in (str(good + 1), f"{good + 2}.orbax-checkpoint-tmp"):
    shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(folder / str(good), folder / name)
    file = max((path for path in (folder / name).glob("state/**/*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
  return good


def test_four_processes_lose_one_twice_then_two_then_one(run, alone, tmp_path):
  """SIGTERM to any one of four, kill -9 of any one of four, SIGTERM to one of two, all at random moments; eight devices each."""
  rng = np.random.default_rng(time.time_ns())
  for number in (signal.SIGTERM, signal.SIGKILL):
    with run(tmp_path, 4, 2, *mesh(data=2, fsdp=2, tensor=2), pause=0.5) as started:
      if number == signal.SIGTERM:
        _, codes = started.lose(rng, int(rng.integers(1, 3)), number)
        assert codes == [75] * 4, started.errors()
        saved = pre_empted(started)
      else:
        started.wait_for_step(saved + int(rng.integers(1, 3)))
        began = time.monotonic()
        assert_lost(started, *started.lose(rng, saved + 1, number), began)
        assert f"resuming at step {saved}" in started.errors()[0]
  good = leave_half_written(tmp_path)
  with run(tmp_path, 2, 4, *mesh(data=1, fsdp=8), pause=0.5) as started:
    _, codes = started.lose(rng, good + 1, signal.SIGTERM)
    assert codes == [75] * 2, started.errors()
    assert f"checkpoints/{good + 1} is damaged and was passed over" in started.errors()[0]
    assert f"resuming at step {good}" in started.errors()[0]
    saved = pre_empted(started)
    assert good < saved < STEPS and not list((tmp_path / "checkpoints").glob("*tmp*"))
  with run(tmp_path, 1, 8, *mesh(data=8)) as started:
    assert started.codes() == [0], started.errors()
    assert f"resuming at step {saved}" in started.errors()[0]
  assert rows(tmp_path) == rows(alone) and len(rows(tmp_path)) == 8 * STEPS
  # Sums over devices are taken in another order: 2^-24 times the square root of their length a step, kept relative by the
  # optimizers, and grown by the steps at a learning rate of 0.3 (as in tests/multidevice).
  moved, expected = losses(tmp_path), losses(alone)
  assert sorted(moved) == sorted(expected) == list(range(1, STEPS + 1))
  np.testing.assert_allclose([moved[s] for s in sorted(moved)], [expected[s] for s in sorted(moved)], rtol=5e-5)


def test_a_write_that_fails_in_one_process_is_agreed_counted_and_retried(run, alone, tmp_path):
  with run(tmp_path, 2, 1, *SPLIT, fault=FAIL_TO_WRITE_ONCE) as started:
    assert started.codes() == [0, 0], started.errors()
    assert "checkpoints/4 could not be written (1 failed so far)" in started.errors()[0]
    assert "process 1: OSError: [Errno 28] No space left on device" in started.errors()[0]
  counts = {r["step"]: r["failed_saves"] for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
            if "failed_saves" in r}
  assert counts[3] == 0 and counts[STEPS] == 1
  assert {path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")} == {"6", "8", "12", "14"}  # 4 again at 4 + 2
  assert_the_same(tmp_path, alone)


@pytest.mark.parametrize(("options", "private", "message"), [
  (["--config.data.sources=text:/nowhere/*.txt", "--config.data.directory=DIR"], False, "/nowhere"),
  ([], True, "does not show what process 0 wrote there"),
], ids=["no-data", "workdir-not-shared"])
def test_what_one_process_finds_wrong_ends_all_with_the_message(run, tmp_path, options, private, message):
  options = [option.replace("DIR", str(tmp_path / "data")) for option in options]
  workdirs = [tmp_path / "0", tmp_path / "1"] if private else [tmp_path] * 2
  with run(tmp_path, 2, 1, *options, workdirs=workdirs) as started:
    assert started.codes() == [2, 2], started.errors()
    for text in started.errors():
      errors = [line for line in text.splitlines() if line.startswith("error:")]
      assert len(errors) == 1 and message in errors[0] and "Traceback" not in text, text


def assert_the_same_value(value: object, expected: object, path: str):
  """Asserts equality, of numbers up to the rounding of sums in another order (as in tests/multidevice)."""
  if isinstance(expected, dict):
    assert value.keys() == expected.keys(), path
    for name in expected:
      assert_the_same_value(value[name], expected[name], f"{path}.{name}")
  elif isinstance(expected, list):
    assert len(value) == len(expected), path
    for i, (one, other) in enumerate(zip(value, expected)):
      assert_the_same_value(one, other, f"{path}[{i}]")
  elif isinstance(expected, float):
    np.testing.assert_allclose(value, expected, atol=5e-5, err_msg=path)
  else:
    assert value == expected, path


def test_evaluation_by_two_processes_is_that_of_one(run, alone, tmp_path):
  """The records are the same, in the same order, and only process 0 writes and prints."""
  options = ("--suite=loss,needle", "--multiples=1,2", "--trials=3", "--min_documents=2")
  outputs = [tmp_path / "0", tmp_path / "1"]
  with run(tmp_path, 2, 1, *options, checkpoint=alone, workdirs=outputs) as started:
    assert started.codes() == [0, 0], started.errors()
  evaluate(str(alone), str(tmp_path / "one"), suite=("loss", "needle"), multiples=(1, 2), trials=3, min_documents=2)
  found, expected = ([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
                     for folder in (outputs[0], tmp_path / "one"))
  assert len(found) == len(expected) > 10
  measured = {"seconds", "tokens_per_second", "program_gib", "hardware"}
  for number, (one, other) in enumerate(zip(found, expected)):
    assert (one["hardware"][:4], other["hardware"][:4]) == ("2 x ", "1 x ")
    assert_the_same_value(*({k: v for k, v in record.items() if k not in measured} for record in (one, other)), f"{number}")
  assert {path.name for path in outputs[0].iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
  tables, nothing = ([line for line in (tmp_path / f"stdout-{i}").read_text().splitlines() if "[Gloo]" not in line]
                     for i in (0, 1))
  assert [line.split()[0] for line in tables[:3]] == ["length", "32", "64"]
  assert sum("document_loss" in line for line in tables) == 1 and not nothing and not outputs[1].exists()

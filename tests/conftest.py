"""Shared fixtures. The process sees one CPU device; a run of tests/multidevice alone sees eight fake ones.

Programs are compiled once per test run, not once per process: the workers and the mains they start share a compilation cache
that lasts as long as the run. So runs that are compared bit for bit run the same program. Mains run in children that are forked
from one process, which has imported the libraries and started no backend. Each is the real main with its own flags,
environment, streams and exit code, without paying for the imports again.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit it; jax reads it when it is imported
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="atma_jax-tests-")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
_QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"  # fusions take half of the time of compiling a training step
if importlib.metadata.version("jax").startswith("0.10.") and _QUICK_TO_COMPILE not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK_TO_COMPILE}"  # later versions do not know it

import chex
import jax
import numpy as np
import pytest

# Test files, the one that takes longest first.
LONGEST = ("test_kernels_in_step", "test_processes", "test_benchmark", "test_model", "test_public_api", "test_tpu_compile",
           "test_cli", "test_cache", "test_faults", "test_prepare_data", "test_loop", "test_memory_controls", "test_auxiliary",
           "test_document_masks", "test_ablate", "test_cross_entropy", "test_engine", "test_ahead", "test_notebooks")
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Reads jobs, one JSON line each; answers "PID" when one has started and "PID EXIT_CODE" when it has ended.
FORKING = """
import gc, json, os, runpy, signal, sys
import absl.app, flax.nnx, grain, jax, matplotlib.pyplot, optax, orbax.checkpoint, pyarrow.parquet

def reap(*_):
  while True:
    try:
      child, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:  # a signal in this very handler came first
      return
    if not child:
      return
    children.discard(child)
    os.write(1, f"{child} {os.waitstatus_to_exitcode(status)}\\n".encode())

children = set()
signal.signal(signal.SIGCHLD, reap)
gc.freeze()
for line in sys.stdin:
  job = json.loads(line)
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
  child = os.fork()
  if child == 0:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run of tests in the background ignores it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for stream, name in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
      os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdin = open(os.devnull)
    os.environ.clear()
    os.environ.update(job["environ"])
    if "JAX_NUM_CPU_DEVICES" in os.environ:
      jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))
    sys.argv = [job["module"], *job["arguments"]]
    exec(job["first"], {})
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)
  children.add(child)
  os.write(1, f"{child}\\n".encode())
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
for child in list(children):
  os.kill(child, signal.SIGKILL)
"""


def pytest_configure(config: pytest.Config) -> None:
  """Gives a run of nothing but tests/multidevice its eight devices, however it was started; workers inherit them."""
  paths = [pathlib.PurePath(argument.partition("::")[0]) for argument in config.args]
  if paths and all("multidevice" in path.parts for path in paths):
    chex.set_n_cpu_devices(8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Begins with the files that take longest, so that no worker is left alone with one at the end."""
  items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


class Child:
  """A running main, with the part of the interface of `subprocess.Popen` that the tests use."""

  def __init__(self, forking: Forking, pid: int) -> None:
    self.pid, self.returncode = pid, None
    self._forking = forking

  def poll(self) -> int | None:
    """Returns the exit code, or minus the number of the signal that ended it; None while it runs."""
    if self.returncode is None:
      self.returncode = self._forking.codes.get(self.pid)
    return self.returncode

  def wait(self, timeout: float) -> int:
    """Returns the exit code once the main has ended; raises `subprocess.TimeoutExpired` after `timeout` seconds."""
    with self._forking.changed:
      self._forking.changed.wait_for(lambda: self.poll() is not None or self._forking.ended, timeout)
    if self.returncode is None:
      assert not self._forking.ended, "the process that starts mains has ended"
      raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Sends a signal, unless the main has ended."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def terminate(self) -> None:
    """Sends SIGTERM."""
    self.send_signal(signal.SIGTERM)

  def kill(self) -> None:
    """Sends SIGKILL."""
    self.send_signal(signal.SIGKILL)


class Forking:
  """Starts mains as children of one process that has imported the libraries they use."""

  def __init__(self, folder: pathlib.Path) -> None:
    self.changed, self.codes, self.ended = threading.Condition(), {}, False
    self._folder, self._started = folder, []
    self._process = subprocess.Popen([sys.executable, "-c", FORKING], cwd=REPOSITORY, stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    threading.Thread(target=self._listen, daemon=True).start()

  def _listen(self) -> None:
    for line in self._process.stdout:
      pid, *code = map(int, line.split())
      with self.changed:
        if code:
          self.codes[pid] = code[0]
        else:
          self.codes.pop(pid, None)  # the exit code of an older process with this number
          self._started.append(pid)
        self.changed.notify_all()
    with self.changed:
      self.ended = True
      self.changed.notify_all()

  def start(self, name: str, *arguments: object, stdout: str | os.PathLike = os.devnull,
            stderr: str | os.PathLike = os.devnull, environ: Mapping[str, str] | None = None, first: str = "") -> Child:
    """Starts ``python -m atma_jax.NAME ARGUMENTS...`` in the repository.

    Args:
      name: the main.
      *arguments: its command line.
      stdout, stderr: files that its streams are written to.
      environ: its whole environment; None is that of the tests.
      first: Python code that is run before the main.
    """
    job = {"module": f"atma_jax.{name}", "arguments": [str(a) for a in arguments], "stdout": os.fspath(stdout),
           "stderr": os.fspath(stderr), "environ": dict(os.environ if environ is None else environ), "first": first}
    print(json.dumps(job), file=self._process.stdin, flush=True)
    with self.changed:
      self.changed.wait_for(lambda: self._started or self.ended, 120)
      assert self._started, "nothing was started"
      return Child(self, self._started.pop())

  def run(self, name: str, *arguments: object, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """Starts a main, waits for its end and returns its exit code and streams; `options` are those of `start`."""
    out, error = self._folder / "stdout", self._folder / "stderr"
    child = self.start(name, *arguments, stdout=out, stderr=error, **options)
    try:
      child.wait(timeout)
    finally:
      child.kill()
    return subprocess.CompletedProcess([name, *arguments], child.returncode, out.read_text(), error.read_text())

  def close(self) -> None:
    """Ends the process that starts mains, and with it every main that still runs."""
    self._process.stdin.close()
    assert self._process.wait(timeout=60) == 0


class Golden:
  """Reads a golden file by name: numbers in float64 that the public PyTorch code gave.

  Attributes:
    folder: where the files are; checkpoints are folders of their own in it.
  """

  folder = REPOSITORY / "tests" / "golden"

  def __call__(self, name: str) -> dict[str, np.ndarray]:
    """The arrays of ``tests/golden/NAME`` by name. Raises FileNotFoundError where there is no such file: no test skips."""
    with np.load(self.folder / name) as file:
      return {key: file[key] for key in file.files}


@pytest.fixture(scope="session")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
  """Starts mains; see `Forking`."""
  forking = Forking(tmp_path_factory.mktemp("streams"))
  yield forking
  forking.close()


@pytest.fixture(scope="session")
def main(forking: Forking) -> Callable[..., subprocess.CompletedProcess[str]]:
  """Calls ``python -m atma_jax.NAME ARGUMENTS...`` in the repository and returns the completed process."""
  return forking.run


@pytest.fixture(scope="session")
def golden() -> Golden:
  """Reads the golden files of tests/golden."""
  return Golden()


@pytest.fixture
def x64() -> Iterator[None]:
  """Runs a test in float64."""
  with jax.enable_x64(True):
    yield

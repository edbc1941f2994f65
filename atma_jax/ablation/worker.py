"""A worker of a sweep: runs the cells that no other worker runs, each in its own process, several at a time.

A cell that fails is recorded and left alone; one that is pre-empted becomes free again. SIGTERM (or Ctrl-C) is passed on to
the cells, which save and end; the worker then returns `PREEMPTED` (or `INTERRUPTED`). Ctrl-C after that ends the cells at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from absl import logging

from atma_jax.ablation.sweep import CellFolder
from atma_jax.claims import Claim, Claims
from atma_jax.errors import RunError, UserError

FINISHED, FAILED = "finished", "failed"  # all done; all done or failed
PREEMPTED, INTERRUPTED = "preempted", "interrupted"  # told to end, by SIGTERM or Ctrl-C; the words that training uses too
PARENT_VARIABLE = "ATMA_ABLATE_PARENT"  # process id of the worker, without which its cells do not live on
_POLL_SECONDS = 0.2
_SEARCH_SECONDS = 2.0  # between searches for a cell to start, unless a cell just ended
_REPORT_SECONDS = 30.0
_GRACE_SECONDS = 600.0  # that a cell has for saving after SIGTERM
_SAME_SECONDS = 0.5  # within which two signals are one
_EXIT_PREEMPTED = 75
_MEMORY_SHARE = 0.9  # of a GPU, divided among the cells that share it


@dataclasses.dataclass
class _Running:
  """A cell that this worker runs."""

  folder: CellFolder
  claim: Claim
  process: subprocess.Popen
  started: float
  gpu: str | None


class Worker:
  """Runs cells until none is left.

  Args:
    cells: in the order in which they are tried.
    command: ``command(folder)`` is the command line that runs a cell. It exits with 0 if the cell is done, 75 if it was
      pre-empted, and anything else if it failed.
    parallel: most cells at a time.
    retry_failed: retry, once, the cells that failed before this worker started.
    gpus: ids of GPUs. Every cell sees one of them, the least used. Without ids every cell sees all GPUs.
  """

  def __init__(self, cells: Sequence[CellFolder], command: Callable[[CellFolder], list[str]], *, parallel: int = 1,
               retry_failed: bool = False, gpus: Sequence[str] = ()):
    self._cells, self._command, self._parallel, self._gpus = list(cells), command, parallel, gpus
    self._claims = Claims()
    self._running: list[_Running] = []
    self._retry = {c.id: failure["attempt"] for c in self._cells if retry_failed and (failure := c.failure())}
    self._terminated = threading.Event()
    self._told: tuple[int, float] | None = None  # the first signal, and when it came
    self._at_once = False
    self._reported, self._searched = time.monotonic(), -_SEARCH_SECONDS

  def run(self) -> str:
    """Runs the cells; returns `FINISHED`, `FAILED`, `PREEMPTED` or `INTERRUPTED`.

    Raises:
      UserError: one of the cells cannot be run; nothing was started.
      RunError: what becomes of the cells cannot be written.
    """
    for cell in self._cells:
      cell.check()

    def told(number: int, _: object) -> None:
      if self._told is None:
        self._told = number, time.monotonic()
      self._at_once |= number == signal.SIGINT and time.monotonic() - self._told[1] > _SAME_SECONDS
      self._terminated.set()

    handled = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, told) for s in handled}
    try:
      return self._loop()
    except OSError as error:
      raise RunError(f"--output: {error.filename or 'a cell'} cannot be written: {error.strerror or error}") from error
    finally:
      for running in self._running:
        running.process.kill()
      for s, handler in previous.items():
        signal.signal(s, handler)

  def _loop(self) -> str:
    self._report()
    while not self._terminated.is_set():
      self._reap()
      if time.monotonic() - self._searched >= _SEARCH_SECONDS and len(self._running) < self._parallel:
        while len(self._running) < self._parallel and not self._terminated.is_set() and self._start_one():
          pass
        self._searched = time.monotonic()
        if not self._running and not self._may_take_over():
          break
      if time.monotonic() - self._reported > _REPORT_SECONDS:
        self._report()
      self._terminated.wait(_POLL_SECONDS)
    if self._terminated.is_set():
      return self._stop()
    self._report()
    return FAILED if any(c.failure() for c in self._cells) else FINISHED

  def _open(self) -> list[CellFolder]:
    """Cells that are neither done nor failed, and failed ones that are to be retried."""
    return [c for c in self._cells if not c.done and (
      (failure := c.failure()) is None or self._retry.get(c.id) == failure["attempt"])]

  def _start_one(self) -> bool:
    """Starts the first cell that can be claimed; False if there is none."""
    mine = {running.folder.id for running in self._running}
    for folder in self._open():
      if folder.id in mine:
        continue
      claim = self._claims.acquire(folder.path)
      if claim is None:
        continue
      if folder.id not in {c.id for c in self._open()}:  # another worker finished it meanwhile
        claim.release()
        continue
      folder.forget_failure()
      used = [running.gpu for running in self._running]
      gpu = min(self._gpus, key=used.count, default=None)
      self._running.append(_Running(folder, claim, self._spawn(folder, gpu), time.monotonic(), gpu))
      logging.info("%s: started, log %s", folder.id, folder.path / "log.txt")
      return True
    return False

  def _spawn(self, folder: CellFolder, gpu: str | None) -> subprocess.Popen:
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    if gpu is not None:
      environment["CUDA_VISIBLE_DEVICES"] = gpu
    together = -(-self._parallel // max(len(self._gpus), 1))
    if together > 1:
      environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{_MEMORY_SHARE / together:.3f}")
    with (folder.path / "log.txt").open("ab") as log:
      return subprocess.Popen(self._command(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                              env=environment, start_new_session=True)

  def _reap(self) -> None:
    """Renews the claims of running cells, and records the outcome of those that have ended."""
    for running in list(self._running):
      code = running.process.poll()
      if code is None:
        if not running.claim.beat():
          logging.warning("%s: another worker took it over; stopped here", running.folder.id)
          running.process.kill()
          running.process.wait()
          self._running.remove(running)
        continue
      self._running.remove(running)
      seconds = time.monotonic() - running.started
      if code == 0 and running.folder.done:
        logging.info("%s: done in %s", running.folder.id, duration(seconds))
      elif code in (_EXIT_PREEMPTED, -signal.SIGTERM):
        logging.info("%s: pre-empted, to be continued", running.folder.id)
      else:
        error = _reason(running.folder.path / "log.txt", code)
        running.folder.fail(error, code)
        logging.error("%s: failed after %s: %s", running.folder.id, duration(seconds), error)
      running.claim.release()
      self._searched = -_SEARCH_SECONDS
      self._report()

  def _stop(self) -> str:
    """Passes SIGTERM on to the running cells, and waits for them to end, or ends them at once on Ctrl-C."""
    for running in self._running:
      running.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    while self._running and time.monotonic() < deadline and not self._at_once:
      self._reap()
      time.sleep(_POLL_SECONDS)
    for running in self._running:
      running.process.kill()
      running.process.wait()
      running.claim.release()
    self._running = []
    outcome = INTERRUPTED if self._told is not None and self._told[0] == signal.SIGINT else PREEMPTED
    logging.info("%s: start the same command again", "interrupted" if outcome == INTERRUPTED else "pre-empted")
    return outcome

  def _may_take_over(self) -> bool:
    """Whether a cell of another worker may have to be taken over because its owner has not been seen alive yet."""
    return any(not self._claims.beating(c.path) for c in self._open() if self._claims.owner(c.path))

  def _report(self) -> None:
    """Logs in one line which cells are done, running and failed, and the time that is left."""
    self._reported = time.monotonic()
    done = [c for c in self._cells if c.done]
    failed = [c.id for c in self._cells if c.failure()]
    left = self._open()
    running = sum(self._claims.owner(c.path) is not None for c in left)
    names = f" ({', '.join(failed[:3])}{', ...' if len(failed) > 3 else ''}; --retry_failed tries again)" if failed else ""
    logging.info("%d of %d cells done, %d running, %d failed%s  ETA %s", len(done), len(self._cells), running, len(failed), names,
                 remaining_time(done, left, running))
    for cell in self._running:
      logging.info("%s: %s", cell.folder.id, cell.folder.last_record() or "no step yet: preparing data or compiling")


def remaining_time(done: Sequence[CellFolder], left: Sequence[CellFolder], running: int) -> str:
  """The time until all cells are done, as H:MM:SS; until one is done only that of the training, or when it will be known.

  Args:
    done: cells whose mean time is what each of the others is expected to take. Without any, the speed of training decides, which
      says nothing about the evaluation.
    left: the other cells. The part of their training that is done is subtracted.
    running: number of cells that run at a time.
  """
  if not left:
    return duration(0)
  progress = [c.progress() for c in left]
  measured = [known for c in done if (known := _seconds(c)) is not None]
  seconds = measured or [seconds for _, seconds in progress if seconds]
  if not running:
    return "once a cell runs"
  if not seconds:
    return "after the first steps"
  rest = duration(sum(seconds) / len(seconds) * sum(1 - fraction for fraction, _ in progress) / running)
  return rest if measured else f"{rest} of training, and the evaluation"


def _seconds(cell: CellFolder) -> float | None:
  """How long a cell that is done took; None if its result does not say."""
  try:
    seconds = (cell.result() or {}).get("seconds")
  except UserError:
    return None
  return float(seconds) if isinstance(seconds, (int, float)) and 0 <= seconds < math.inf else None


def cell_command(main: str) -> Callable[[CellFolder], list[str]]:
  """The argument `command` of `Worker` for a main with the flag ``--run_cell=FOLDER``."""
  return lambda folder: [sys.executable, "-m", main, f"--run_cell={folder.path}"]


def duration(seconds: float) -> str:
  """A time as H:MM:SS."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"


def _reason(log: pathlib.Path, code: int) -> str:
  """Why a process failed: the last line of its log that begins with "error:", or else its last line."""
  with log.open("rb") as file:
    file.seek(max(0, log.stat().st_size - 65536))
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
  said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
  return f"killed by {signal.Signals(-code).name}; last line: {said}" if code < 0 else said

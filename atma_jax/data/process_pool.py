"""An ordered parallel map over worker processes, which end with their parent however it ends."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import itertools
import mmap
import multiprocessing
import multiprocessing.context
import multiprocessing.reduction
import os
import pickle
import signal
import sys
import tempfile
import threading
import types
from typing import Any, BinaryIO

from atma_jax.errors import RunError, UserError

MOST_WORKERS = 32  # by default: the one process that reads and writes for all of them cannot keep more busy
_BATCHES_AHEAD = 4  # in flight per worker: enough to keep it busy, few enough to bound memory
# Numerical libraries start one thread per core when they are imported, and each spins for a while. One worker per core would make
# that the square of the cores.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
               "TOKENIZERS_PARALLELISM": "false"}
_function: Callable[[Any], Any] | None = None  # what this worker process applies, set once when it starts


class Pool:
  """Applies one picklable function to many items in worker processes and yields the results in order.

  Each worker unpickles the function once. It may come from any module except ``__main__``, which the workers do not import.

  Args:
    workers: number of processes. None takes `default_workers`, 1 works in this process.
    function: what `map` applies.

  Attributes:
    workers: number of processes.
  """

  def __init__(self, workers: int | None, function: Callable[[Any], Any]):
    self.workers = default_workers() if workers is None else workers
    self._function = function
    self._executor: concurrent.futures.ProcessPoolExecutor | None = None
    self._file: BinaryIO | None = None

  def __enter__(self) -> Pool:
    if self.workers > 1:
      self._file = _pickled(self._function)
      self._executor = concurrent.futures.ProcessPoolExecutor(
          self.workers, _Context(), _start_worker, (_Inherited(self._file.fileno()),))
    return self

  def __exit__(self, *exception: object) -> None:
    if self._executor is not None:
      self._executor.shutdown(cancel_futures=True)
    if self._file is not None:
      self._file.close()

  def map(self, items: Iterable[Any]) -> Iterator[Any]:
    """Yields the function's results on `items` in order, taking only a few items ahead of what has been consumed.

    Raises:
      RunError: a worker was killed, for example because the machine ran out of memory.
    """
    executor = self._executor
    if executor is None:
      yield from map(self._function, items)
      return
    items = iter(items)
    ahead = itertools.islice(items, _BATCHES_AHEAD * self.workers)
    try:
      pending = collections.deque(executor.submit(_call, item) for item in ahead)
      while pending:
        yield pending.popleft().result()
        pending.extend(executor.submit(_call, item) for item in itertools.islice(items, 1))
    except concurrent.futures.BrokenExecutor as error:
      raise RunError(f"one of {self.workers} worker processes was killed (out of memory?); start the same command again, with "
                     "fewer workers if it happens again") from error


def default_workers() -> int:
  """Returns the number of processes used unless told otherwise: one per core, at most `MOST_WORKERS`."""
  return min(_cores(), MOST_WORKERS)


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process(multiprocessing.context.SpawnProcess):
  """A process that starts without importing the parent's main module, which may import JAX and everything training needs."""

  def start(self) -> None:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")  # without a spec or a file there is nothing to import
    try:
      super().start()
    finally:
      sys.modules["__main__"] = main


class _Context(multiprocessing.context.SpawnContext):
  Process = _Process


class _Inherited:
  """An open file with a pickled value, which a starting process inherits.

  Arguments given to a process directly go through a pipe that holds 64 KiB. With more than that the parent would wait until the
  process has started, and so start the workers one after the other.
  """

  def __init__(self, descriptor: int):
    self._descriptor = descriptor

  def __reduce__(self) -> tuple[Any, ...]:
    return _inherit, (multiprocessing.reduction.DupFd(self._descriptor),)

  def unpickle(self) -> Any:
    """Returns the value in the file."""
    # A map needs no file position, which all processes would share.
    with mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) as content:
      return pickle.loads(content)


def _inherit(handle: Any) -> _Inherited:
  return _Inherited(handle.detach())


def _pickled(value: Any) -> BinaryIO:
  """Pickles `value` to an unnamed file, which is gone once no process has it open, however the processes end."""
  try:
    file = tempfile.TemporaryFile()  # the pool closes it  # noqa: SIM115
    pickle.dump(value, file)
    file.flush()
  except OSError as error:
    raise UserError(f"cannot write a temporary file: {error.strerror or error}; TMPDIR names the folder for it") from error
  return file


def _start_worker(function: _Inherited) -> None:
  global _function
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends its workers
  threading.Thread(target=_end_with_parent, daemon=True).start()
  os.environ.update(_ONE_THREAD)  # before unpickling the function imports its modules
  _function = function.unpickle()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None  # this is a worker
  parent.join()
  os._exit(1)


def _call(item: Any) -> Any:
  assert _function is not None  # set when the worker started
  return _function(item)

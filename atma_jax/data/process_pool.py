"""An ordered parallel map over worker processes that end with their parent, however it ends."""

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
import sys
import tempfile
import threading
import types
from typing import Any, BinaryIO

from atma_jax.errors import UserError

MOST_WORKERS = 32  # by default: the one process that reads and writes for all of them keeps no more busy
_BATCHES_AHEAD = 4  # in flight per worker: enough to keep it busy, few enough to bound memory
# Numerical libraries start a thread a core when they are imported, and each spins a while: in as many workers, cores squared.
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_function: Callable[[Any], Any] | None = None  # of a worker process, set once when it starts


class Pool:
  """Applies one picklable function, read by each process once, to many items; results come in order.

  The function comes from any module but the main one, which the processes do not import.
  """

  def __init__(self, workers: int | None, function: Callable[[Any], Any]):
    self._workers = default_workers() if workers is None else workers
    self._function = function
    self._executor = None

  def __enter__(self) -> Pool:
    if self._workers > 1:
      self._file = _pickled(self._function)
      self._executor = concurrent.futures.ProcessPoolExecutor(
          self._workers, _Context(), _start_worker, (_Inherited(self._file.fileno()),))
    return self

  def __exit__(self, *exception) -> None:
    if self._executor is not None:
      self._executor.shutdown(cancel_futures=True)
      self._file.close()

  def map(self, items: Iterable[Any]) -> Iterator[Any]:
    """Results of the function on `items`, in order; only a few items are taken ahead of what is consumed."""
    if self._executor is None:
      yield from map(self._function, items)
      return
    items = iter(items)
    ahead = itertools.islice(items, _BATCHES_AHEAD * self._workers)
    pending = collections.deque(self._executor.submit(_call, item) for item in ahead)
    while pending:
      yield pending.popleft().result()
      pending.extend(self._executor.submit(_call, item) for item in itertools.islice(items, 1))


def default_workers() -> int:
  """Processes where no number is asked for: one a core, at most `MOST_WORKERS`."""
  return min(_cores(), MOST_WORKERS)


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class _Process(multiprocessing.context.SpawnProcess):
  """Starts without importing the parent's main module, which may import JAX and all else that training needs."""

  def start(self) -> None:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")  # of no name and no file: nothing to import
    try:
      super().start()
    finally:
      sys.modules["__main__"] = main


class _Context(multiprocessing.context.SpawnContext):
  Process = _Process


class _Inherited:
  """A file that a starting process inherits.

  What a process is given directly goes through a pipe that holds 64 KiB: of more, the parent would wait until the process
  has started, and so start one after the other.
  """

  def __init__(self, descriptor: int):
    self._descriptor = descriptor

  def __reduce__(self):
    return _inherit, (multiprocessing.reduction.DupFd(self._descriptor),)

  def unpickle(self) -> Any:
    with mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) as content:  # at no position: that is shared
      return pickle.loads(content)


def _inherit(handle: Any) -> _Inherited:
  return _Inherited(handle.detach())


def _pickled(value: Any) -> BinaryIO:
  """A file without a name that holds `value`; it is gone when no process has it open, however they end."""
  try:
    file = tempfile.TemporaryFile()  # the pool closes it  # noqa: SIM115
    pickle.dump(value, file)
    file.flush()
  except OSError as error:
    raise UserError(f"cannot write a temporary file: {error.strerror or error}; TMPDIR names the folder for it") from error
  return file


def _start_worker(function: _Inherited) -> None:
  global _function
  threading.Thread(target=_end_with_parent, daemon=True).start()
  os.environ.update(_ONE_THREAD)  # before the function's modules are imported, with which it is read
  _function = function.unpickle()


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def _call(item: Any) -> Any:
  return _function(item)

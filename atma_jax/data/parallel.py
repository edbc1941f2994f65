"""An ordered parallel map over worker processes that end with their parent, however it ends."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import itertools
import multiprocessing
import os
import threading
from typing import Any

_BATCHES_AHEAD = 4  # in flight per worker: enough to keep it busy, few enough to bound memory
_function: Callable[[Any], Any] | None = None  # of a worker process, set once when it starts


class Pool:
  """Applies one picklable function, sent to each process once, to many items; results come in order."""

  def __init__(self, workers: int | None, function: Callable[[Any], Any]):
    self._workers = _cores() if workers is None else workers
    self._function = function
    self._executor = None

  def __enter__(self) -> Pool:
    if self._workers > 1:
      self._executor = concurrent.futures.ProcessPoolExecutor(
          self._workers, multiprocessing.get_context("spawn"), _start_worker, (self._function,))
    return self

  def __exit__(self, *exception) -> None:
    if self._executor is not None:
      self._executor.shutdown(cancel_futures=True)

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


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _start_worker(function: Callable[[Any], Any]) -> None:
  global _function
  _function = function
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def _call(item: Any) -> Any:
  return _function(item)

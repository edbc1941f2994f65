"""Goodput: the share of a run's wall time that went into training steps, and what took the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import time
from typing import Any

OVERHEADS = {  # what is not a step, as records of metrics and the last line of a run call it
  "starting": "starting", "compiling": "compiling", "data": "waiting for data", "saving": "saving", "validating": "validating",
  "restarts": "between an end and a start",
}


class Goodput:
  """Counts the seconds of a run by what they went into, over all of its processes.

  Time that is lost to a restart, that is the steps done after the last record that counts and the time in which nothing ran, is
  known by that record, from which a run that goes on takes over the counts too.
  """

  def __init__(self, began: float, before: Mapping[str, Any] | None):
    """Starts to count.

    Args:
      began: `time.perf_counter` when this process started the run.
      before: the last record of the metrics that the run goes on from; None for a new run.
    """
    self._began = began
    self._seconds = {name: _seconds(before, f"seconds/{name}") for name in OVERHEADS}
    self._before = sum(self._seconds.values()) + _seconds(before, "seconds/steps")
    if before is not None:
      lost = max(time.time() - (time.perf_counter() - began) - _seconds(before, "time", time.time()), 0.0)
      self._seconds["restarts"] += lost
      self._before += lost
    self._seconds["starting"] += time.perf_counter() - began

  def add(self, name: str, seconds: float) -> None:
    """Counts seconds for one of `OVERHEADS`."""
    self._seconds[name] += seconds

  @contextlib.contextmanager
  def spent(self, name: str) -> Iterator[None]:
    """Counts what happens inside for one of `OVERHEADS`."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self.add(name, time.perf_counter() - began)

  def values(self) -> dict[str, float]:
    """For a record of metrics: the share ``goodput`` from 0 to 1, ``seconds/steps``, and ``seconds/...`` for each overhead."""
    wall = self._wall()
    steps = max(wall - sum(self._seconds.values()), 0.0)
    return {"goodput": steps / wall, "seconds/steps": steps, **{f"seconds/{name}": s for name, s in self._seconds.items()}}

  def __str__(self) -> str:
    """Such as "goodput 91.0% of 200.0 s (6.0% compiling, 3.0% saving)"."""
    wall = self._wall()
    shares = [f"{seconds / wall:.1%} {OVERHEADS[name]}" for name, seconds in self._seconds.items() if seconds / wall >= 0.0005]
    return f"goodput {self.values()['goodput']:.1%} of {wall:,.1f} s" + (f" ({', '.join(shares)})" if shares else "")

  def _wall(self) -> float:
    """Seconds since the run was first started."""
    return max(self._before + time.perf_counter() - self._began, 1e-9)


def _seconds(record: Mapping[str, Any] | None, name: str, default: float = 0.0) -> float:
  """A number of seconds in a record that anybody may have written; the default if there is none."""
  value: Any = None if record is None else record.get(name)
  usable = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12
  return float(value) if usable else default

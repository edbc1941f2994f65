"""Reads a device profile: how much of a program's time goes into communication, and how much of that is not hidden."""

from __future__ import annotations

from collections.abc import Callable
import pathlib
import tempfile

import jax

_COLLECTIVES = ("nccl", "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

Interval = tuple[float, float]


def communication(run: Callable[[], object]) -> tuple[float | None, float | None]:
  """Profiles one call of `run` and measures its collectives on the first device.

  Args:
    run: does the work and returns when it is done; compiled before.

  Returns:
    The share of the device's busy time in which collectives run, and the share in which only collectives run. (None, None)
    where the profile holds no device lines, as on a CPU.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    if not files:
      return None, None
    profile = jax.profiler.ProfileData.from_file(str(files[-1]))
  collectives: list[Interval] = []
  others: list[Interval] = []
  plane = next((plane for plane in profile.planes if plane.name.startswith("/device:GPU:0")), None)
  if plane is None:
    return None, None
  for line in plane.lines:
    if not line.name.startswith("Stream"):
      continue
    for event in line.events:
      chosen = collectives if any(name in event.name.lower() for name in _COLLECTIVES) else others
      chosen.append((event.start_ns, event.start_ns + event.duration_ns))
  total = covered([*collectives, *others])
  if not total:
    return None, None
  return covered(collectives) / total, (total - covered(others)) / total


def covered(intervals: list[Interval]) -> float:
  """Length of the union of intervals."""
  length, end = 0.0, float("-inf")
  for start, stop in sorted(intervals):
    length += max(0.0, stop - max(start, end))
    end = max(end, stop)
  return length

"""What the numbers were made with, and what happens when it is not enough: hardware, code version, memory."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib.metadata
import pathlib
import re
import subprocess
import tomllib

import jax

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|ran out of .*memory|exceeds available memory", re.IGNORECASE)
_CGROUP = pathlib.Path("/sys/fs/cgroup")


class OutOfMemory(Exception):
  """A computation does not fit, told in one line."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
  """Turns what jax and numpy raise when memory runs out, at compilation or later, into `OutOfMemory`."""
  try:
    yield
  except MemoryError as error:
    raise OutOfMemory(f"host memory: {error}") from error
  except jax.errors.JaxRuntimeError as error:
    if not _OUT_OF_MEMORY.search(str(error)):
      raise
    raise OutOfMemory(" ".join(str(error).split())[:300]) from error


def available_bytes(device: jax.Device) -> int | None:
  """Host memory that is free, for a CPU device; None for others, which refuse by themselves.

  A CPU does not refuse: it would be given the memory, and the process killed on using it.
  """
  if device.platform != "cpu":
    return None
  try:
    fields = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None
  try:  # a container may have less; file pages in its cache are given up for the asking
    limit, used, stat = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
    cached = int(dict(line.split() for line in stat.splitlines())["inactive_file"])
    return min(free, int(limit) - int(used) + cached) if limit.strip() != "max" else free
  except (OSError, ValueError, KeyError):
    return free


def hardware() -> str:
  """Devices in words."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def code_version() -> str:
  """Version of the package, and, from a checkout, the commit, with a plus sign where files differ from it."""
  root = pathlib.Path(__file__).resolve().parents[2]
  try:
    version = importlib.metadata.version("atma_jax")
  except importlib.metadata.PackageNotFoundError:
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
  if not (root / ".git").exists():
    return version

  def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

  try:
    return f"{version} {git('rev-parse', '--short=12', 'HEAD')}{'+' if git('status', '--porcelain', '-uno') else ''}"
  except (OSError, subprocess.CalledProcessError):
    return version

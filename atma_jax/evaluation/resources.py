"""What an evaluation runs on: running out of memory, the hardware, and the version of the code."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import re
import subprocess

import jax

from atma_jax import __version__
from atma_jax.memory_needs import free_host_bytes

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|ran out of .*memory|exceeds available memory", re.IGNORECASE)


class OutOfMemory(Exception):
  """A computation does not fit into memory; the message is one line."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
  """Turns the errors that JAX and NumPy raise when memory runs out, at compilation or later, into `OutOfMemory`."""
  try:
    yield
  except MemoryError as error:
    raise OutOfMemory(f"host memory: {error}") from error
  except jax.errors.JaxRuntimeError as error:
    if not _OUT_OF_MEMORY.search(str(error)):
      raise
    raise OutOfMemory(" ".join(str(error).split())[:300]) from error


def available_bytes(device: jax.Device) -> int | None:
  """Free host memory if `device` is a CPU, else None.

  Accelerators refuse an allocation that does not fit. A CPU grants it, and the process is killed when it uses the memory, so
  only there has the size to be checked beforehand.
  """
  return free_host_bytes() if device.platform == "cpu" else None


def hardware() -> str:
  """Number and kind of the devices, such as "8 x NVIDIA H200"."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def code_version() -> str:
  """Version of the package; in a checkout also the commit, followed by "+" if tracked files differ from it."""
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return __version__

  def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

  try:
    return f"{__version__} {git('rev-parse', '--short=12', 'HEAD')}{'+' if git('status', '--porcelain', '-uno') else ''}"
  except (OSError, subprocess.CalledProcessError):
    return __version__

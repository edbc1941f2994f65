"""Who runs a cell: claims that several workers take atomically in a directory they share.

A cell's claims are files ``claim.0``, ``claim.1``, ...; the highest counts, and whoever creates the next one has the cell
(`O_EXCL`, so there is one winner and nothing is ever renamed away under its owner). A claim is passed on when it was
released, when its process is gone from this machine, or when its heartbeat stood still for `STALE_SECONDS` while this
process looked: clocks of different machines are never compared. An owner that finds a higher claim has lost the cell.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import socket
import time
from typing import Any

from atma_jax.errors import UserError

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


class Claim:
  """A cell that is this process's."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._next = path.with_name(f"claim.{_number(path) + 1}")
    self._beaten = time.monotonic()

  def beat(self) -> bool:
    """Shows that the owner lives, at most every `BEAT_SECONDS`; False once another process has the cell."""
    if time.monotonic() - self._beaten >= BEAT_SECONDS:
      os.utime(self.path)
      self._beaten = time.monotonic()
    return not self._next.exists()

  def release(self) -> None:
    """Lets any process take the cell again."""
    temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_identity() | {"released": True}))
    os.replace(temporary, self.path)


class Claims:
  """Takes claims and remembers the heartbeats it saw of others."""

  def __init__(self) -> None:
    self._seen: dict[pathlib.Path, tuple[int, float]] = {}  # claim -> (heartbeat, when it was first seen at that)
    self._first: dict[pathlib.Path, int] = {}  # claim of another machine -> the first heartbeat seen

  def acquire(self, folder: pathlib.Path) -> Claim | None:
    """The claim on a cell's folder, or None where another process has it."""
    current = _current(folder)
    if current is not None and self.alive(current):
      return None
    path = folder / f"claim.{0 if current is None else _number(current) + 1}"
    try:
      descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
      return None
    except OSError as error:
      raise UserError(f"--output: cannot write {path}: {error.strerror or error}") from error
    with os.fdopen(descriptor, "w") as file:
      file.write(json.dumps(_identity() | {"released": False}))
    return Claim(path)

  def owner(self, folder: pathlib.Path) -> str | None:
    """Who has the cell, or None if it is free."""
    current = _current(folder)
    if current is None or not self.alive(current):
      return None
    identity = _read(current)
    return f"{identity.get('host', 'unknown').partition(' ')[0]}:{identity.get('pid', 'unknown')}"

  def beating(self, folder: pathlib.Path) -> bool:
    """True once the cell's owner was seen to live: nobody needs to wait to take over."""
    current = _current(folder)
    if current is None or not self.alive(current):
      return False
    return current not in self._first or self._seen[current][0] != self._first[current]

  def alive(self, path: pathlib.Path) -> bool:
    """Whether the claim `path` holds."""
    identity = _read(path)
    if identity.get("released"):
      return False
    ours = _identity()
    if identity.get("host") == ours["host"]:
      return _started(identity["pid"]) == identity["started"]
    try:
      heartbeat = path.stat().st_mtime_ns
    except FileNotFoundError:
      return False
    now = time.monotonic()
    self._first.setdefault(path, heartbeat)
    seen, since = self._seen.get(path, (heartbeat, now))
    self._seen[path] = (heartbeat, since if seen == heartbeat else now)
    return now - self._seen[path][1] < STALE_SECONDS


def _current(folder: pathlib.Path) -> pathlib.Path | None:
  return max((path for path in folder.glob("claim.*") if re.fullmatch(r"claim\.\d+", path.name)), key=_number, default=None)


def _number(path: pathlib.Path) -> int:
  return int(path.name.removeprefix("claim."))


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Its contents; a claim that is just being written, or whose writer died, says nothing."""
  try:
    return json.loads(path.read_text())
  except (ValueError, FileNotFoundError):
    return {}


def _identity() -> dict[str, Any]:
  return {"host": f"{socket.gethostname()} {_machine()}", "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str:
  """Tells machines, boots and containers of one name apart, as far as the system says."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
  except OSError:
    return ""


def _started(pid: int) -> str | None:
  """When a process of this machine started, in the system's own count; None if there is no such process."""
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if status[0] in "ZX" else status[19]
  except OSError:
    pass
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return None if pathlib.Path("/proc/self").exists() else "unknown"

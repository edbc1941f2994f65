"""Claims by which workers that share a directory make sure that a cell is run by one of them at a time.

The claims of a cell are files ``claim.0``, ``claim.1``, and so on. The one with the highest number is in force, and whoever
creates the next one owns the cell. (Files are created with `O_EXCL`, so there is a single winner, and no claim is ever renamed
or removed under its owner.) A claim lapses when it is released, when its process has ended on this machine, or when its
heartbeat has stood still for `STALE_SECONDS` of this process's own clock; clocks of different machines are never compared. An
owner that finds a higher claim has lost the cell.
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
  """This process's claim on a cell."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._next = path.with_name(f"claim.{_number(path) + 1}")
    self._last_beat = time.monotonic()

  def beat(self) -> bool:
    """Renews the heartbeat, at most every `BEAT_SECONDS`; False if another process has taken the cell."""
    if time.monotonic() - self._last_beat >= BEAT_SECONDS:
      os.utime(self.path)
      self._last_beat = time.monotonic()
    return not self._next.exists()

  def release(self) -> None:
    """Gives the cell up, so that any process can take it."""
    temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_identity() | {"released": True}))
    os.replace(temporary, self.path)


class Claims:
  """Takes claims, and remembers the heartbeats of the claims of other machines."""

  def __init__(self) -> None:
    self._latest: dict[pathlib.Path, tuple[int, float]] = {}  # claim -> latest heartbeat, and when it was first seen
    self._first: dict[pathlib.Path, int] = {}  # claim -> first heartbeat seen

  def acquire(self, folder: pathlib.Path) -> Claim | None:
    """Claims the cell of a folder; None if another process owns it.

    Raises:
      UserError: the folder cannot be written.
    """
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
    """Host and process id of the owner of a cell, or None if it is free."""
    current = _current(folder)
    if current is None or not self.alive(current):
      return None
    identity = _read(current)
    return f"{identity.get('host', 'unknown').partition(' ')[0]}:{identity.get('pid', 'unknown')}"

  def beating(self, folder: pathlib.Path) -> bool:
    """Whether the owner of a cell has been seen alive, so that nobody has to wait in order to take the cell over."""
    current = _current(folder)
    if current is None or not self.alive(current):
      return False
    return current not in self._first or self._latest[current][0] != self._first[current]

  def alive(self, path: pathlib.Path) -> bool:
    """Whether the claim `path` has not lapsed."""
    identity = _read(path)
    if identity.get("released"):
      return False
    ours = _identity()
    if identity.get("host") == ours["host"]:
      return process_start(identity["pid"]) == identity["started"]
    try:
      heartbeat = path.stat().st_mtime_ns
    except FileNotFoundError:
      return False
    now = time.monotonic()
    self._first.setdefault(path, heartbeat)
    seen, since = self._latest.get(path, (heartbeat, now))
    self._latest[path] = (heartbeat, since if seen == heartbeat else now)
    return now - self._latest[path][1] < STALE_SECONDS


def _current(folder: pathlib.Path) -> pathlib.Path | None:
  """The claim with the highest number."""
  return max((path for path in folder.glob("claim.*") if re.fullmatch(r"claim\.\d+", path.name)), key=_number, default=None)


def _number(path: pathlib.Path) -> int:
  return int(path.name.removeprefix("claim."))


def _read(path: pathlib.Path) -> dict[str, Any]:
  """The content of a claim; empty while it is being written, or if its writer died."""
  try:
    return json.loads(path.read_text())
  except (ValueError, FileNotFoundError):
    return {}


def _identity() -> dict[str, Any]:
  return {"host": f"{socket.gethostname()} {_machine()}", "pid": os.getpid(), "started": process_start(os.getpid())}


def _machine() -> str:
  """Identifies this boot and this container, as far as the system says, because host names are not unique."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
  except OSError:
    return ""


def process_start(pid: int) -> str | None:
  """When a process of this machine started, in the system's own ticks; None if there is no such process."""
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

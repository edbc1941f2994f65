"""Claims by which processes that share a directory make sure that only one of them works in it: trainers, and workers of a sweep.

The claims on a folder are files ``claim.0``, ``claim.1``, and so on. The one with the highest number is in force, and whoever
creates the next one owns the folder. A file is created only if there is none of its name (`O_EXCL`; on ``gs://`` there is one
object, written on the condition that nobody else has written it since), so there is a single winner, and a claim is never renamed
or removed under its owner. A claim lapses when it is released, when its process has ended on this machine, or when its heartbeat
has stood still for `STALE_SECONDS` of this process's own clock; clocks of different machines are never compared. An owner that
finds a higher claim, or not its own any more, has lost the folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import secrets
import socket
import stat
import threading
import time
from typing import Any

from absl import logging
from etils import epath

from atma_jax.errors import RunError, UserError

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
_WAIT_SECONDS = 1.0  # between two looks at a claim whose owner has not been seen alive
_KEPT = 8  # claims before the one in force that are left in place, for a process that lists an old state of the folder
_NAME = re.compile(r"claim\.[0-9]{1,15}")
_MOST_CHARACTERS = 65_536  # of a claim


class Claim:
  """This process's claim on a folder.

  Attributes:
    path: the file.
    lost: whether another process has taken the folder; `keep` notices that.
  """

  def __init__(self, path: epath.Path, store: _LocalStore | _RemoteStore):
    self.path, self.lost = path, False
    self._store, self._next = store, f"claim.{_number(path.name) + 1}"
    self._last_beat = time.monotonic()
    self._ended = threading.Event()
    self._thread: threading.Thread | None = None

  def beat(self) -> bool:
    """Renews the heartbeat, at most every `BEAT_SECONDS`; False if another process has taken the folder."""
    if time.monotonic() - self._last_beat >= BEAT_SECONDS:
      try:
        self._store.touch(self.path.name)
      except FileNotFoundError:
        return False
      except OSError as error:
        logging.warning("the claim %s could not be renewed: %s", self.path, error.strerror or error)
      self._last_beat = time.monotonic()
    return not self._store.exists(self._next)

  def keep(self) -> Claim:
    """Renews the heartbeat from a thread until `release`; returns the claim itself."""
    self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
    self._thread.start()
    return self

  def _keep(self) -> None:
    while not self._ended.wait(BEAT_SECONDS) and not self.lost:
      try:
        self.lost = not self.beat()
      except Exception as error:  # cloud file systems raise errors of their own; until it is lost, the claim is tried again
        logging.warning("the claim %s could not be renewed: %s", self.path, " ".join(str(error).split())[:200])

  def release(self) -> None:
    """Gives the folder up, so that any process can take it; a failure is logged, and the claim lapses with the process."""
    self._ended.set()
    if self.lost:
      return
    try:
      self._store.replace(self.path.name, json.dumps(_identity() | {"released": True}))
    except Exception as error:  # cloud file systems raise errors of their own
      logging.warning("the claim %s could not be released: %s", self.path, " ".join(str(error).split())[:200])


class Claims:
  """Takes claims, and remembers the heartbeats of the claims of other machines."""

  def __init__(self) -> None:
    self._latest: dict[str, tuple[Any, float]] = {}  # claim -> latest heartbeat, and when it was first seen
    self._first: dict[str, Any] = {}  # claim -> first heartbeat seen

  def acquire(self, folder: str | os.PathLike) -> Claim | None:
    """Claims a folder; None if another process owns it.

    Raises:
      UserError: the folder cannot be written.
    """
    store = _store(folder)
    current = store.newest()
    if current is not None and self._alive(store, current):
      return None
    number = 0 if current is None else _number(current) + 1
    name = f"claim.{number}"
    if not _NAME.fullmatch(name):
      raise UserError(f"{store.folder / str(current)} is no claim of this program: remove it")
    try:
      if not store.create(name, json.dumps(_identity() | {"released": False})):
        return None
      if store.newest() != name:  # this process had listed claims that have been removed since
        store.remove(name)
        return None
      for old in [old for old in store.names() if _number(old) < number - _KEPT]:
        store.remove(old)
    except OSError as error:
      raise UserError(f"cannot write {store.folder / name}: {error.strerror or error}") from error
    return Claim(store.folder / name, store)

  def owner(self, folder: str | os.PathLike) -> str | None:
    """Host and process id of the owner of a folder, or None if it is free."""
    store = _store(folder)
    current = store.newest()
    if current is None or not self._alive(store, current):
      return None
    identity = _read(store, current)
    return f"{str(identity.get('host', 'unknown')).partition(' ')[0]}:{identity.get('pid', 'unknown')}"

  def beating(self, folder: str | os.PathLike) -> bool:
    """Whether the owner of a folder has been seen alive, so that nobody has to wait in order to take the folder over."""
    store = _store(folder)
    current = store.newest()
    if current is None or not self._alive(store, current):
      return False
    key = str(store.folder / current)
    return key not in self._first or self._latest[key][0] != self._first[key]

  def owned_by(self, folder: str | os.PathLike, pid: int) -> bool:
    """Whether process `pid` of this machine owns a folder."""
    store = _store(folder)
    current = store.newest()
    if current is None or not self._alive(store, current):
      return False
    identity = _read(store, current)
    return identity.get("host") == _identity()["host"] and identity.get("pid") == pid

  def _alive(self, store: _LocalStore | _RemoteStore, name: str) -> bool:
    """Whether a claim has not lapsed."""
    identity = _read(store, name)
    if identity.get("released") is True:
      return False
    if identity and identity.get("host") == _identity()["host"]:
      started = process_start(identity["pid"])
      return started is not None and started == identity["started"]
    heartbeat = store.stamp(name)
    if heartbeat is None:
      return False
    key, now = str(store.folder / name), time.monotonic()
    self._first.setdefault(key, heartbeat)
    seen, since = self._latest.get(key, (heartbeat, now))
    self._latest[key] = (heartbeat, since if seen == heartbeat else now)
    return now - self._latest[key][1] < STALE_SECONDS


def hold(folder: str | os.PathLike, flag: str) -> Claim:
  """Claims a folder for as long as this process works in it, and renews the claim from a thread.

  The owner may be a process of another machine that ended without a word; that takes `STALE_SECONDS` to find out.

  Args:
    folder: local or remote.
    flag: what names the folder in messages, such as ``--workdir=DIR``.

  Raises:
    UserError: another process owns the folder, or it cannot be written.
    RunError: a remote folder cannot be reached.
  """
  claims, waiting = Claims(), False
  while True:
    try:
      claim = claims.acquire(folder)
    except UserError as error:
      raise UserError(f"{flag}: {error}") from error
    except ValueError as error:  # TensorStore, of a cloud file system that cannot be reached
      raise RunError(f"{flag}: cannot be claimed: {' '.join(str(error).split())[:300]}") from error
    if claim is not None:
      return claim.keep()
    owner = claims.owner(folder)
    if owner is not None and claims.beating(folder):
      raise UserError(f"{flag}: in use by {owner} (host and process id), which is alive: wait until it has ended, or name "
                      "another directory")
    if owner is not None and not waiting:
      logging.info("%s: last used by %s; if that shows no sign of life within %.0f s, this process takes over", flag, owner,
                   STALE_SECONDS)
      waiting = True
    time.sleep(_WAIT_SECONDS)


class _LocalStore:
  """The claims in a folder of a file system. `OSError` where a file cannot be written."""

  def __init__(self, folder: epath.Path):
    self.folder = folder

  def names(self) -> list[str]:
    """The names of all claims."""
    try:
      return [name for name in os.listdir(self.folder) if _NAME.fullmatch(name)]
    except OSError:
      return []

  def newest(self) -> str | None:
    """The claim with the highest number."""
    return max(self.names(), key=_number, default=None)

  def exists(self, name: str) -> bool:
    return (self.folder / name).exists()

  def read(self, name: str) -> str:
    if not stat.S_ISREG(os.stat(self.folder / name).st_mode):
      raise FileNotFoundError(name)
    with open(self.folder / name) as file:
      return file.read(_MOST_CHARACTERS)

  def create(self, name: str, text: str) -> bool:
    """Creates a file with a text; False if there is one of that name."""
    try:
      descriptor = os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      return False
    try:
      with os.fdopen(descriptor, "w") as file:
        file.write(text)
    except OSError:
      self.remove(name)
      raise
    return True

  def replace(self, name: str, text: str) -> None:
    """Replaces the text of a file; on a full disk in its place, which takes no room."""
    temporary = self.folder / f".{name}.{os.getpid()}"
    try:
      temporary.write_text(text)
      os.replace(temporary, self.folder / name)
    except OSError:
      with contextlib.suppress(OSError):
        temporary.unlink()
      with open(self.folder / name, "r+b", buffering=0) as file:
        file.write(text.encode().ljust(os.fstat(file.fileno()).st_size))

  def touch(self, name: str) -> None:
    os.utime(self.folder / name)

  def stamp(self, name: str) -> Any:
    """What changes with each `touch`; None if there is no such file."""
    try:
      return os.stat(self.folder / name).st_mtime_ns
    except OSError:
      return None

  def remove(self, name: str) -> None:
    with contextlib.suppress(OSError):
      os.unlink(self.folder / name)


class _RemoteStore:
  """The claim in force on a folder such as ``gs://BUCKET/PATH``: one object ``claim``, which holds its number too.

  It is read and written through TensorStore, as checkpoints are. Every write is on the condition that the object is still the one
  that was read. Storage that cannot be reached raises ValueError.
  """

  def __init__(self, folder: epath.Path):
    import tensorstore  # only trainers have remote folders; the workers of a sweep stay light
    self.folder = folder
    self._beats = 0
    self._store = tensorstore.KvStore.open(f"{os.fspath(folder).rstrip('/')}/").result()

  def _get(self) -> tuple[dict[str, Any] | None, bytes]:
    """The content of the object, None if there is none, and its generation."""
    found = self._store.read("claim").result()
    if found.state != "value":
      return None, found.stamp.generation
    try:
      content = json.loads(found.value)
    except (ValueError, RecursionError):
      content = {}
    return content if isinstance(content, dict) else {}, found.stamp.generation

  def _put(self, content: dict[str, Any], generation: bytes) -> bool:
    """Writes the object if it is still of a generation."""
    mark = secrets.token_hex(8)
    self._store.write("claim", json.dumps(content | {"mark": mark}), if_equal=generation).result()
    written, _ = self._get()
    return written is not None and written.get("mark") == mark

  def names(self) -> list[str]:
    """The name of the claim in force, if there is one; the others are not kept."""
    content, _ = self._get()
    return [] if content is None else [f"claim.{_stored_number(content)}"]

  def newest(self) -> str | None:
    """The claim with the highest number."""
    return next(iter(self.names()), None)

  def exists(self, name: str) -> bool:
    content, _ = self._get()
    return content is not None and _stored_number(content) >= _number(name)

  def read(self, name: str) -> str:
    content, _ = self._get()
    if content is None:
      raise FileNotFoundError(name)
    return json.dumps(content)

  def create(self, name: str, text: str) -> bool:
    """Puts a claim in force after the one before it; False if another has been put in force meanwhile."""
    content, generation = self._get()
    if content is not None and _stored_number(content) != _number(name) - 1:
      return False
    return self._put(json.loads(text) | {"number": _number(name)}, generation)

  def replace(self, name: str, text: str) -> None:
    """Replaces the text of a claim, if it is still in force."""
    content, generation = self._get()
    if content is None or _stored_number(content) != _number(name):
      raise FileNotFoundError(name)
    self._put(json.loads(text) | {"number": _number(name)}, generation)

  def touch(self, name: str) -> None:
    """Writes the claim anew with a number that changes."""
    self._beats += 1
    content, generation = self._get()
    if content is None or _stored_number(content) != _number(name):
      raise FileNotFoundError(name)
    self._put(content | {"beats": self._beats}, generation)

  def stamp(self, name: str) -> Any:
    """What changes with each `touch`; None if there is no such object."""
    content, _ = self._get()
    return None if content is None else json.dumps(content)

  def remove(self, name: str) -> None:
    """Does nothing: there is one object."""


def _stored_number(content: dict[str, Any]) -> int:
  """The number of the claim that an object holds; 0 if it is none."""
  number = content.get("number")
  return number if isinstance(number, int) and number >= 0 else 0


def _store(folder: str | os.PathLike) -> _LocalStore | _RemoteStore:
  path = epath.Path(folder)
  return _RemoteStore(path) if "://" in os.fspath(folder) else _LocalStore(path)


def _number(name: str) -> int:
  return int(name.removeprefix("claim."))


def _read(store: _LocalStore | _RemoteStore, name: str) -> dict[str, Any]:
  """The content of a claim; empty while it is being written, if its writer died, or if it is none."""
  try:
    found = json.loads(store.read(name))
  except (ValueError, OSError, RecursionError):
    return {}
  kinds = {"host": str, "pid": int, "started": (str, type(None)), "released": bool}
  whole = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items()) and found["pid"] > 0
  return found if whole else {}


@functools.cache
def _host() -> str:
  return f"{socket.gethostname()} {_machine()}"


def _identity() -> dict[str, Any]:
  return {"host": _host(), "pid": os.getpid(), "started": process_start(os.getpid())}


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
  except (ProcessLookupError, OverflowError):
    return None
  except PermissionError:
    pass
  return None if pathlib.Path("/proc/self").exists() else "unknown"

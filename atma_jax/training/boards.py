"""Where metrics go: JSON lines, TensorBoard files and Weights & Biases, behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import errno
import importlib.util
import json
import math
import os
import pathlib
import re
import secrets
import struct
import sys
import time
from typing import Any, Protocol

from etils import epath

from atma_jax.checkpoints.steps import is_remote
from atma_jax.errors import RunError, UserError, described

_PROJECT = re.compile(r"[^/\\#?%:\x00-\x1f]{1,128}")  # what Weights & Biases takes


class Board(Protocol):
  """A place that takes records of metrics.

  Attributes:
    place: what messages call it.
  """

  place: str

  def write(self, step: int, now: float, numbers: Mapping[str, float]) -> None:
    """Takes the numbers of a step at a time (seconds since 1970), whole or not at all; raises `OSError` if it cannot."""

  def close(self) -> None:
    """Ends it; raises `OSError` if something that was written is lost."""


class GrowingFile:
  """A file that grows by whole pieces or not at all, and never holds one back."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._file = path.open("ab", buffering=0)

  def append(self, content: bytes) -> None:
    """Writes `content` to the end; raises `OSError` after which the file is as it was before."""
    size = os.fstat(self._file.fileno()).st_size
    try:
      left = memoryview(content)
      while left:
        left = left[self._file.write(left):]
    except OSError:
      with contextlib.suppress(OSError):
        self._file.truncate(size)
      raise

  def close(self) -> None:
    with contextlib.suppress(OSError):  # nothing is buffered here
      self._file.close()


class JSONLines:
  """A `Board` that writes one JSON object a line; numbers that are not finite become null, as JSON has no word for them."""

  def __init__(self, path: pathlib.Path):
    """Opens the file, to append to it; raises `OSError`."""
    self.place, self._file = str(path), GrowingFile(path)

  def write(self, step: int, now: float, numbers: Mapping[str, float]) -> None:
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    self._file.append((json.dumps({"step": step, "time": round(now, 3), **finite}) + "\n").encode())

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """A `Board` that writes TensorBoard's event files."""

  def __init__(self, path: pathlib.Path, first_step: int):
    """Opens the file, whose head lets TensorBoard forget what an interrupted run wrote past `first_step`; raises `OSError`."""
    with _hidden("torch"):  # tensorboardX imports it where it is installed, which takes seconds and is of no use here
      from tensorboardX import summary
      from tensorboardX.proto import event_pb2
      from tensorboardX.record_writer import masked_crc32c
    self._events: Any = event_pb2  # its classes are made when it is imported, which type checkers do not see
    self._scalar, self._checksum = summary.scalar, masked_crc32c
    self.place, self._file = str(path), GrowingFile(path)
    now, session = time.time(), self._events.SessionLog(status=self._events.SessionLog.START)
    self._head = self._framed(self._events.Event(wall_time=now, file_version="brain.Event:2"))  # that is not written yet
    self._head += self._framed(self._events.Event(wall_time=now, step=first_step, session_log=session))
    with contextlib.suppress(OSError):  # then the first record brings it along, and says so if it cannot
      self._append(b"")

  def write(self, step: int, now: float, numbers: Mapping[str, float]) -> None:
    events = (self._events.Event(wall_time=now, step=step, summary=self._scalar(*number)) for number in numbers.items())
    self._append(b"".join(map(self._framed, events)))

  def close(self) -> None:
    self._file.close()

  def _append(self, content: bytes) -> None:
    self._file.append(self._head + content)
    self._head = b""

  def _framed(self, event: Any) -> bytes:
    """An event as TensorBoard's files hold it: length and content, each with its checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join((length, struct.pack("<I", self._checksum(length)), content, struct.pack("<I", self._checksum(content))))


class WeightsAndBiases:
  """A `Board` that writes to a run of Weights & Biases, which goes on when training does."""

  def __init__(self, project: str, workdir: epath.Path, name: str, config: Mapping[str, Any]):
    """Starts the run, or goes on with the one whose name ``WORKDIR/wandb_run`` holds.

    Args:
      project: of Weights & Biases.
      workdir: of the training run.
      name: of the run.
      config: shown beside it.

    Raises:
      UserError: wandb is not installed, or takes no such project.
      RunError: wandb cannot start a run.
    """
    check_project(project)
    import wandb  # of the extra wandb
    self.place = f"Weights & Biases ({project})"
    try:
      file = workdir / "wandb_run"
      if not file.exists():
        file.write_text(secrets.token_hex(8))
      folder = None if is_remote(workdir) or "WANDB_DIR" in os.environ else str(workdir)  # None leaves it to wandb
      self._run: Any = wandb.init(project=project, name=name, config=dict(config), id=file.read_text().strip(), resume="allow",
                                  dir=folder, settings={"console": "off"})
    except Exception as error:  # of its own kinds
      raise RunError(f"--wandb={project}: no run could be started: {described(error)}; WANDB_MODE=offline needs no connection"
                     ) from error

  def write(self, step: int, now: float, numbers: Mapping[str, float]) -> None:
    with _as_os_error():
      self._run.log({"time": now, **numbers}, step=step)

  def close(self) -> None:
    with _as_os_error():
      self._run.finish()


def check_project(project: str) -> None:
  """Raises `UserError` if wandb is not installed, or the name of a project is not legal."""
  if not _PROJECT.fullmatch(project):
    raise UserError(f"--wandb={project[:200]}: must be the name of a project: 1 to 128 letters without / \\ # ? % :")
  if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
    raise UserError(f"--wandb={project}: wandb is not installed: pip install 'atma_jax[wandb]'")


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
  """Makes the import of a module fail as if it were not installed, unless it has been imported."""
  if module in sys.modules:
    yield
    return
  sys.modules[module] = None  # type: ignore[assignment]
  try:
    yield
  finally:
    del sys.modules[module]


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  """Turns whatever a library raises into an `OSError` of one line."""
  try:
    yield
  except Exception as error:
    raise OSError(errno.EIO, described(error)) from error

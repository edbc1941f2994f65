"""Metrics to the boards (`atma_jax.training.boards`) and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import errno
import json
import os
import pathlib
import socket
import tempfile
import time
from typing import Any

from absl import logging
from etils import epath

from atma_jax.checkpoints.steps import is_remote
from atma_jax.errors import UserError, described
from atma_jax.training.boards import Board, JSONLines, TensorBoard

_RECORDS = "metrics.jsonl"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricWriter:
  """Appends records to ``WORKDIR/metrics.jsonl``, to the TensorBoard files in ``WORKDIR/tensorboard`` and to other boards.

  A record that cannot be written (the disk is full) is counted, the first one is reported, and nothing waits for it. Files under
  a remote WORKDIR (``gs://...``) cannot grow; there they are kept on this machine and copied at every `flush`.

  Attributes:
    failed_writes: records and copies that could not be written.
    last_record: the last record of the goodput of the run that this one goes on from, or None.
  """

  def __init__(self, workdir: epath.Path, *, first_step: int, active: bool, board: Callable[[], Board] | None = None):
    """Opens the files and drops the records past `first_step`, which this run writes again.

    Args:
      workdir: the directory of the run.
      first_step: the step that the run goes on from.
      active: False in all processes but one, which then write nothing.
      board: opens one more board to write to.

    Raises:
      UserError: a file of the name of a folder, or the like, stands in the way.
    """
    self.failed_writes = 0
    self.last_record: dict[str, Any] | None = None
    self._boards: list[Board | None] = []  # None for one that had no room
    self._scratch: tempfile.TemporaryDirectory[str] | None = None
    self._remote = self._folder = workdir
    self._active = active
    if not active:
      return
    if is_remote(workdir):
      self._scratch = tempfile.TemporaryDirectory(prefix="atma_jax-metrics-")
      self._folder = epath.Path(self._scratch.name)
      if (self._remote / _RECORDS).exists():
        (self._remote / _RECORDS).copy(self._folder / _RECORDS)
    folder = pathlib.Path(self._folder)
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"

    def records(path: pathlib.Path) -> Board:
      self.last_record = _drop_after(path, first_step)
      return JSONLines(path)

    def events(path: pathlib.Path) -> Board:
      path.parent.mkdir(exist_ok=True)
      return TensorBoard(path, first_step)

    self._boards = [self._open(folder / _RECORDS, records), self._open(folder / "tensorboard" / name, events)]
    if board is not None:
      self._boards.append(board())

  def __enter__(self) -> MetricWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _open(self, path: pathlib.Path, make: Callable[[pathlib.Path], Board]) -> Board | None:
    """Opens a board; None if there is no room for it."""
    try:
      return make(path)
    except OSError as error:
      if error.errno not in _NO_ROOM:
        raise UserError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error
      self._failed(path, error)
      return None

  def _failed(self, path: os.PathLike[str] | str, error: Exception) -> None:
    if not self.failed_writes:
      reason = getattr(error, "strerror", None) or described(error)
      logging.error("metrics cannot be written to %s: %s; training goes on, and what is lost is counted", path, reason)
    self.failed_writes += 1

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes one record to every board; values of None are left out."""
    if not self._active:
      return
    numbers, now = {name: value for name, value in values.items() if value is not None}, time.time()
    for board in self._boards:
      if board is None:
        self.failed_writes += 1
        continue
      try:
        board.write(step, now, numbers)
      except OSError as error:
        self._failed(board.place, error)

  def flush(self) -> None:
    """Copies what was written to a remote WORKDIR; after a failure the next flush copies everything."""
    if self._scratch is None:
      return
    try:
      for file in (self._folder / _RECORDS, *(self._folder / "tensorboard").iterdir()):
        target = self._remote / file.relative_to(self._folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.copy(target, overwrite=True)
    except Exception as error:  # cloud file systems raise errors of their own
      self._failed(self._remote, error)

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self.flush()
      for board in filter(None, self._boards):
        try:
          board.close()
        except OSError as error:
          self._failed(board.place, error)
      if self.failed_writes:
        logging.error("%d records of metrics could not be written to %s", self.failed_writes, self._remote)
    self._active = False


def log_progress(step: int, total: int, values: Mapping[str, Any]) -> None:
  """Logs one line: loss, gradient norm, speed and the time left.

  Args:
    step: the step that the values are of.
    total: steps of the run.
    values: the record of `MetricWriter.write`; ``mfu`` may be None.
  """
  mfu = "" if values["mfu"] is None else f"  MFU {values['mfu']:.1%}"
  logging.info("step %d/%d  loss %.4f  |g| %.3g  %s tokens/s%s  data wait %.1f%%  ETA %s", step, total, values["loss"],
               values["grad_norm"], f"{values['tokens_per_second']:,.0f}", mfu, 100 * values["data_wait"],
               _duration((total - step) * values["seconds_per_step"]))


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"


def _drop_after(path: pathlib.Path, step: int) -> dict[str, Any] | None:
  """Removes the records past the step that a run resumes from, and a line cut off by a kill, so that none is written twice.

  Lines that are no records are moved to ``metrics.jsonl.foreign``. Returns the last record that stays and holds the
  goodput, from which a run that goes on counts.
  """
  if not path.exists():
    return None
  if not path.is_file():
    raise OSError(errno.EISDIR, "it is not a regular file", str(path))
  content = path.read_bytes()
  kept, foreign, last = [], [], None
  for line in content.splitlines(keepends=True):
    record = parse_record(line)
    if record is not None and record["step"] <= step:
      kept.append(line if line.endswith(b"\n") else line + b"\n")
      last = record if "goodput" in record else last
    elif record is None and line.strip() and line.endswith(b"\n"):  # otherwise cut off
      foreign.append(line)
  if foreign:
    aside = path.with_name(path.name + ".foreign")
    with aside.open("ab") as file:
      file.writelines(foreign)
    logging.warning("%s: %d lines are no records of this program; they were moved to %s", path, len(foreign), aside.name)
  if content.startswith(b"".join(kept)):  # as a rule; takes no room
    os.truncate(path, sum(map(len, kept)))
    return last
  temporary = path.with_suffix(".tmp")
  temporary.write_bytes(b"".join(kept))
  os.replace(temporary, path)
  return last


def parse_record(line: bytes) -> dict[str, Any] | None:
  """A line of ``metrics.jsonl``, or None if it is not one: an object with a whole number ``step``."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  whole = isinstance(record, dict) and isinstance(record.get("step"), int) and not isinstance(record["step"], bool)
  return record if whole else None


def read_records(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """The records of a ``metrics.jsonl``, and how many of its lines are none. Raises `OSError`."""
  lines = [parse_record(line) for line in path.read_bytes().splitlines()]
  records = [record for record in lines if record is not None]
  return records, len(lines) - len(records)

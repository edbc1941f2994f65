"""Metrics to JSON lines, TensorBoard files and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
import json
import math
import os
import pathlib
import tempfile
import time
from typing import Any, TextIO

from absl import logging
from etils import epath
import tensorboardX

from atma_jax.checkpoints.steps import is_remote

_RECORDS = "metrics.jsonl"


class MetricWriter:
  """Appends records to ``WORKDIR/metrics.jsonl`` and to the TensorBoard files in ``WORKDIR/tensorboard``.

  Files under a remote WORKDIR (``gs://...``) cannot grow; there they are kept on this machine and copied at every `flush`.
  """

  def __init__(self, workdir: epath.Path, *, first_step: int, active: bool):
    """Opens the files and drops the records past `first_step`, which this run writes again.

    Args:
      workdir: the directory of the run.
      first_step: the step that the run goes on from.
      active: False in all processes but one, which then write nothing.
    """
    self._file: TextIO | None = None
    self._board: tensorboardX.SummaryWriter | None = None
    self._scratch: tempfile.TemporaryDirectory[str] | None = None
    self._remote = self._folder = workdir
    if not active:
      return
    if is_remote(workdir):
      self._scratch = tempfile.TemporaryDirectory(prefix="atma_jax-metrics-")
      self._folder = epath.Path(self._scratch.name)
      if (self._remote / _RECORDS).exists():
        (self._remote / _RECORDS).copy(self._folder / _RECORDS)
    path = pathlib.Path(self._folder / _RECORDS)
    _drop_after(path, first_step)
    self._file = path.open("a", buffering=1)  # line by line
    self._board = tensorboardX.SummaryWriter(str(self._folder / "tensorboard"), purge_step=first_step)

  def __enter__(self) -> MetricWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes one record; values of None are left out, those that are not finite become null, as JSON has no word for them."""
    if self._file is None or self._board is None:
      return
    numbers = {name: value for name, value in values.items() if value is not None}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
    for name, value in numbers.items():
      self._board.add_scalar(name, value, step)

  def flush(self) -> None:
    """Copies what was written to a remote WORKDIR; a failure is logged, and the next flush copies everything."""
    if self._scratch is None or self._board is None:
      return
    self._board.flush()
    try:
      for file in (self._folder / _RECORDS, *(self._folder / "tensorboard").iterdir()):
        target = self._remote / file.relative_to(self._folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.copy(target, overwrite=True)
    except Exception as error:  # cloud file systems raise errors of their own
      logging.warning("metrics could not be copied to %s: %s", self._remote, error)

  def close(self) -> None:
    """Closes the files and flushes them."""
    if self._file is not None and self._board is not None:
      self._file.close()
      self._board.close()
      self.flush()
      self._file = None


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


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Removes the records past the step that a run resumes from, and a line cut off by a kill, so that none is written twice."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    if record["step"] <= step:
      kept.append(line)
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(line + "\n" for line in kept))
  os.replace(temporary, path)

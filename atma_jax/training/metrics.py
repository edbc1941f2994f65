"""Metrics to JSON lines, TensorBoard files and the terminal."""

from __future__ import annotations

import json
import math
import os
import pathlib
import tempfile
import time

from absl import logging
from etils import epath
import tensorboardX

_RECORDS = "metrics.jsonl"


class MetricWriter:
  """Appends records to ``WORKDIR/metrics.jsonl`` and ``WORKDIR/tensorboard``; silent in other processes than the first.

  Under a remote WORKDIR (``gs://...``) files cannot grow: they are kept on this machine and copied at every `flush`.
  """

  def __init__(self, workdir: epath.Path, *, first_step: int, active: bool):
    self._file = self._board = self._scratch = None
    if not active:
      return
    self._remote = workdir if "://" in str(workdir) else None
    if self._remote is not None:
      self._scratch = tempfile.TemporaryDirectory(prefix="atma_jax-metrics-")
      workdir = epath.Path(self._scratch.name)
      if (self._remote / _RECORDS).exists():
        (self._remote / _RECORDS).copy(workdir / _RECORDS)
    self._folder = workdir
    _drop_after(pathlib.Path(workdir / _RECORDS), first_step)
    self._file = pathlib.Path(workdir / _RECORDS).open("a", buffering=1)  # noqa: SIM115, closed by `close`
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

  def __enter__(self) -> MetricWriter:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, step: int, values: dict[str, float]) -> None:
    """One record; None values are left out, those that are not finite are null (JSON has no word for them)."""
    if self._file is None:
      return
    values = {name: value for name, value in values.items() if value is not None}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def flush(self) -> None:
    """Brings what was written to a remote WORKDIR; a failure is told, and the next flush brings it all."""
    if self._scratch is None:
      return
    self._board.flush()
    try:
      for file in (self._folder / _RECORDS, *(self._folder / "tensorboard").iterdir()):
        target = self._remote / file.relative_to(self._folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.copy(target, overwrite=True)
    except Exception as error:  # file systems in the clouds raise errors of their own
      logging.warning("metrics could not be copied to %s: %s", self._remote, error)

  def close(self) -> None:
    """Flushes."""
    if self._file is not None:
      self._file.close()
      self._board.close()
      self.flush()
      self._file = None


def log_progress(step: int, total: int, values: dict[str, float | None]) -> None:
  """One line with an ETA."""
  mfu = "" if values["mfu"] is None else f"  MFU {values['mfu']:.1%}"
  logging.info("step %d/%d  loss %.4f  |g| %.3g  %s tokens/s%s  data wait %.1f%%  ETA %s", step, total, values["loss"],
               values["grad_norm"], f"{values['tokens_per_second']:,.0f}", mfu, 100 * values["data_wait"],
               _duration((total - step) * values["seconds_per_step"]))


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Removes records past the step a run resumes from (and a line cut short by a kill), so that none is written twice."""
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

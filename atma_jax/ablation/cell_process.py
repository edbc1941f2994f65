"""The process of one cell: training, evaluation, and the result."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import os
import pathlib
import signal
import sys
import time
from typing import Any

from absl import logging
import jax

from atma_jax.ablation.sweep import CellFolder, write_json
from atma_jax.ablation.worker import PARENT_VARIABLE
from atma_jax.checkpoints.steps import FOLDER
from atma_jax.claims import Claims, hold
from atma_jax.compilation_cache import use_compilation_cache
from atma_jax.config import DataConfig
from atma_jax.data.manifest import MANIFEST
from atma_jax.data.prepare import prepare
from atma_jax.errors import UserError
from atma_jax.evaluation.api import check_evaluation, evaluate
from atma_jax.models import count_parameters
from atma_jax.training.loop import DONE, train
from atma_jax.training.metrics import read_records


def run_cell(path: str | os.PathLike) -> str:
  """Trains and evaluates the cell of a folder, resuming both, and writes its result.

  Everything is checked before anything is trained. The folder is claimed by the worker that started this process, or else by this
  process itself.

  Returns:
    The outcome of `train`; there is a result only if it is `DONE`.

  Raises:
    UserError: there is no such cell, another process works on it, or training or evaluation raised it.
  """
  _end_with_worker()
  folder = CellFolder(pathlib.Path(path))
  parent = os.environ.get(PARENT_VARIABLE)
  if parent is not None and parent.isdigit() and Claims().owned_by(folder.path, int(parent)):
    return _run_cell(folder)
  folder.describe()
  claim = hold(folder.path, f"--run_cell={path}")
  try:
    return _run_cell(folder)
  finally:
    claim.release()


def _run_cell(folder: CellFolder) -> str:
  """Does what `run_cell` says in a folder that is claimed."""
  description, config, evaluation = folder.describe(), folder.config(), dataclasses.asdict(folder.evaluation())
  started = time.time()
  use_compilation_cache("auto")  # cells of a sweep share many programs
  _prepare_once(config.data)
  if not (folder.path / FOLDER).exists():
    check_evaluation(config, **evaluation)
  outcome = train(config, str(folder.path), claimed=True)
  if outcome != DONE:
    return outcome
  records = evaluate(folder.path, folder.path / "evaluation", **evaluation)
  write_json(folder.path / "result.json", {
    "schema": description["schema"], "id": folder.id, "labels": description["labels"], "config": config.to_dict(),
    "parameters": count_parameters(config.model), "seconds": round(time.time() - started, 1),
    "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__,
    "training": _training_curves(folder.path / "metrics.jsonl"),
    "measures": [{name: record[name] for name in ("measure", "length", "value", "n", "standard_error", "interval")
                  if name in record} for record in records]})
  logging.info("result: %s", folder.path / "result.json")
  return outcome


def _prepare_once(config: DataConfig) -> None:
  """Prepares the data that cells share, or waits while another cell does."""
  directory = pathlib.Path(config.directory)
  if (directory / MANIFEST).exists():
    return
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      prepare(config, directory)
  except OSError as error:
    raise UserError(f"cannot prepare data in {directory}: {error.strerror or error}") from error


def _training_curves(path: pathlib.Path) -> dict[str, Any]:
  """Training and validation losses by step, and the latest speed."""
  records, foreign = read_records(path)
  if foreign:
    logging.warning("%s: %d lines are no records and were skipped", path, foreign)
  logged = [r for r in records if r.get("loss") is not None]
  validated = [r for r in records if r.get("validation/loss") is not None]
  return {"loss": [[r["step"], r["loss"]] for r in logged],
          "validation": [[r["step"], r["validation/loss"]] for r in validated],
          "tokens_per_second": next((r["tokens_per_second"] for r in reversed(logged) if "tokens_per_second" in r), None)}


def _end_with_worker() -> None:
  """Has the kernel kill this process when its worker dies, so that no cell runs twice; only Linux can.

  Raises:
    UserError: the worker has died already.
  """
  parent = os.environ.get(PARENT_VARIABLE)
  if parent is None:
    return
  if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != int(parent):
    raise UserError("the worker that started this cell is gone")

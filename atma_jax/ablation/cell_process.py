"""What runs in a cell's own process: training, evaluation, the result."""

from __future__ import annotations

import ctypes
import fcntl
import json
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
from atma_jax.config import DataConfig
from atma_jax.data.manifest import MANIFEST
from atma_jax.data.prepare import prepare
from atma_jax.errors import UserError
from atma_jax.evaluation.options import Options
from atma_jax.evaluation.runner import evaluate
from atma_jax.models import count_parameters
from atma_jax.training.loop import DONE, train


def run_cell(path: str | os.PathLike) -> str:
  """Trains and evaluates a cell, resuming both, and writes its result; returns what `train` returned.

  Raises:
    UserError: no such cell, or what training and evaluation raise.
  """
  _end_with_worker()
  folder = CellFolder(pathlib.Path(path))
  description, config = folder.describe(), folder.config()
  started = time.time()
  _prepare_once(config.data)
  outcome = train(config, str(folder.path))
  if outcome != DONE:
    return outcome
  options = description["evaluation"]
  records = evaluate(str(folder.path), str(folder.path / "evaluation"), Options(
    **{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}))
  write_json(folder.path / "result.json", {
    "schema": description["schema"], "id": folder.id, "labels": description["labels"], "config": config.to_dict(),
    "parameters": count_parameters(config.model), "seconds": round(time.time() - started, 1),
    "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__,
    "training": _training(folder.path / "metrics.jsonl"),
    "measures": [{name: record[name] for name in ("measure", "length", "value", "n", "standard_error", "interval")
                  if name in record} for record in records]})
  logging.info("result: %s", folder.path / "result.json")
  return outcome


def _prepare_once(config: DataConfig) -> None:
  """Prepares data that cells share, or waits while another cell does."""
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


def _training(path: pathlib.Path) -> dict[str, Any]:
  """The curves of training and validation, and the last speed."""
  records = [json.loads(line) for line in path.read_text().splitlines()]
  logged = [r for r in records if r.get("loss") is not None]
  validated = [r for r in records if r.get("validation/loss") is not None]
  return {"loss": [[r["step"], r["loss"]] for r in logged],
          "validation": [[r["step"], r["validation/loss"]] for r in validated],
          "tokens_per_second": next((r["tokens_per_second"] for r in reversed(logged) if "tokens_per_second" in r), None)}


def _end_with_worker() -> None:
  """Where Linux allows it, this process is killed with the worker that started it, so that no cell runs twice."""
  parent = os.environ.get(PARENT_VARIABLE)
  if parent is None:
    return
  if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != int(parent):
    raise UserError("the worker that started this cell is gone")

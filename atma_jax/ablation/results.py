"""What a sweep measured, as one long table: a row is one number of one cell.

Columns: ``cell``; one an axis; ``measure``, ``length`` (tokens), ``multiple`` (of the training length), ``value``, ``n``,
``standard_error``, ``low`` and ``high`` (an interval, where evaluation gave one). Besides the measures of evaluation there
are ``train_loss`` (mean of the last tenth of the logged steps) and ``validation_loss`` (the last one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import os
import pathlib
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from atma_jax.ablation.sweep import CellFolder
from atma_jax.errors import UserError

Row = dict[str, Any]
COLUMNS = ("measure", "length", "multiple", "value", "n", "standard_error", "low", "high")
HIGHER_IS_BETTER = ("accuracy", "exact")
SEED = "seed"


def gather(cells: Sequence[CellFolder]) -> tuple[list[str], list[Row], list[dict[str, Any]]]:
  """Names of the axes, the rows, and the results (`result.json`) they come from, of the cells that are done."""
  results = [result for cell in cells if (result := cell.result())]
  axes = list(dict.fromkeys(name for result in results for name in result["labels"]))
  rows = []
  for result in results:
    length = result["config"]["data"]["sequence_length"]
    labels = {name: value_of(name, result["labels"].get(name, "")) for name in axes}
    for measure in _merged([*_training_measures(result, length), *result["measures"]]):
      low, high = measure.get("interval") or (None, None)
      rows.append({"cell": result["id"], **labels, "measure": measure["measure"], "length": measure["length"],
                   "multiple": measure["length"] / length, "value": measure["value"], "n": measure.get("n"),
                   "standard_error": measure.get("standard_error"), "low": low, "high": high})
  return axes, rows, results


def value_of(axis: str, label: str) -> str:
  """A label without its axis: ``reg-weak`` -> ``weak``."""
  return label.removeprefix(f"{axis}-")


def better(measure: str) -> int:
  """+1 where a higher value of `measure` is better, else -1."""
  return 1 if measure.endswith(HIGHER_IS_BETTER) else -1


def write_table(rows: Sequence[Row], axes: Sequence[str], directory: pathlib.Path) -> list[pathlib.Path]:
  """``results.jsonl``, ``results.parquet`` and ``results.csv`` with the same rows."""
  types = {"cell": pa.string(), **{name: pa.string() for name in axes}, "measure": pa.string(), "length": pa.int64(),
           "n": pa.int64()}
  schema = pa.schema([(name, types.get(name, pa.float64())) for name in ("cell", *axes, *COLUMNS)])
  table = pa.Table.from_pylist(list(rows), schema=schema)
  return [write_file(directory / "results.jsonl", lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows))),
          write_file(directory / "results.parquet", lambda p: parquet.write_table(table, p)),
          write_file(directory / "results.csv", lambda p: csv.write_csv(table, p))]


def write_text(path: pathlib.Path, text: str) -> pathlib.Path:
  """Writes a whole file or nothing."""
  return write_file(path, lambda p: p.write_text(text))


def write_file(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> pathlib.Path:
  """`path`, once `write` has written a temporary file that is renamed to it; workers may write the same one at once."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    write(temporary)
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f"--output: cannot write {path}: {error.strerror or error}") from error
  return path


def _merged(measures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """One a measure and length: of several (the depths of a retrieval grid) the mean, without an interval."""
  groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
  for measure in measures:
    groups.setdefault((measure["measure"], measure["length"]), []).append(measure)
  found = []
  for (name, length), group in groups.items():
    values = [m["value"] for m in group if m["value"] is not None]
    mean = sum(values) / len(values) if len(values) == len(group) else None
    found.append(group[0] if len(group) == 1 else {"measure": name, "length": length, "value": mean,
                                                   "n": sum(m["n"] for m in group)})
  return found


def _training_measures(result: dict[str, Any], length: int) -> list[dict[str, Any]]:
  found = []
  losses = [loss for _, loss in result["training"]["loss"]]
  if losses:
    last = losses[-max(1, len(losses) // 10):]
    found.append({"measure": "train_loss", "length": length, "value": sum(last) / len(last), "n": len(last)})
  if result["training"]["validation"]:
    found.append({"measure": "validation_loss", "length": length, "value": result["training"]["validation"][-1][1], "n": 1})
  return found

"""The results of a sweep as one long table, in which a row is one number of one cell.

Columns: ``cell``; one per axis; ``measure``, ``length`` (tokens), ``multiple`` (of the training length), ``value``, ``n``,
``standard_error``, and ``low`` and ``high`` (the interval, if the evaluation gave one). Besides the measures of the evaluation
there are ``train_loss`` (mean over the last tenth of the logged steps) and ``validation_loss`` (the last one).
"""

from __future__ import annotations

from collections.abc import Sequence
import io
import json
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from atma_jax.ablation.sweep import CellFolder
from atma_jax.config import AT_LEAST_1
from atma_jax.data.manifest import COUNT
from atma_jax.errors import UserError
from atma_jax.json_input import mismatch

Row = dict[str, Any]
COLUMNS = ("measure", "length", "multiple", "value", "n", "standard_error", "low", "high")
HIGHER_IS_BETTER = ("accuracy", "exact")  # endings of the names of such measures
SEED = "seed"


def read_results(cells: Sequence[CellFolder]) -> tuple[list[dict[str, Any]], list[str]]:
  """Contents of ``result.json`` of the cells that are done, and what is wrong with those that are damaged, which are left out."""
  results, problems = [], []
  for cell in cells:
    try:
      result = cell.result()
      problem = _problem(result, cell.id) if result is not None else ""
    except UserError as error:
      result, problem = None, str(error)
    if problem:
      problems.append(f"{cell.path / 'result.json'}: {problem}")
    elif result is not None:
      results.append(result)
  return results, problems


def gather(cells: Sequence[CellFolder]) -> tuple[list[str], list[Row], list[dict[str, Any]]]:
  """Names of the axes, rows of the table, and contents of ``result.json``, of the cells that are done."""
  results, _ = read_results(cells)
  axes = list(dict.fromkeys(name for result in results for name in result["labels"]))
  rows = []
  for result in results:
    length = result["config"]["data"]["sequence_length"]
    labels = {name: result["labels"].get(name, "").removeprefix(f"{name}-") for name in axes}  # reg-weak -> weak
    for measure in _merge_settings([*_training_measures(result, length), *result["measures"]]):
      low, high = measure.get("interval") or (None, None)
      rows.append({"cell": result["id"], **labels, "measure": measure["measure"], "length": measure["length"],
                   "multiple": measure["length"] / length, "value": measure["value"], "n": measure.get("n"),
                   "standard_error": measure.get("standard_error"), "low": low, "high": high})
  return axes, rows, results


_NUMBER = (int, float)
_SCHEMA: dict[str, Any] = {
  "id": str, "labels": {}, "parameters": COUNT, "hardware": str,
  "config": {"data": {"sequence_length": AT_LEAST_1, "batch_size": AT_LEAST_1}, "train": {"steps": COUNT}},
  "training": {"loss": [list], "validation": [list]}, "measures": [{"measure": str, "length": COUNT}]}


def _problem(result: dict[str, Any], cell: str) -> str:
  """What keeps a result from being reported, or ""."""
  problem = mismatch(result, _SCHEMA)
  if problem:
    return problem
  if result["id"] != cell:
    return f"it is of cell {result['id'][:80]!r}"
  if not all(isinstance(label, str) for label in result["labels"].values()):
    return "labels are no texts"
  for name in ("loss", "validation"):
    if not all(len(pair) == 2 and isinstance(pair[0], int) and _is_number(pair[1]) for pair in result["training"][name]):
      return f"training.{name} is no list of pairs of numbers"
  for measure in result["measures"]:
    interval = measure.get("interval")
    if not (_is_number(measure.get("value")) or ("value" in measure and measure["value"] is None)):
      return f"{measure['measure'][:40]!r} has no value"
    if not (interval is None or (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)))):
      return f"{measure['measure'][:40]!r} has an interval of another kind"
    if not all(measure.get(name) is None or _is_number(measure[name]) for name in ("n", "standard_error")):
      return f"{measure['measure'][:40]!r} has an n or standard_error that is no number"
    if not isinstance(measure.get("n", 0), (int, type(None))):
      return f"{measure['measure'][:40]!r} has an n that is no whole number"
  return ""


def _is_number(value: Any) -> bool:
  return isinstance(value, _NUMBER) and not isinstance(value, bool) and abs(value) < 1e30


def better_sign(measure: str) -> int:
  """+1 if higher values of `measure` are better, else -1."""
  return 1 if measure.endswith(HIGHER_IS_BETTER) else -1


def table_files(rows: Sequence[Row], axes: Sequence[str]) -> dict[str, bytes]:
  """The rows as the contents of ``results.jsonl``, ``results.parquet`` and ``results.csv``."""
  types = {"cell": pa.string(), **{name: pa.string() for name in axes}, "measure": pa.string(), "length": pa.int64(),
           "n": pa.int64()}
  schema = pa.schema([(name, types.get(name, pa.float64())) for name in ("cell", *axes, *COLUMNS)])
  table = pa.Table.from_pylist(list(rows), schema=schema)
  as_parquet, as_csv = io.BytesIO(), io.BytesIO()
  parquet.write_table(table, as_parquet)
  csv.write_csv(table, as_csv)
  return {"results.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(), "results.parquet": as_parquet.getvalue(),
          "results.csv": as_csv.getvalue()}


def _merge_settings(measures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """One entry per measure and length: of several settings, such as the depths of a haystack, the mean without an interval."""
  groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
  for measure in measures:
    groups.setdefault((measure["measure"], measure["length"]), []).append(measure)
  merged = []
  for (name, length), group in groups.items():
    values = [m["value"] for m in group if m["value"] is not None]
    mean = sum(values) / len(values) if len(values) == len(group) else None
    merged.append(group[0] if len(group) == 1 else {"measure": name, "length": length, "value": mean,
                                                    "n": sum(m.get("n") or 0 for m in group)})
  return merged


def _training_measures(result: dict[str, Any], length: int) -> list[dict[str, Any]]:
  """The losses of training and validation as measures at the training length."""
  measures = []
  losses = [loss for _, loss in result["training"]["loss"]]
  if losses:
    last = losses[-max(1, len(losses) // 10):]
    measures.append({"measure": "train_loss", "length": length, "value": sum(last) / len(last), "n": len(last)})
  if result["training"]["validation"]:
    measures.append({"measure": "validation_loss", "length": length, "value": result["training"]["validation"][-1][1], "n": 1})
  return measures

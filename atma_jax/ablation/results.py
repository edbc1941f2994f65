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

Row = dict[str, Any]
COLUMNS = ("measure", "length", "multiple", "value", "n", "standard_error", "low", "high")
HIGHER_IS_BETTER = ("accuracy", "exact")  # endings of the names of such measures
SEED = "seed"


def gather(cells: Sequence[CellFolder]) -> tuple[list[str], list[Row], list[dict[str, Any]]]:
  """Names of the axes, rows of the table, and contents of ``result.json``, of the cells that are done."""
  results = [result for cell in cells if (result := cell.result())]
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
                                                    "n": sum(m["n"] for m in group)})
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

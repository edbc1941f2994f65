"""Results on disk: JSON lines that are appended and never rewritten.

One line is one measured number, or, with a status other than "ok", one that could not be had. Lines of a cell (what is
computed together) are appended in one write; a line cut off by a kill is skipped when the file is read, so that its cell
counts as not done.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from absl import logging
import jax

from atma_jax.errors import UserError

SCHEMA = 1
# Fields that only some records have; without one means without it, not with any.
VARIANTS = ("ema", "window", "null_length", "count_length")


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One number: `value` over `n` samples at a context of `length` tokens, with a standard error or an interval.

  `layer` and `head`, counted from 0, say where in the model it was measured; `outlier`, whether it stands out by the rule of
  its suite.
  """

  measure: str
  length: int
  value: float
  n: int
  standard_error: float | None = None
  interval: tuple[float, float] | None = None
  bins: Sequence[dict[str, Any]] | None = None  # of a curve over positions, of a distribution, or one a head
  layer: int | None = None
  head: int | None = None
  outlier: bool | None = None


def parse_records(content: bytes, path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file's content that are of this schema; damaged lines are reported and skipped."""
  records = []
  for number, line in enumerate(content.splitlines(), 1):
    try:
      record = json.loads(line) if line.strip() else None
    except ValueError:
      logging.warning("%s:%d is cut off or damaged: skipped", path, number)
      continue
    if isinstance(record, dict) and record.get("schema") == SCHEMA:
      records.append(record)
  return records


class ResultsFile:
  """``results.jsonl``: the records of every run that named this file. Of several processes only the first writes it."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._writes = jax.process_index() == 0
    if not self._writes:
      self.records = []
      return
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(path, "a+b") as file:  # shows now, not after the first cell, whether it can be written
        file.seek(0)
        content = file.read()
    except OSError as error:
      raise UserError(f"--output: cannot write {path}: {error.strerror or error}") from error
    self._ends_in_newline = content.endswith(b"\n") or not content
    self.records = parse_records(content, path)

  def find(self, identity: dict[str, Any], measure: str, length: int, layer: int | None = None,
           head: int | None = None) -> dict[str, Any] | None:
    """The latest record of `measure` at `length` whose fields equal those of `identity`; None where there is none."""
    wanted = {**dict.fromkeys(VARIANTS), **identity, "measure": measure, "length": length}
    return next((r for r in reversed(self.records) if all(r.get(k) == v for k, v in wanted.items())
                 and r.get("layer") == layer and r.get("head") == head), None)

  def append(self, records: Sequence[dict[str, Any]]) -> None:
    """Adds the records of one cell and syncs them to disk. Numbers that are not finite are written as null."""
    records = [_json_ready({"schema": SCHEMA, **record}) for record in records]
    self.records += records
    if not self._writes:
      return
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    try:
      with open(self.path, "ab") as file:
        file.write((text if self._ends_in_newline else "\n" + text).encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      raise UserError(f"--output: cannot write {self.path}: {error.strerror or error}") from error
    self._ends_in_newline = True


def _json_ready(value: Any) -> Any:
  """`value` as it reads back from JSON: tuples as lists, non-finite numbers as None."""
  if isinstance(value, dict):
    return {key: _json_ready(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_json_ready(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value

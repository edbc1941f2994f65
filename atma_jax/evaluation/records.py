"""Results on disk: JSON lines that are appended and never rewritten.

Every line is one measured number or, with a status other than "ok", one that could not be measured. The lines of a cell
(see `atma_jax.evaluation.suite.Cell`) are appended in a single write. A line cut off by a kill is skipped when the file is
read, so its cell counts as not done. This module imports no JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from absl import logging

from atma_jax.checkpoints.overrides import RECORDED
from atma_jax.config import INT32, within
from atma_jax.errors import UserError
from atma_jax.json_input import left_out, mismatch, parse_lines

SCHEMA = 1
# Fields that only the records of modified models have; a record without one was measured without the modification.
VARIANT_FIELDS = ("ema", *RECORDED)

Record = dict[str, Any]

_NUMBER, _COUNT = within(-1e30, 1e30), within(0, INT32)  # larger numbers than these are none that an evaluation measures
_SCALAR = (bool, str, _NUMBER, None)
_MEASURED = {
  "measure": str, "length": _COUNT, "value": (_NUMBER, None), "n?": within(0, 1 << 62), "standard_error?": (_NUMBER, None),
  "interval?": ([_NUMBER], None), "bins?": ([dict], None), "layer?": (_COUNT, None), "head?": (_COUNT, None),
  "outlier?": (bool, None), "chance?": (_NUMBER, None), "status?": str, "reason?": str, "seconds?": _NUMBER,
  "program_gib?": _NUMBER, "code?": str, "settings?": dict, **{f"{name}?": _SCALAR for name in VARIANT_FIELDS}}
COMPLETE = {  # what a report needs besides: whose the number is, and on what it was measured
  "checkpoint": str, "step": _COUNT, "name": str, "suite": str, "settings": dict, "n": within(0, 1 << 62), "hardware": str,
  "jax": str, "training_length": within(1, INT32),
  "config": {"model": {"attention": str, "num_layers": _COUNT, "width": _COUNT, "memory": {"enabled": bool}}}}


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One measured number.

  Attributes:
    measure: what was measured.
    length: context length in tokens.
    value: the number.
    n: number of samples.
    standard_error: of `value`, if known.
    interval: 95 % interval of `value`, if known.
    bins: parts of the number: of a curve over positions, quantiles of a distribution, or one entry per head.
    layer, head: where in the model it was measured, counted from 0; None means the whole model, or all heads of a layer.
    outlier: whether it stands out by its suite's own rule.
    chance: what guessing would give, if known.
  """

  measure: str
  length: int
  value: float
  n: int
  standard_error: float | None = None
  interval: tuple[float, float] | None = None
  bins: Sequence[dict[str, Any]] | None = None
  layer: int | None = None
  head: int | None = None
  outlier: bool | None = None
  chance: float | None = None


def is_ok(record: Record) -> bool:
  """Whether a record holds a measured number; records older than the field `status` always do."""
  return record.get("status", "ok") == "ok"


def parse_records(content: bytes, path: pathlib.Path,
                  problem: Callable[[Record], str | None] = lambda record: None) -> tuple[list[Record], str]:
  """The records of this schema in the content of the file `path`.

  Args:
    content: of the file.
    path: of the file, for the log.
    problem: what else may keep a record from being used.

  Returns:
    The good records, and a line that counts the malformed ones, which is logged; "" if there are none.
  """
  def wrong(record: Any) -> str | None:
    if isinstance(record, dict) and isinstance(record.get("schema"), int) and record["schema"] != SCHEMA:
      return None  # of another version: not malformed, and left out below
    return problem_of(record) or problem(record)

  records, notes = parse_lines(content, wrong)
  line = left_out(path, records, notes)
  if line:
    logging.warning("%s", line)
  return [record for record in records if record.get("schema") == SCHEMA], line


def problem_of(record: Any) -> str | None:
  """What keeps a record from being one, such as a field of another type; None if nothing does."""
  if problem := mismatch(record, _MEASURED):
    return problem
  interval = record.get("interval")
  if interval is not None and len(interval) != 2:
    return f"field 'interval' has {len(interval)} bounds, must have 2"
  for name, value in record.get("settings", {}).items():
    if mismatch(value, (*_SCALAR, [_SCALAR], dict)):
      return f"field 'settings'.{name} is no plain value"
  return None


class ResultsFile:
  """``results.jsonl``: the records of every evaluation that was given this file.

  Args:
    path: the file; it and its folder are created if missing.
    writes: False in all processes but one, which then neither read nor write the file.

  Raises:
    UserError: the file cannot be written.
  """

  def __init__(self, path: pathlib.Path, writes: bool = True):
    self.path = path
    self.records: list[Record] = []
    self._writes = writes
    if not writes:
      return
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(path, "a+b") as file:  # a file that cannot be written fails now, not after the first cell
        file.seek(0)
        content = file.read()
    except OSError as error:
      raise UserError(f"--output: cannot write {path}: {error.strerror or error}") from error
    self._ends_in_newline = content.endswith(b"\n") or not content
    self.records, _ = parse_records(content, path)

  def find(self, identity: dict[str, Any], measure: str, length: int, layer: int | None = None,
           head: int | None = None) -> Record | None:
    """The latest record of a measurement whose fields equal those of `identity`, or None."""
    wanted = {**dict.fromkeys(VARIANT_FIELDS), **identity, "measure": measure, "length": length, "layer": layer, "head": head}
    return next((r for r in reversed(self.records) if all(r.get(name) == value for name, value in wanted.items())), None)

  def append(self, records: Sequence[Record]) -> None:
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
  """`value` as JSON gives it back: tuples become lists, numbers that are not finite become None."""
  if isinstance(value, dict):
    return {key: _json_ready(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_json_ready(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value

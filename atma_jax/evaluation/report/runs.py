"""Records grouped by what was evaluated: the input of the report's sections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import pathlib
from typing import Any

from atma_jax.checkpoints.overrides import OVERRIDES
from atma_jax.evaluation.records import VARIANT_FIELDS, Record
from atma_jax.evaluation.report.drawing import plain
from atma_jax.evaluation.suite import Suite

POSITION_FIELDS = ("layer", "head")


@dataclasses.dataclass
class Run:
  """The latest record of every measurement of one checkpoint step, evaluated in one way.

  Attributes:
    label: tells the run apart from all others of the report.
    records: in the order in which they were measured.
  """

  label: str
  records: list[Record]

  def select(self, measure: str, **settings: Any) -> list[Record]:
    """The records of a measure that have these cell settings."""
    return [r for r in self.records if r["measure"] == measure
            and all(r["settings"].get(name) == value for name, value in settings.items())]


def group_runs(records: Iterable[Record], suites: dict[str, Suite]) -> list[Run]:
  """Groups records into runs, in the order of their first record.

  What was measured more than once, with whatever options, is represented by its latest record. Models that were loaded with
  overrides, under a retention cap or with averaged weights are runs of their own.

  Args:
    records: of any number of files.
    suites: by name; they say which settings tell measurements apart.
  """
  grouped: dict[tuple[Any, ...], dict[tuple[Any, ...], Record]] = {}
  for record in records:
    run = record["checkpoint"], record["step"], _variant_label(record)
    suite = suites.get(record["suite"])
    key = (record["suite"], record["measure"], record["length"], *(record.get(name) for name in POSITION_FIELDS),
           *(record["settings"].get(name) for name in (suite.settings if suite else ())))
    grouped.setdefault(run, {}).pop(key, None)
    grouped[run][key] = record
  runs = []
  for (checkpoint, step, variant), latest in grouped.items():
    label = f"{plain(next(iter(latest.values()))['name'])}, step {step}{variant}"
    if any(run.label == label for run in runs):
      label += f" ({pathlib.PurePath(checkpoint).name} {len(runs) + 1})"
    runs.append(Run(label, list(latest.values())))
  return runs


def _variant_label(record: Record) -> str:
  """How the evaluated model differs from the checkpoint, as the end of a label; "" if it does not."""
  parts = ["EMA"] if record.get("ema") else []
  parts += [OVERRIDES[name].label.format(record[name]) for name in VARIANT_FIELDS[1:] if record.get(name) is not None]
  cap = record["settings"].get("retention_cap")
  parts += [] if cap is None else [f"cap {cap}"]
  return "".join(f", {part}" for part in parts)


def series(runs: Sequence[Run], measure: str, **settings: Any) -> dict[str, list[Record]]:
  """The records of one measure by label, without the runs that have none."""
  return {run.label: found for run in runs if (found := run.select(measure, **settings))}


def series_by_heading(runs: Sequence[Run], headings: dict[str, str]) -> dict[str, dict[str, list[Record]]]:
  """The records of several measures by heading and label, without the measures that no run has.

  Args:
    runs: what to take records from.
    headings: of each measure.
  """
  return {heading: found for measure, heading in headings.items() if (found := series(runs, measure))}


def lengths_of(runs: Sequence[Run], measures: Iterable[str]) -> list[int]:
  """All lengths at which one of the measures was measured, ascending."""
  return sorted({r["length"] for measure in measures for run in runs for r in run.select(measure)})

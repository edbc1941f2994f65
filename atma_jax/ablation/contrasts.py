"""Matched contrasts and seed intervals.

A contrast of a factor compares two of its levels over all settings of the other factors, seeds among them: the mean of the
differences within pairs that agree in everything else, its 95 % interval by Student's t over the pairs, and in how many of
them the second level won.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
import dataclasses
import itertools
import math

import numpy as np
from scipy import stats

from atma_jax.ablation.results import SEED, Row, better

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Contrast:
  """Level `second` against level `first` of an axis; `difference` is second minus first."""

  axis: str
  first: str
  second: str
  measure: str
  multiple: float
  pairs: int
  difference: float
  low: float | None
  high: float | None
  wins: int
  ties: int


@dataclasses.dataclass(frozen=True)
class Setting:
  """The cells that differ in their seed only; `mean` with its interval over `seeds` of them."""

  labels: tuple[tuple[str, str], ...]
  measure: str
  multiple: float
  seeds: int
  mean: float
  deviation: float | None
  low: float | None
  high: float | None
  least: float  # of the seeds
  most: float

  @property
  def name(self) -> str:
    return " ".join(value if axis == "attention" else f"{axis}={value}" for axis, value in self.labels if value) or "base"


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
  """Student's interval of a mean; none for a single value."""
  if len(values) < 2:
    return None, None
  half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
  mean = float(np.mean(values))
  return mean - half, mean + half


def contrasts(rows: Sequence[Row], axes: Sequence[str]) -> list[Contrast]:
  """Every pair of levels of every axis but the seed, for every measure and length."""
  found = []
  levels = {axis: list(dict.fromkeys(row[axis] for row in rows)) for axis in axes}
  for (measure, multiple), group in _by_measure(rows).items():
    for axis in axes:
      if axis == SEED:
        continue
      settings: dict[tuple, dict[str, float]] = defaultdict(dict)
      for row in group:
        settings[tuple(row[other] for other in axes if other != axis)][row[axis]] = row["value"]
      for first, second in itertools.combinations(levels[axis], 2):
        differences = [values[second] - values[first] for values in settings.values() if first in values and second in values]
        if differences:
          low, high = interval(differences)
          found.append(Contrast(axis, first, second, measure, multiple, len(differences), float(np.mean(differences)), low, high,
                                sum(better(measure) * d > 0 for d in differences), sum(d == 0 for d in differences)))
  return found


def settings(rows: Sequence[Row], axes: Sequence[str]) -> list[Setting]:
  """Means over seeds, in the order of the rows."""
  found = []
  for (measure, multiple), group in _by_measure(rows).items():
    values: dict[tuple, list[float]] = defaultdict(list)
    for row in group:
      values[tuple((axis, row[axis]) for axis in axes if axis != SEED)].append(row["value"])
    for labels, samples in values.items():
      low, high = interval(samples)
      deviation = float(np.std(samples, ddof=1)) if len(samples) > 1 else None
      found.append(Setting(labels, measure, multiple, len(samples), float(np.mean(samples)), deviation, low, high, min(samples),
                           max(samples)))
  return found


def _by_measure(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
  """Rows with a value, by measure and length."""
  groups = defaultdict(list)
  for row in rows:
    if row["value"] is not None:
      groups[row["measure"], row["multiple"]].append(row)
  return groups

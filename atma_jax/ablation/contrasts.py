"""Matched contrasts of the factors of a sweep, and means over seeds.

A contrast compares two levels of a factor over all settings of the other factors, the seed among them: the mean of the
differences within pairs of cells that agree in everything else, its 95 % interval by Student's t over the pairs, and the
number of pairs in which the second level is better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
import itertools
import math

import numpy as np
from scipy import stats

from atma_jax.ablation.results import SEED, Row, better_sign
from atma_jax.evaluation.report.comparisons import Contrast, Setting

CONFIDENCE = 0.95


def student_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
  """Student's interval of the mean of `values`, or (None, None) for a single value."""
  if len(values) < 2:
    return None, None
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
  mean = float(np.mean(values))
  return mean - half, mean + half


def find_contrasts(rows: Sequence[Row], axes: Sequence[str]) -> list[Contrast]:
  """The contrasts of all pairs of levels of every axis but the seed, for every measure and length."""
  contrasts = []
  levels = {axis: list(dict.fromkeys(row[axis] for row in rows)) for axis in axes}
  for (measure, multiple), group in _group_by_measure(rows).items():
    for axis in axes:
      if axis == SEED:
        continue
      settings: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
      for row in group:
        settings[tuple(row[other] for other in axes if other != axis)][row[axis]] = row["value"]
      for first, second in itertools.combinations(levels[axis], 2):
        differences = [values[second] - values[first] for values in settings.values() if first in values and second in values]
        if differences:
          low, high = student_interval(differences)
          wins = sum(better_sign(measure) * d > 0 for d in differences)
          contrasts.append(Contrast(axis, first, second, measure, multiple, len(differences), float(np.mean(differences)), low,
                                    high, wins, sum(d == 0 for d in differences)))
  return contrasts


def seed_means(rows: Sequence[Row], axes: Sequence[str]) -> list[Setting]:
  """Means over the seeds of every setting of the other axes, for every measure and length, in the order of the rows."""
  means = []
  for (measure, multiple), group in _group_by_measure(rows).items():
    values: dict[tuple[tuple[str, str], ...], list[float]] = defaultdict(list)
    for row in group:
      values[tuple((axis, row[axis]) for axis in axes if axis != SEED)].append(row["value"])
    for labels, samples in values.items():
      low, high = student_interval(samples)
      deviation = float(np.std(samples, ddof=1)) if len(samples) > 1 else None
      means.append(Setting(labels, measure, multiple, len(samples), float(np.mean(samples)), deviation, low, high, min(samples),
                           max(samples)))
  return means


def _group_by_measure(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
  """Rows that have a value, by measure and by multiple of the training length."""
  groups = defaultdict(list)
  for row in rows:
    if row["value"] is not None:
      groups[row["measure"], row["multiple"]].append(row)
  return groups

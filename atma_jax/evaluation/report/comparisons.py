"""The plain records that tables and figures of a sweep are drawn from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Contrast:
  """The effect of one factor: its level `second` compared with its level `first`, all other factors being equal.

  Attributes:
    axis: name of the factor.
    first, second: the levels.
    measure: what was measured.
    multiple: context length in multiples of the training length.
    pairs: number of pairs of cells that differ in this factor only.
    difference: mean of second minus first over the pairs.
    low, high: 95 % interval of `difference`; None for a single pair.
    wins: pairs in which `second` is better.
    ties: pairs in which both are equal.
  """

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


_WORDS = {("attention", "polar"): "polar attention", ("mem", "1"): "+ memory", ("mem", "0"): ""}  # of the paper


@dataclasses.dataclass(frozen=True)
class Setting:
  """The mean of one measure over cells that differ in their seed only.

  Attributes:
    labels: axis and level of every factor but the seed.
    measure: what was measured.
    multiple: context length in multiples of the training length.
    seeds: number of cells.
    mean: over the seeds.
    deviation: sample standard deviation over the seeds; None for a single one.
    low, high: 95 % interval of `mean`; None for a single seed.
    least, most: range over the seeds.
  """

  labels: tuple[tuple[str, str], ...]
  measure: str
  multiple: float
  seeds: int
  mean: float
  deviation: float | None
  low: float | None
  high: float | None
  least: float
  most: float

  @property
  def name(self) -> str:
    """The levels in words, such as "polar mem=1"."""
    return " ".join(value if axis == "attention" else f"{axis}={value}" for axis, value in self.labels if value) or "base"

  @property
  def words(self) -> str:
    """The levels in the words of the paper, such as "polar attention + memory"."""
    parts = [_WORDS.get((axis, value), value if axis in ("attention", "kind", "rest") else f"{axis} {value}")
             for axis, value in self.labels if value]
    return " ".join(part for part in parts if part) or "base"

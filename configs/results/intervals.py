"""Prints the table of the first page, with 95 % intervals, from the files beside it.

    python configs/results/intervals.py

A share of exact answers is pooled over the training seeds and gets a Wilson interval, which speaks of other needles, not of
other seeds. The retrieval grid asks the same questions at every depth, so that its depths count as one trial. A loss is the
mean over two seeds and gets Student's interval, which is wide for two. Standard library only.
"""

from __future__ import annotations

import csv
import math
import pathlib
from statistics import NormalDist, mean, stdev

FOLDER = pathlib.Path(__file__).resolve().parent
STUDENT_T = 12.706  # 97.5 % quantile for two seeds, one degree of freedom
HEADLINE = ("polar__mem-1__null-512__direction-8__seed-", "nope__mem-1__seed-", "rope__mem-1__seed-")
QUICKSTART = ("polar__mem-1__direction_scale-5.657__seed-0", "nope__mem-1__seed-0")


def rows(path: str, cell: str, measure: str, multiple: int) -> list[dict[str, str]]:
  """The lines of a file for one measure at a multiple of the training length; `cell` is the beginning of the cell's name."""
  with open(FOLDER / path, newline="") as file:
    return [row for row in csv.DictReader(file)
            if row["cell"].startswith(cell) and row["measure"] == measure and row["multiple"] == str(multiple)]


def share(found: list[dict[str, str]]) -> str:
  """Exact answers in percent with their Wilson interval (Wilson 1927)."""
  p = sum(float(row["value"]) * int(row["n"]) for row in found) / sum(int(row["n"]) for row in found)
  n = sum(int(row["n"]) for row in found) / len({row["depth"] for row in found} if "depth" in found[0] else {None})
  z = NormalDist().inv_cdf(0.975)
  center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  low, high = ((center + sign * half) / (1 + z * z / n) for sign in (-1, 1))
  return f"{100 * p:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def loss(found: list[dict[str, str]]) -> str:
  """The mean over two seeds and its interval."""
  values = [float(row["value"]) for row in found]
  assert len(values) == 2, found
  return f"{mean(values):.3f} ± {STUDENT_T * stdev(values) / math.sqrt(2):.3f}"


def table() -> str:
  """The table in Markdown."""
  lines = ["| measured | polar + memory | nope + memory | rope + memory |", "|---|---|---|---|"]
  for title, measure, multiple, cell_text in (
    ("needle at 1x, all five digits right, %", "needle_exact", 1, share),
    ("needle at 32x, all five digits right, %", "needle_exact", 32, share),
    ("stream loss at 1x, nats a token", "stream_loss", 1, loss),
    ("stream loss at 8x", "stream_loss", 8, loss),
    ("stream loss at 32x", "stream_loss", 32, loss),
  ):
    texts = [cell_text(rows("headline/results.csv", cell, measure, multiple)) for cell in HEADLINE]
    lines.append(f"| {title} | {' | '.join(texts)} |")
  texts = [share(rows("quickstart_grid/direction_results.csv", cell, "retrieval_exact", 32)) for cell in QUICKSTART]
  lines.append(f"| retrieval at 32x, exact, % (1.1M parameters, one seed) | {' | '.join(texts)} | not measured |")
  return "\n".join(lines)


if __name__ == "__main__":
  print(table())

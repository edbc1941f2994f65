"""Draws the pictures of the results pages from the CSV files beside it: two `curves.png` and `headline/foreign_steps.png`.

    python configs/results/pictures.py

A line is the mean over the training seeds of a file, with bars from the lowest to the highest seed.
"""

from __future__ import annotations

from collections.abc import Callable
import csv
import pathlib
from typing import Any

from atma_jax.ablation.contrasts import seed_means
from atma_jax.evaluation.report.curves import draw_curves

FOLDER = pathlib.Path(__file__).resolve().parent
KINDS = "nope and rope: softmax attention without positions, and with rotary positions"
HEADLINE = {  # beginning of the cell's name: attention, the rest of its label
  "polar__mem-1__null-512__direction-8__seed-": ("polar attention", "+ memory"),
  "polar__mem-1__null-published__direction-1__seed-": ("polar attention", "+ memory, as published"),
  "polar__mem-0__null-512__direction-8__seed-": ("polar attention", "without memory"),
  "nope__mem-1__seed-": ("nope", "+ memory"),
  "nope__mem-0__seed-": ("nope", "without memory"),
  "rope__mem-1__seed-": ("rope", "+ memory"),
  "rope__mem-0__seed-": ("rope", "without memory"),
}
GRID = {
  "polar__mem-1__direction_scale-5.657__seed-0": ("polar attention", "+ memory"),
  "polar__mem-1__seed-0": ("polar attention", "+ memory, as published"),
  "polar__mem-0__direction_scale-5.657__seed-0": ("polar attention", "without memory"),
  "nope__mem-1__seed-0": ("nope", "+ memory"),
  "nope__mem-0__seed-0": ("nope", "without memory"),
  "rope__mem-1__seed-0": ("rope", "+ memory"),
  "rope__mem-0__seed-0": ("rope", "without memory"),
}
FOREIGN = {  # attention, foreign keys
  ("polar", "0 0 0 0 512 8192"): ("polar attention", "with foreign keys in a third of the steps"),
  ("polar", "0 0 0 0 0 0 0 8192"): ("polar attention", "with foreign keys in an eighth"),
  ("polar", "0"): ("polar attention", "without foreign keys"),
  ("nope", "0 0 0 0 512 8192"): ("nope", "with foreign keys in a third of the steps"),
  ("nope", "0"): ("nope", "without foreign keys"),
}


def read(name: str, label: Callable[[dict[str, str]], tuple[str, str] | None]) -> list[dict[str, Any]]:
  """The rows of a file whose label is not None, as `seed_means` takes them."""
  found = []
  with open(FOLDER / name, newline="") as file:
    for row in csv.DictReader(file):
      if (kind := label(row)) is not None and row["value"]:
        found.append({"kind": kind[0], "rest": kind[1], "measure": row["measure"], "multiple": float(row["multiple"]),
                      "value": float(row["value"])})
  return found


def draw(target: str, title: str, rows: list[dict[str, Any]], order: list[tuple[str, str]], panels: tuple[str, ...]) -> None:
  """Draws one picture, its lines in this order, and says where it is."""
  rows = sorted(rows, key=lambda row: order.index((row["kind"], row["rest"])))
  content = draw_curves(title, seed_means(rows, ("kind", "rest")), panels)
  assert content is not None, target
  (FOLDER / target).write_bytes(content)
  print(FOLDER / target)


def by_cell(cells: dict[str, tuple[str, str]]) -> Callable[[dict[str, str]], tuple[str, str] | None]:
  """The label of a row by the beginning of its cell's name."""
  def label(row: dict[str, str]) -> tuple[str, str] | None:
    return next((kind for name, kind in cells.items() if row["cell"].startswith(name)), None)
  return label


def read_as_trained(row: dict[str, str]) -> bool:
  """Whether a row of the grid is of a polar model read as it was trained, within the lengths of the other models."""
  return (row["attention"], row["null_length"], row["count_length"]) == ("polar", "256", "") and int(row["multiple"]) <= 32


def main() -> None:
  """Draws all of them."""
  draw("headline/curves.png", f"42M parameters trained at 512 tokens, read at up to 65,536 tokens. {KINDS}\n"
       "Mean over two training seeds (rope without memory: one), bars from one seed to the other; 24 needles a point and seed",
       read("headline/results.csv", by_cell(HEADLINE)), list(HEADLINE.values()), ("stream_loss", "needle_exact"))

  trained = by_cell(GRID)
  rows = read("quickstart_grid/direction_results.csv", lambda row: trained(row) if read_as_trained(row) else None)
  rows += read("quickstart_grid/results.csv", trained)
  draw("quickstart_grid/curves.png", f"1.1M parameters trained at 256 tokens, read at up to 8,192 tokens, one seed. {KINDS}\n"
       "Polar attention as in the recipe (null_length=256, direction_scale=5.657), and with both fields as published",
       rows, list(GRID.values()), ("document_loss", "stream_loss", "needle_accuracy"))

  draw("headline/foreign_steps.png", f"42M parameters trained at 512 tokens, all with memory. {KINDS}\n"
       "64 needles a point and seed; two seeds with foreign keys in a third of the steps of polar attention, else one",
       read("headline/foreign_steps_results.csv", lambda row: FOREIGN.get((row["attention"], row["foreign_keys"]))),
       list(FOREIGN.values()), ("stream_loss", "needle_exact"))


if __name__ == "__main__":
  main()

"""Prints the table of foreign keys on the results page from `headline/foreign_keys_results.csv`.

    python configs/results/foreign_keys.py

Standard library only.
"""

from __future__ import annotations

import csv
import pathlib

FILE = pathlib.Path(__file__).resolve().parent / "headline" / "foreign_keys_results.csv"
MULTIPLES = ("1", "8", "32", "128")
ROWS = (  # foreign keys, seed, count_length, direction_scale
  ("0", "7", "64", "8.0"), ("0", "8", "64", "8.0"), ("0 512 2048 4096", "7", "64", "8.0"), ("0 512 2048 4096", "7", "64", "4.0"),
  ("0 512 2048 8192", "7", "64", "8.0"), ("0 512 2048 8192", "8", "64", "8.0"), ("0 512 2048 8192", "7", "", "8.0"))


def main() -> None:
  """Prints one line per run."""
  with open(FILE, newline="") as file:
    values = {(row["foreign_keys"], row["seed"], row["count_length"], row["direction_scale"], row["measure"], row["multiple"]):
              float(row["value"]) for row in csv.DictReader(file)}
  print("| `train.foreign_keys` | seed | `count_length` | `direction_scale` | stream loss | bits per byte, same spans | "
        "needle, % of digits (exact) |\n|---|---|---|---|---|---|---|")
  for run in ROWS:
    losses = [" / ".join(f"{values[(*run, measure, n)]:.3f}" for n in MULTIPLES) for measure in ("stream_loss", "bits_per_byte")]
    needle = " / ".join(f"{100 * values[(*run, 'needle_accuracy', n)]:.0f} ({100 * values[(*run, 'needle_exact', n)]:.0f})"
                        for n in MULTIPLES)
    keys, seed, count, direction = run
    cells = keys.replace(" ", ", "), seed, count or "none", f"{float(direction):g}", *losses, needle
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
  main()

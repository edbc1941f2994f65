"""Prints the tables of the results page on how many training steps see foreign keys, from two files in `headline/`.

    python configs/results/foreign_steps.py

The first table is read off `foreign_steps_results.csv`. The second is computed anew from the loss of every span, which
`foreign_steps_spans.csv` holds. Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
import csv
import math
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent / "headline"
MULTIPLES = ("1", "8", "32", "128")
STEPS = (("1", "4"), ("4", "8"), ("8", "32"), ("32", "128"))
RUNS = (("polar", "0", "7"), ("polar", "0 0 0 0 512 8192", "7"), ("polar", "0 0 0 0 512 8192", "9"),
        ("polar", "0 0 0 0 0 0 0 8192", "7"), ("nope", "0", "7"), ("nope", "0 0 0 0 512 8192", "7"))
MEASURES = ("needle_exact", "unseen_exact", "multikey-8_exact", "multikey-8_unseen_exact")


def paired(changes: list[tuple[str, float]]) -> tuple[float, float]:
  """The mean of (document, change) pairs and its standard error, clustered by document."""
  mean = math.fsum(change for _, change in changes) / len(changes)
  sums: dict[str, float] = defaultdict(float)
  for document, change in changes:
    sums[document] += change - mean
  return mean, math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(value**2 for value in sums.values())) / len(changes)


def read(name: str) -> list[dict[str, str]]:
  """The rows of a file."""
  with open(FOLDER / name, newline="") as file:
    return list(csv.DictReader(file))


def label(run: tuple[str, str, str]) -> str:
  """The first three cells of a run's line."""
  attention, keys, seed = run
  return f"{attention} | {keys.replace(' ', ', ')} | {seed}"


def main() -> None:
  """Prints both tables."""
  values = {(row["attention"], row["foreign_keys"], row["seed"], row["measure"], row["multiple"]): float(row["value"])
            for row in read("foreign_steps_results.csv")}
  print("| attention | `train.foreign_keys` | seed | stream loss | needle | needle, unseen wording | 8 keys | 8 keys, unseen "
        "wording |\n|---|---|---|---|---|---|---|---|")
  for run in RUNS:
    stream = " / ".join(f"{values[(*run, 'stream_loss', n)]:.3f}" for n in MULTIPLES)
    exact = [" / ".join(f"{100 * values[(*run, measure, n)]:.0f}" for n in MULTIPLES) for measure in MEASURES]
    print(f"| {label(run)} | {stream} | {' | '.join(exact)} |")

  spans: dict[tuple[str, ...], dict[tuple[str, str], float]] = defaultdict(dict)
  for row in read("foreign_steps_spans.csv"):
    key = row["attention"], row["foreign_keys"], row["seed"], row["multiple"]
    spans[key][row["document"], row["start"]] = float(row["loss"])
  print("\n| attention | `train.foreign_keys` | seed | " + " | ".join(f"{a}x to {b}x" for a, b in STEPS) + " |\n"
        + "|---" * (3 + len(STEPS)) + "|")
  for run in RUNS:
    cells = []
    for shorter, longer in STEPS:
      base, found = spans[(*run, shorter)], spans.get((*run, longer))
      changes = [(document, found[document, start] - loss) for (document, start), loss in base.items()] if found else []
      cells.append("{:+.3f} ± {:.3f}".format(*paired(changes)) if changes else "not measured")
    print(f"| {label(run)} | {' | '.join(cells)} |")


if __name__ == "__main__":
  main()

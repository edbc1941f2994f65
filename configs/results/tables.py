"""Rebuilds the tables of the first page and of the results page from the CSV files beside this one.

    python configs/results/tables.py            # writes the tables into README.md and configs/results/README.md
    python configs/results/tables.py --check    # writes nothing; exit code 1, with the lines that differ, if a page disagrees

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Its cells are read off files, averaged over the rows
that a line names (training seeds); paired changes are computed anew from the loss of every span. Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
import csv
import difflib
import functools
import math
import pathlib
import re
from statistics import NormalDist, fmean
import sys

FOLDER = pathlib.Path(__file__).resolve().parent
PAGES = (FOLDER.parent.parent / "README.md", FOLDER / "README.md")
DASH = "–"  # not measured

Row = Mapping[str, str]
Cell = Callable[["Line"], str]


class Line:
  """A line of a table: its first cells, and the rows of a file that its numbers come from.

  Args:
    label: the first cells, as Markdown.
    file: path below this folder.
    where: the value of each column that the rows must have.
  """

  def __init__(self, label: str, file: str, **where: object):
    self.label, self.file = label, file
    self.where = {column: str(value) for column, value in where.items()}

  def rows(self, measure: str, multiple: int) -> list[Row]:
    """The rows for one measure at a multiple of the training length; there is at least one."""
    found = [row for row in table_file(self.file)
             if row["measure"] == measure and row["multiple"] == str(multiple)
             and all(row[column] == value for column, value in self.where.items())]
    if not found:
      raise LookupError(f"{self.file}: no {measure} at {multiple}x for {self.where}")
    return found

  def value(self, measure: str, multiple: int) -> float:
    """The mean of these rows."""
    return fmean(float(row["value"]) for row in self.rows(measure, multiple))


@functools.cache
def table_file(name: str) -> Sequence[Row]:
  """The rows of a CSV file."""
  with open(FOLDER / name, newline="") as file:
    return list(csv.DictReader(file))


# --- Cells ------------------------------------------------------------------------------------------------------------


def each(multiples: Sequence[int], text: Callable[[Line, int], str]) -> Cell:
  """The text at several multiples, " / " between them, with a dash for what was not measured."""
  def one(line: Line, multiple: int) -> str:
    try:
      return text(line, multiple)
    except LookupError:
      return DASH

  def cell(line: Line) -> str:
    texts = [one(line, multiple) for multiple in multiples]
    return " / ".join(texts) if set(texts) != {DASH} else DASH
  return cell


def losses(measure: str, multiples: Sequence[int], digits: int = 3) -> Cell:
  """Losses at several multiples."""
  return each(multiples, lambda line, n: f"{line.value(measure, n):.{digits}f}")


def shares(measure: str, multiples: Sequence[int]) -> Cell:
  """Shares in percent."""
  return each(multiples, lambda line, n: f"{100 * line.value(measure, n):.0f}")


def needles(multiples: Sequence[int]) -> Cell:
  """Shares of digits, those of whole answers in brackets."""
  return each(multiples, lambda line, n: f"{100 * line.value('needle_accuracy', n):.0f} "
                                         f"({100 * line.value('needle_exact', n):.0f})")


def wilson(measure: str, multiple: int) -> Cell:
  """A share of exact answers in percent, pooled over the rows, with its 95 % interval (Wilson 1927).

  The retrieval grid asks the same questions at every depth, so its depths count as one trial.
  """
  def text(line: Line, multiple: int) -> str:
    found = line.rows(measure, multiple)
    total = sum(int(row["n"]) for row in found)
    p = sum(float(row["value"]) * int(row["n"]) for row in found) / total
    n = total / len({row.get("depth") for row in found})
    z = NormalDist().inv_cdf(0.975)
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((center + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
  return each([multiple], text)


def paired_change(shorter: int, longer: int) -> Cell:
  """The mean change of the loss of the same spans between two contexts and its standard error, clustered by document."""
  def cell(line: Line) -> str:
    spans: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in table_file(line.file):
      if all(row[column] == value for column, value in line.where.items()):
        spans[row["multiple"]][row["document"], row["start"]] = float(row["loss"])
    base, found = spans[str(shorter)], spans.get(str(longer))
    if not base or not found:
      return DASH
    changes = [(document, found[document, start] - loss) for (document, start), loss in base.items()]
    mean = math.fsum(change for _, change in changes) / len(changes)
    sums: dict[str, float] = defaultdict(float)
    for document, change in changes:
      sums[document] += change - mean
    error = math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(value**2 for value in sums.values())) / len(changes)
    return f"{mean:+.3f} ± {error:.3f}"
  return cell


# --- Tables -----------------------------------------------------------------------------------------------------------


class Table:
  """A table: the heading of the first cells, then a heading and a cell for every column, and the lines."""

  def __init__(self, first: str, columns: Sequence[tuple[str, Cell]], lines: Sequence[Line]):
    self.first, self.columns, self.lines = first, columns, lines

  def __str__(self) -> str:
    headings = [self.first, *(heading for heading, _ in self.columns)]
    text = [f"| {' | '.join(headings)} |", "|---" * (" | ".join(headings).count(" | ") + 1) + "|"]
    for line in self.lines:
      text.append(f"| {' | '.join([line.label, *self.cells(line)])} |")
    return "\n".join(text)

  def cells(self, line: Line) -> list[str]:
    """The numbers of a line; LookupError if none of them was measured, since then the line asks for what no file has."""
    texts = [cell(line) for _, cell in self.columns]
    if set(texts) == {DASH}:
      raise LookupError(f"{line.label}: {line.file} has no row for {line.where}")
    return texts


class ByContext(Table):
  """A table with a column for every context: `first` heads the labels, and each line has its own measure.

  Args:
    first: heading of the first cells.
    contexts: heading and multiple of every column.
    lines: a line and, for a multiple, its cell.
  """

  def __init__(self, first: str, contexts: Mapping[str, int], lines: Sequence[tuple[Line, Callable[[int], Cell]]]):
    super().__init__(first, [(heading, lambda line, n=n: self._cells[line](n)(line)) for heading, n in contexts.items()],
                     [line for line, _ in lines])
    self._cells = dict(lines)


class Transposed(Table):
  """A table with a line for every column: `first` heads the measures, and the labels of the lines are the headings."""

  def __str__(self) -> str:
    text = [f"| {' | '.join([self.first, *(line.label for line in self.lines)])} |", "|---" * (1 + len(self.lines)) + "|"]
    columns = [self.cells(line) for line in self.lines]
    for i, (heading, _) in enumerate(self.columns):
      text.append(f"| {' | '.join([heading, *(column[i] for column in columns)])} |")
    return "\n".join(text)


EIGHTH = "0 0 0 0 0 0 0 8192"
THIRD = "0 0 0 0 512 8192"
STEPS = ((1, 4), (4, 8), (8, 32), (32, 128))
GRID = "quickstart_grid/"
BOTH = {"null_length": 256, "direction_scale": "5.657", "half_life": "", "count_length": ""}
SMALL = (1, 8, 32)
FAR = (1, 8, 32, 128)
LOSSES_AND_NEEDLE = [("document loss", losses("document_loss", SMALL)), ("stream loss", losses("stream_loss", SMALL)),
                     ("needle, % of digits", shares("needle_accuracy", SMALL))]


def _small(label: str, file: str, cell: str, **where: object) -> Line:
  """A line of the grid at 1.1M parameters."""
  return Line(label, GRID + file, cell=cell, **where)


def _headline(label: str, **where: object) -> Line:
  """A line of the grid at 42M parameters: whatever is not named is empty; every seed that was run."""
  named = {"init": "", "null": "", "direction": "", "half_life": "", "steps": ""} | where
  return Line(label, "headline/results.csv", **named)


POLAR = {"attention": "polar", "null": 512, "direction": 8}


def _foreign(label: str, file: str, keys: str, attention: str = "polar", **where: object) -> Line:
  """A line about `train.foreign_keys`: a file below headline/, the keys, and what else."""
  return Line(label, f"headline/{file}.csv", attention=attention, foreign_keys=keys, **where)


_STEPS_RUNS = [("polar", "0", 7), ("polar", THIRD, 7), ("polar", THIRD, 9), ("polar", EIGHTH, 7), ("nope", "0", 7),
               ("nope", THIRD, 7)]
_EIGHTH_RUNS = [("polar", "0", "python", 8), ("polar", EIGHTH, "python", 7), ("nope", EIGHTH, "python", 7),
                ("polar", EIGHTH, "rfc", 7)]
_TEXTS = {"python": "Python source", "rfc": "English (RFCs)"}


def _foreign_steps(file: str) -> list[Line]:
  return [_foreign(f"{attention} | {keys.replace(' ', ', ')} | {seed}", file, keys, attention, seed=seed)
          for attention, keys, seed in _STEPS_RUNS]


def _foreign_eighth(file: str) -> list[Line]:
  return [_foreign(f"{attention} | {keys.replace(' ', ', ')} | {_TEXTS[corpus]} | {seed}", file, keys, attention, corpus=corpus,
                   seed=seed) for attention, keys, corpus, seed in _EIGHTH_RUNS]


def _control(label: str, cell: Callable[[int], Cell], read: int | str = "") -> tuple[Line, Callable[[int], Cell]]:
  return Line(label, "published_size/control_results.csv", count_length_read=read), cell


def _big(label: str, cell: Callable[[int], Cell], **where: object) -> tuple[Line, Callable[[int], Cell]]:
  return Line(label, "published_size/results.csv", **where), cell


def _in_run(run: int) -> Cell:
  return lambda line: losses("stream_loss", [32])(Line(line.label, line.file, **line.where, training_run=run))


def _exact(measure: str, multiples: Sequence[int] = FAR) -> Cell:
  return shares(measure, multiples)


TABLES: dict[str, Table] = {
  "first page": Transposed("measured", [
    *((f"needle at {n}x, %", wilson("needle_exact", n)) for n in (1, 32, 128)),
    ("stream loss at 1x / 8x / 32x", losses("stream_loss", (1, 8, 32))), ("at 64x / 128x", losses("stream_loss", (64, 128)))], [
    Line("292M: polar + memory", "published_size/results.csv"),
    _foreign("42M: polar + memory", "foreign_eighth_results", EIGHTH, corpus="python", seed=7),
    _foreign("the same, own keys only", "foreign_eighth_results", "0", corpus="python", seed=8),
    _foreign("42M: nope + memory", "foreign_steps_results", THIRD, "nope", seed=7)]),
  "quickstart": ByContext("context", {"256 (1x)": 1, "512": 2, "1K": 4, "2K (8x)": 8}, [
    (Line(label, "quickstart/results.csv"), lambda n, measure=measure, cell=cell: cell(measure, [n]))
    for label, measure, cell in (
      ("needle, all five digits right, % of 24", "needle_exact", shares),
      ("needle in a wording never seen, % of 24", "unseen_exact", shares),
      ("stream loss", "stream_loss", lambda measure, n: losses(measure, n, 2)),
      ("document loss, 16 documents", "document_loss", lambda measure, n: losses(measure, n, 2)))]),
  "grid at 1.1M": Table("at 1x / 8x / 32x", LOSSES_AND_NEEDLE, [
    _small("polar + memory", "direction_results.csv", "polar__mem-1__direction_scale-5.657__seed-0", **BOTH),
    _small("the same weights, the null as published", "direction_results.csv", "polar__mem-1__direction_scale-5.657__seed-0",
           null_length="published"),
    _small("polar + memory, the direction as published", "null_results.csv", "polar__mem-1__seed-0"),
    _small("polar + memory, both as published", "results.csv", "polar__mem-1__seed-0"),
    _small("nope + memory", "results.csv", "nope__mem-1__seed-0"),
    _small("polar + memory, seed 1", "direction_results.csv", "polar__mem-1__direction_scale-5.657__seed-1", **BOTH),
    _small("nope + memory, seed 1", "direction_results.csv", "nope__mem-1__seed-1"),
    _small("rope + memory", "results.csv", "rope__mem-1__seed-0"),
    _small("polar", "direction_results.csv", "polar__mem-0__direction_scale-5.657__seed-0", **BOTH),
    _small("polar, both as published", "results.csv", "polar__mem-0__seed-0"),
    _small("nope", "results.csv", "nope__mem-0__seed-0"),
    _small("rope", "results.csv", "rope__mem-0__seed-0")]),
  "grid at 42M": Table("at 1x / 8x / 32x / 128x", [
    ("document loss", losses("document_loss", FAR)), ("stream loss", losses("stream_loss", FAR)),
    ("needle, % of digits", shares("needle_accuracy", FAR))], [
    _headline("polar + memory, `memory.max_half_life=512` (2 seeds)", mem=1, **POLAR, half_life=512),
    _headline("polar + memory (2 seeds)", mem=1, **POLAR),
    _headline("`direction_scale=4` (2 seeds)", mem=1, **POLAR | {"direction": 4}),
    _headline("the direction as published (2 seeds)", mem=1, **POLAR | {"direction": 1}),
    _headline("both as published (2 seeds)", mem=1, **POLAR | {"direction": 1, "null": "published"}),
    _headline("nope + memory (2 seeds)", attention="nope", mem=1),
    _headline("rope + memory (2 seeds)", attention="rope", mem=1),
    _headline("nope (2 seeds)", attention="nope", mem=0),
    _headline("rope", attention="rope", mem=0),
    _headline("polar (2 seeds)", mem=0, **POLAR),
    Line("the same weights, `--count_length=512` (2 seeds; stream loss over other windows)", "headline/count_results.csv", mem=0,
         count_length=512),
    _headline("polar, both as published", mem=0, **POLAR | {"direction": 1, "null": "published"}),
    _headline("polar + memory, `init=default` (2 seeds)", mem=1, **POLAR, init="default"),
    _headline("polar + memory, `init=published` (2 seeds)", mem=1, **POLAR, init="published"),
    _headline("nope + memory, `init=default`", attention="nope", mem=1, init="default"),
    _headline("nope + memory, `init=published` (2 seeds)", attention="nope", mem=1, init="published"),
    _headline("polar + memory, twice the steps", mem=1, **POLAR, steps=1800)]),
  "interventions": Table("reading, at 32x", [
    (f"training run {run}", _in_run(run)) for run in (1, 2)], [
    Line(label, "headline/interventions.csv", cell="polar__mem-0__seed-0", step=900, intervention=name) for label, name in (
      ("as it is", "none"), ("attention sees the last 512 keys only", "direction and magnitude of the last T keys"),
      ("the magnitude is that of the last 512 keys", "magnitude of the last T keys"),
      ("the magnitude is kept in its range", "magnitude keeps its range"), ("the null keeps its share", "null keeps its share"),
      ("both of the last two", "both (count_length=512)"))]),
  "third seed": Table("`null_length`, `count_length` | `direction_scale` | `max_half_life`", [
    ("stream 1x / 8x / 16x / 32x / 128x", losses("stream_loss", (1, 8, 16, 32, 128))),
    ("document 1x / 32x / 128x", losses("document_loss", (1, 32, 128))),
    ("needle, % of digits (exact), 1x / 8x / 32x / 128x", needles(FAR))], [
    Line("512, none | 8 | 512", "headline/third_seed_results.csv", null_length=512, count_length=""),
    Line("64, 64 | 8 | 512", "headline/third_seed_results.csv", null_length=64, direction_scale=8, half_life=512),
    Line("64, 64 | 4 | 512", "headline/third_seed_results.csv", null_length=64, direction_scale=4),
    Line("64, 64 | 8 | none", "headline/third_seed_results.csv", null_length=64, half_life="")]),
  "published size": ByContext("measured", {f"{n}x": n for n in (1, 2, 4, 8, 16, 32, 64)}, [
    _control("stream loss", lambda n: losses("stream_loss", [n])),
    _control("second half of each window", lambda n: losses("second_half_loss", [n])),
    _control("document loss, 14 documents", lambda n: losses("document_loss", [n])),
    _control("needle, % of digits (exact), 24 trials", lambda n: needles([n])),
    _control("the same weights, `--count_length=2048`", lambda n: needles([n]), read=2048),
    _control("their stream loss, over other windows", lambda n: losses("stream_loss", [n]), read=2048),
    _control("retrieval grid, % exact, mean of 12 cells of 50", lambda n: shares("retrieval_exact", [n]))]),
  "published size, foreign keys": ByContext("measured", {f"{n}x": n for n in (1, 2, 4, 8, 16, 32, 64)}, [
    _big("stream loss", lambda n: losses("stream_loss", [n])),
    _big("loss of 128 fixed spans", lambda n: losses("target_loss", [n])),
    (Line("their paired change from half the context", "published_size/spans.csv"), lambda n: paired_change(n // 2, n)),
    _big("document loss, 10 packages", lambda n: losses("document_loss", [n])),
    _big("needle, exact, 400 trials", lambda n: wilson("needle_exact", n)),
    _big("needle, exact, unseen wording", lambda n: wilson("unseen_exact", n)),
    _big("8 keys, exact, 100 trials", lambda n: wilson("multikey-8_exact", n)),
    _big("8 keys, exact, unseen wording", lambda n: wilson("multikey-8_unseen_exact", n)),
    *(_big(f"{task} in {haystack}, exact, 3 depths of 50", lambda n: wilson("retrieval_exact", n), task=name, haystack=haystack)
      for task, name in (("passkey", "passkey"), ("NIAH", "niah")) for haystack in ("filler", "text")),
    *(_big(f"{task} in {haystack}, unseen wording", lambda n: wilson("retrieval_unseen_exact", n), task=name, haystack=haystack)
      for task, name in (("passkey", "passkey"), ("NIAH", "niah")) for haystack in ("filler", "text"))]),
  "foreign keys": Table("`train.foreign_keys` | seed | `count_length` | `direction_scale`", [
    ("stream loss", losses("stream_loss", FAR)), ("bits per byte, same spans", losses("bits_per_byte", FAR)),
    ("needle, % of digits (exact)", needles(FAR))], [
    Line(f"{keys.replace(' ', ', ')} | {seed} | {count or 'none'} | {direction}", "headline/foreign_keys_results.csv",
         foreign_keys=keys, seed=seed, count_length=count, direction_scale=f"{direction}.0")
    for keys, seed, count, direction in (
      ("0", 7, 64, 8), ("0", 8, 64, 8), ("0 512 2048 4096", 7, 64, 8), ("0 512 2048 4096", 7, 64, 4),
      ("0 512 2048 8192", 7, 64, 8), ("0 512 2048 8192", 8, 64, 8), ("0 512 2048 8192", 7, "", 8))]),
  "foreign steps, values": Table("attention | `train.foreign_keys` | seed", [
    ("stream loss", losses("stream_loss", FAR)), ("needle", _exact("needle_exact")),
    ("needle, unseen wording", _exact("unseen_exact")), ("8 keys", _exact("multikey-8_exact")),
    ("8 keys, unseen wording", _exact("multikey-8_unseen_exact"))], _foreign_steps("foreign_steps_results")),
  "foreign steps, changes": Table("attention | `train.foreign_keys` | seed", [
    (f"{a}x to {b}x", paired_change(a, b)) for a, b in STEPS], _foreign_steps("foreign_steps_spans")),
  "foreign eighth, values": Table("attention | `train.foreign_keys` | text | seed", [
    ("stream loss", losses("stream_loss", FAR)), ("needle", _exact("needle_exact")),
    ("needle, unseen wording", _exact("unseen_exact")), ("8 keys", _exact("multikey-8_exact"))],
    _foreign_eighth("foreign_eighth_results")),
  "foreign eighth, changes": Table("attention | `train.foreign_keys` | text | seed", [
    (f"{a}x to {b}x", paired_change(a, b)) for a, b in STEPS], _foreign_eighth("foreign_eighth_spans")),
  "raven": Table("at 1x / 8x / 32x", LOSSES_AND_NEEDLE, [
    _small("`raven_native`, its recipe: AdamW, 3e-4", "raven_results.csv", "raven_native"),
    _small("`atma_raven_titans` (Raven and memory in the place of attention), its recipe", "raven_results.csv",
           "atma_raven_titans", learning_rate="0.0003"),
    _small("the same, ten times that rate (`--axis optimizer.adamw_learning_rate=0.003`)", "raven_results.csv",
           "atma_raven_titans", learning_rate="0.003"),
    _small("the same, our recipe (`--axis \"model.block_pattern=('local','local','raven','local')\" --axis model.remat=block`, "
           "no preset)", "raven_results.csv", "atma_raven_titans", optimizer="muon")]),
}


# --- Pages ------------------------------------------------------------------------------------------------------------


def rebuilt(text: str) -> str:
  """A page with its tables made anew.

  Raises:
    LookupError: the page asks for a table that there is not, or a file has no such number.
  """
  def table(match: re.Match[str]) -> str:
    if match["name"] not in TABLES:
      raise LookupError(f"<!-- table: {match['name']} -->: there is none; legal: {', '.join(TABLES)}")
    return f"<!-- table: {match['name']} -->\n{TABLES[match['name']]}\n<!-- end of table -->"

  return re.sub(r"<!-- table: (?P<name>[^>]+) -->\n(?:\|.*\n)*<!-- end of table -->", table, text)


def main(arguments: Sequence[str]) -> int:
  """Rewrites the pages, or with --check compares them."""
  if list(arguments) not in ([], ["--check"]):
    print(f"usage: tables.py [--check], not {' '.join(arguments)!r}", file=sys.stderr)
    return 2
  differ = False
  for page in PAGES:
    old = page.read_text()
    new = rebuilt(old)
    if not arguments:
      page.write_text(new)
    elif new != old:
      differ = True
      sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(page), "from the files", n=0))
  return int(differ)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

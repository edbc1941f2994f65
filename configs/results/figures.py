"""Draws the pictures of the results page from the CSV files beside this one.

    python configs/results/figures.py            # draws every picture anew
    python configs/results/figures.py --check    # writes nothing; exit code 1 if a picture is not the one that is stored

Every line is told apart three times: by colour (from the palette of Okabe and Ito, made for colour-blind readers), by its marker
and dashes, which remain in grey, and by its name at its end. The same matplotlib draws the same file, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import io
import json
import math
import pathlib
from statistics import fmean
import sys
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np
from PIL import Image
from tables import EIGHTH, FOLDER, GRID, THIRD, Line, Row

SOFT, GRID_LINE = "#5b6470", "#e5e7eb"
ROOM_FOR_NAMES = 0.50  # what the names at the right take, as a share of the width of a panel
MOST_LETTERS = 65  # of a name in a legend with two columns
LINE_HEIGHT = 12.0  # least distance between two names, in points
MOST_DIFFERENT = 0.01  # largest mean difference, of 1, between two drawings of a picture by different versions of matplotlib


@dataclasses.dataclass(frozen=True)
class Look:
  """How a line is drawn: colour, dashes, and a marker, which is hollow where the model has no memory."""

  color: str
  dashes: Literal["-", "--", "-.", ":"]
  marker: str
  filled: bool = True


@dataclasses.dataclass(frozen=True)
class Curve:
  """A line of a picture.

  Attributes:
    name: in the words of the paper, for the legend.
    short: written at the line's end.
    sources: the rows it is made of; the rows of all of them are averaged.
    look: how it is drawn.
  """

  name: str
  short: str
  sources: tuple[Line, ...]
  look: Look

  def points(self, measure: str, multiples: Sequence[int]) -> list[tuple[int, list[Row]]]:
    """The rows at every multiple of the training length at which this was measured."""
    found = []
    for multiple in multiples:
      rows = []
      for source in self.sources:
        try:
          rows += source.rows(measure, multiple)
        except LookupError:
          continue
      if rows:
        found.append((multiple, rows))
    return found


@dataclasses.dataclass(frozen=True)
class Panel:
  """One measure against the context.

  Attributes:
    heading: what is measured, and its unit.
    measure: its name in the files; one that begins with "needle" is a share, drawn in percent.
    curves: the lines.
    training_length: in tokens.
    multiples: of the training length, on the axis.
    trials: draws 95 % intervals over the needles instead of the range over the seeds.
    note: written into the panel.
  """

  heading: str
  measure: str
  curves: Sequence[Curve]
  training_length: int
  multiples: Sequence[int]
  trials: bool = False
  note: str = ""


# --- Drawing ----------------------------------------------------------------------------------------------------------


def draw(title: str, about: str, panels: Sequence[Panel]) -> bytes:
  """The picture as the content of a PNG file: two panels in a row, the legend below them."""
  rows = -(-len(panels) // 2)
  curves = {curve.name: curve for panel in panels for curve in panel.curves}
  columns = 2 if max(map(len, curves)) < MOST_LETTERS else 1
  below = 0.25 * -(-len(curves) // columns) + 0.2  # inches for the legend
  height = 3.85 * rows + below + 0.85
  figure = Figure(figsize=(11.5, height), dpi=130)
  grid = figure.subplots(rows, 2, squeeze=False)
  figure.subplots_adjust(left=0.055, right=0.985, top=1 - 1.3 / height, bottom=(below + 0.7) / height, hspace=0.47, wspace=0.12)
  for axes, panel in zip(grid.flat, panels, strict=True):
    _draw_panel(axes, panel)
  figure.text(0.015, 1 - 0.33 / height, title, fontsize=15, fontweight="bold")
  figure.text(0.015, 1 - 0.62 / height, about, fontsize=10.5, color=SOFT)
  figure.legend([_sample(curve.look) for curve in curves.values()], list(curves), loc="lower left", ncols=columns, frameon=False,
                fontsize=10.5, bbox_to_anchor=(0.01, 0.0), handlelength=4.0, columnspacing=3.0)
  content = io.BytesIO()
  figure.savefig(content, format="png", metadata={"Software": None, "Numbers": _digest(panels)})
  return content.getvalue()


def _digest(panels: Sequence[Panel]) -> str:
  """Names the numbers that panels show: a picture keeps it, so that --check sees any change of a number."""
  shown = [[panel.heading, curve.name, multiple, [(row["value"], row["n"]) for row in rows]]
           for panel in panels for curve in panel.curves for multiple, rows in curve.points(panel.measure, panel.multiples)]
  return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _sample(look: Look) -> Line2D:
  return Line2D([], [], color=look.color, linestyle=look.dashes, marker=look.marker, markersize=7, linewidth=2.2,
                markerfacecolor=look.color if look.filled else "white", markeredgecolor=look.color)


def _draw_panel(axes: Axes, panel: Panel) -> None:
  share = panel.measure.startswith("needle")
  factor = 100 if share else 1
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color=GRID_LINE, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.set_title(panel.heading, loc="left", fontsize=12, fontweight="bold", pad=19)
  first, last = math.log2(panel.multiples[0]), math.log2(panel.multiples[-1])
  axes.set_xlim(first - 0.22, last + (last - first) * ROOM_FOR_NAMES)
  axes.set_xticks([math.log2(n) for n in panel.multiples], [_tick(n, panel.training_length) for n in panel.multiples], fontsize=9)
  axes.tick_params(axis="y", labelsize=10)
  axes.set_xlabel("context: multiples of the training length, and tokens", x=0.0, ha="left", fontsize=9.5, color=SOFT)
  axes.axvline(0, color=SOFT, linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)
  ends = []
  for curve in panel.curves:
    points = curve.points(panel.measure, panel.multiples)
    if not points:
      continue
    x = [math.log2(multiple) for multiple, _ in points]
    y = [factor * fmean(float(row["value"]) for row in rows) for _, rows in points]
    _draw_spread(axes, x, points, factor, curve.look, panel.trials)
    axes.plot(x, y, color=curve.look.color, linestyle=curve.look.dashes, marker=curve.look.marker, markersize=6.5, linewidth=2.0,
              markerfacecolor=curve.look.color if curve.look.filled else "white", zorder=3, clip_on=False)
    ends.append((x[-1], y[-1], curve))
  if share:
    axes.set_ylim(-2, 104)
  axes.set_ylim(axes.get_ylim())
  axes.annotate("training length", (0, 1), xycoords=("data", "axes fraction"), xytext=(-3, 3), textcoords="offset points",
                fontsize=9, color=SOFT)
  _name_ends(axes, ends, last)
  if panel.note:
    axes.text(0.10, 0.98, panel.note, transform=axes.transAxes, fontsize=9, color=SOFT, va="top", style="italic")


def _draw_spread(axes: Axes, x: Sequence[float], points: Sequence[tuple[int, list[Row]]], factor: float, look: Look,
                 trials: bool) -> None:
  """A band from the lowest seed to the highest, or bars over the 95 % interval of the needles of one seed."""
  if trials:
    bounds = [_wilson(rows) for _, rows in points]
    axes.vlines(x, [factor * low for low, _ in bounds], [factor * high for _, high in bounds], color=look.color, linewidth=5,
                alpha=0.25, zorder=2)
  elif any(len(rows) > 1 for _, rows in points):
    values = [[factor * float(row["value"]) for row in rows] for _, rows in points]
    axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=look.color, alpha=0.2, linewidth=0, zorder=2)


def _wilson(rows: Sequence[Row]) -> tuple[float, float]:
  """The 95 % interval (Wilson 1927) of a share of right answers, pooled over rows."""
  n = sum(int(row["n"]) for row in rows)
  p = sum(float(row["value"]) * int(row["n"]) for row in rows) / n
  z = 1.959964
  center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def _tick(multiple: int, training_length: int) -> str:
  tokens = multiple * training_length
  return f"{multiple}x\n{tokens // 1024}K" if tokens >= 1024 else f"{multiple}x\n{tokens}"


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, Curve]], last: float) -> None:
  """Writes every line's name beside its end, moved up or down until no two overlap."""
  figure = axes.get_figure()
  assert isinstance(figure, Figure)
  low, high = axes.get_ylim()
  points = axes.get_position().height * figure.get_figheight() * 72  # height of the panel
  distance = LINE_HEIGHT / points * (high - low)
  ordered = sorted(ends, key=lambda end: end[1])
  places = _spread_out([y for _, y, _ in ordered], distance, low, high)
  for (x, y, curve), place in zip(ordered, places, strict=True):
    axes.annotate(curve.short, (x, y), (last + 0.42, place), va="center", fontsize=9.5, color=curve.look.color, fontweight="bold",
                  annotation_clip=False,
                  arrowprops={"arrowstyle": "-", "color": curve.look.color, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1,
                              "shrinkB": 4, "relpos": (0, 0.5)})


def _spread_out(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
  """Places at least `distance` apart, in the order of those wanted and close to them, within [low, high].

  Neighbours that are too close make a group, which is centred on what its members want.
  """
  groups: list[list[float]] = []

  def bottom(group: Sequence[float]) -> float:
    room = (len(group) - 1) * distance
    return min(max(fmean(group) - room / 2, low + distance / 2), high - room)

  for value in wanted:
    groups.append([value])
    while len(groups) > 1 and bottom(groups[-2]) + len(groups[-2]) * distance > bottom(groups[-1]):
      groups[-2:] = [groups[-2] + groups[-1]]
  return [bottom(group) + i * distance for group in groups for i in range(len(group))]


# --- Pictures ---------------------------------------------------------------------------------------------------------


LOOKS = {
  "polar + memory": Look("#0072B2", "-", "o"), "as published": Look("#7b3fa0", "-.", "D"),
  "polar": Look("#56A0D0", "--", "o", False), "polar, published": Look("#a880c0", ":", "D", False),
  "nope + memory": Look("#D55E00", "-", "s"), "nope": Look("#E69F00", "--", "s", False),
  "rope + memory": Look("#007a59", "-", "^"), "rope": Look("#555555", "--", "^", False)}
NAMES = {
  "polar + memory": "polar attention + memory", "as published": "polar attention + memory, null and direction as published",
  "polar": "polar attention alone", "polar, published": "polar attention alone, null and direction as published",
  "nope + memory": "softmax without positions (nope) + memory", "nope": "softmax without positions (nope) alone",
  "rope + memory": "softmax with rotary positions (rope) + memory", "rope": "softmax with rotary positions (rope) alone"}
SHORT = {"as published": "as published", "polar": "polar alone", "polar, published": "polar, published",
         "nope": "nope alone", "rope": "rope alone"}
SEEDS = "A band reaches from the lowest seed to the highest; a line without one is of one seed."


def _curve(key: str, *sources: Line) -> Curve:
  return Curve(NAMES[key], SHORT.get(key, key), sources, LOOKS[key])


def _headline(attention: str, mem: int, null: object = "", direction: object = "") -> Line:
  return Line("", "headline/results.csv", attention=attention, mem=mem, init="", null=null, direction=direction, half_life="",
              steps="")


def _grid(cell: str, file: str = "results", **where: object) -> Line:
  return Line("", f"{GRID}{file}.csv", cell=cell, **where)


def headline() -> bytes:
  """The grid at 42M parameters."""
  curves = [
    _curve("polar + memory", _headline("polar", 1, 512, 8)), _curve("as published", _headline("polar", 1, "published", 1)),
    _curve("polar", _headline("polar", 0, 512, 8)), _curve("nope + memory", _headline("nope", 1)),
    _curve("nope", _headline("nope", 0)), _curve("rope + memory", _headline("rope", 1)), _curve("rope", _headline("rope", 0))]
  return draw("42M parameters, trained at 512 tokens, read to 128 times that length",
              f"Training rows saw their own keys only. {SEEDS}", _four_panels(curves, 512, (1, 2, 4, 8, 16, 32, 64, 128)))


def quickstart_grid() -> bytes:
  """The grid at 1.1M parameters."""
  scaled = {"null_length": 256, "half_life": "", "count_length": ""}
  both = [_grid(f"polar__mem-1__direction_scale-5.657__seed-{seed}", "direction_results", **scaled) for seed in (0, 1)]
  curves = [
    _curve("polar + memory", *both), _curve("as published", _grid("polar__mem-1__seed-0")),
    _curve("polar", _grid("polar__mem-0__direction_scale-5.657__seed-0", "direction_results", **scaled)),
    _curve("polar, published", _grid("polar__mem-0__seed-0")),
    _curve("nope + memory", _grid("nope__mem-1__seed-0"), _grid("nope__mem-1__seed-1", "direction_results")),
    _curve("nope", _grid("nope__mem-0__seed-0")), _curve("rope + memory", _grid("rope__mem-1__seed-0")),
    _curve("rope", _grid("rope__mem-0__seed-0"))]
  return draw("1.1M parameters, trained at 256 tokens on two CPU cores, read to 32 times that length", SEEDS,
              _four_panels(curves, 256, (1, 2, 4, 8, 16, 32)))


def _four_panels(curves: Sequence[Curve], training_length: int, multiples: Sequence[int]) -> list[Panel]:
  return [Panel(heading, measure, curves, training_length, multiples) for heading, measure in (
    ("needle: digits that are right, %", "needle_accuracy"), ("needle: all five digits right, %", "needle_exact"),
    ("loss on the validation stream, nats a token", "stream_loss"), ("loss on long documents, nats a token", "document_loss"))]


def foreign_keys() -> bytes:
  """What keys of other rows in training change, at 292M and at 42M parameters; the lines of the table on the first page."""
  other, own, nope = LOOKS["polar + memory"], Look("#7b3fa0", "--", "D", False), LOOKS["nope + memory"]
  name = "polar attention + memory, an eighth of the steps with keys of other rows"
  control = "polar attention + memory, own keys only"
  softmax = "softmax without positions (nope) + memory, a third of the steps with keys of other rows"
  eighth, steps = "headline/foreign_eighth_results.csv", "headline/foreign_steps_results.csv"
  big = [Curve(name, "other rows' keys", (Line("", "published_size/results.csv"),), other),
         Curve(control, "own keys only", (Line("", "published_size/control_results.csv", count_length_read=""),), own)]
  small = [
    Curve(name, "polar, other rows", (Line("", eighth, attention="polar", foreign_keys=EIGHTH, corpus="python", seed=7),), other),
    Curve(control, "polar, own keys", (Line("", eighth, attention="polar", foreign_keys="0", corpus="python", seed=8),), own),
    Curve(softmax, "nope, other rows", (Line("", steps, attention="nope", foreign_keys=THIRD, seed=7),), nope)]
  multiples = (1, 2, 4, 8, 16, 32, 64, 128)
  stream, needle = "loss on the validation stream, nats a token", "needles found whole, %"
  return draw("Keys of other rows in training: the loss hardly turns up any more, and needles are found",
              "One seed each. Light bars are 95 % intervals over the needles.", [
    Panel(f"292M: {needle}", "needle_exact", big, 2048, multiples[:-1], trials=True),
    Panel(f"292M: {stream}", "stream_loss", big, 2048, multiples[:-1], note="Two recipes: compare slopes, not levels."),
    Panel(f"42M: {needle}", "needle_exact", small, 512, multiples, trials=True),
    Panel(f"42M: {stream}", "stream_loss", small, 512, multiples)])


PICTURES: dict[str, Callable[[], bytes]] = {"headline/curves.png": headline, "headline/foreign_keys.png": foreign_keys,
                                            "quickstart_grid/curves.png": quickstart_grid}


def _same(path: pathlib.Path, content: bytes) -> bool:
  """Whether a stored picture shows the numbers of a new one, and looks like it."""
  if not path.exists():
    return False
  with Image.open(path) as old, Image.open(io.BytesIO(content)) as new:
    if old.info.get("Numbers") != new.info["Numbers"] or old.size != new.size:
      return False
    difference = np.abs(np.asarray(old.convert("L"), float) - np.asarray(new.convert("L"), float))
  return float(difference.mean()) / 255 <= MOST_DIFFERENT


def main(arguments: Sequence[str]) -> int:
  """Draws the pictures, or with --check compares them with those that are stored."""
  if list(arguments) not in ([], ["--check"]):
    print(f"usage: figures.py [--check], not {' '.join(arguments)!r}", file=sys.stderr)
    return 2
  differ = False
  for name, picture in PICTURES.items():
    content = picture()
    if not arguments:
      (FOLDER / name).write_bytes(content)
    elif not _same(FOLDER / name, content):
      differ = True
      print(f"{name} is not what the files say; python configs/results/figures.py draws it anew")
  return int(differ)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

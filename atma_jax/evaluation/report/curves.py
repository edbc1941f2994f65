"""``curves.png``: the main measures of a sweep against context length, one line per setting.

Up to eight settings have a colour each and are named at the ends of their lines; of more, the first factor decides the colour and
a legend names those. The marker tells the first factor apart and the dashes the others, so that the lines differ without colour,
too. Bars reach from the lowest seed to the highest. (Intervals are in the tables; for two seeds they would be 13 times as long.)
"""

from __future__ import annotations

from collections.abc import Sequence
import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from atma_jax.evaluation.report.comparisons import Setting
from atma_jax.evaluation.report.drawing import GRAY, multiple_label, plain, save, style_axes
from atma_jax.evaluation.report.sweep_tables import MEASURES

PANELS = ("document_loss", "stream_loss", "needle_exact", "needle_accuracy")  # the measures that have a length
COLORS = ("#d55e00", "#0072b2", "#009e73", "#aa3377", "#b8860b", "#56b4e9", "#000000", "#8c564b")  # colour-blind eyes, too
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_LETTERS_PER_INCH = 11  # of titles and of the legend
_LINE_POINTS = 13  # height of a name at the end of a line

Style = tuple[str, object, str]  # colour, dashes, marker


def draw_curves(title: str, settings: Sequence[Setting], panels: Sequence[str] = PANELS) -> bytes | None:
  """The figure as the content of a PNG file, or None if none of its measures was measured.

  Args:
    title: one or more lines above the panels.
    settings: means over seeds; their order decides colours and markers.
    panels: the measures to show, of `MEASURES`.
  """
  panels = [measure for measure in panels if any(s.measure == measure for s in settings)]
  if not panels:
    return None
  styles = line_styles(settings)
  direct = len(styles) <= len(COLORS)
  figure = Figure(figsize=((7.0 if direct else 5.2) * len(panels), 5.0), dpi=140, layout="constrained")
  for axes, measure in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    _draw_panel(axes, measure, settings, styles, direct)
  title = "\n".join(plain(line, _LETTERS_PER_INCH * int(figure.get_figwidth())) for line in title.split("\n")[:3])
  figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, color=GRAY)
  if not direct:
    _add_legend(figure, settings, styles)
  return save(figure, "png")


def line_styles(settings: Sequence[Setting]) -> dict[str, Style]:
  """Colour, dashes and marker of every setting, by its name."""
  names = list(dict.fromkeys(s.name for s in settings))
  first = list(dict.fromkeys(s.labels[:1] for s in settings))
  others = list(dict.fromkeys(s.labels[1:] for s in settings))
  styles: dict[str, Style] = {}
  for s in settings:
    kind = first.index(s.labels[:1])
    color = names.index(s.name) if len(names) <= len(COLORS) else kind
    marker = names.index(s.name) if len(first) == 1 else kind
    dashes = DASHES[others.index(s.labels[1:]) % len(DASHES)]
    styles[s.name] = (COLORS[color % len(COLORS)], dashes, MARKERS[marker % len(MARKERS)])
  return styles


def _draw_panel(axes: Axes, measure: str, settings: Sequence[Setting], styles: dict[str, Style], direct: bool) -> None:
  heading, factor, _ = MEASURES[measure]
  style_axes(axes)
  axes.set_title(heading, loc="left", fontsize=11.5, fontweight="bold")
  chosen = [s for s in settings if s.measure == measure]
  ends = []
  for name, (color, dashes, marker) in styles.items():
    points = sorted((s for s in chosen if s.name == name), key=lambda s: s.multiple)
    if not points:
      continue
    mean = factor * np.array([s.mean for s in points])
    bars = np.abs(factor * np.array([(s.mean - s.least, s.most - s.mean) for s in points]).reshape(-1, 2)).T
    axes.errorbar([s.multiple for s in points], mean, yerr=bars if bars.any() else None, color=color, linestyle=dashes,
                  marker=marker, markersize=6, markerfacecolor=color if dashes == "-" else "white", markeredgewidth=1.4,
                  linewidth=1.8, elinewidth=1.0, capsize=3)
    ends.append((points[-1].multiple, float(mean[-1]), points[0].words, color))
  _set_multiples_axis(axes, sorted({s.multiple for s in chosen}))
  if measure.startswith("needle"):
    axes.set_ylim(-3, 103)
  if direct:
    _name_lines(axes, ends)


def _set_multiples_axis(axes: Axes, multiples: Sequence[float]) -> None:
  """A logarithmic axis in multiples of the training length, which is marked."""
  axes.set_xscale("log", base=2)
  axes.set_xticks(multiples, [multiple_label(m) for m in multiples])
  axes.set_xticks([], minor=True)
  axes.set_xlabel("context length, multiples of the training length")
  if multiples[0] <= 1 <= multiples[-1]:
    axes.axvline(1, color=GRAY, linewidth=1.2, linestyle=":", zorder=0)
    axes.annotate("training length", (1, 1), xycoords=("data", "axes fraction"), xytext=(-3, -2), textcoords="offset points",
                  fontsize=8.5, color=GRAY, ha="right", va="top", rotation=90)
    axes.set_xlim(left=multiples[0] * 2 ** (-0.09 * math.log2(2 * multiples[-1] / multiples[0])))


def _name_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
  """Writes the name of every line beside its end, names that would cover each other one below the other.

  Args:
    axes: holds the lines, and keeps its limits.
    ends: place of the last point in data coordinates, name and colour of every line.
  """
  low, high = axes.get_ylim()
  axes.set_ylim(low, high)
  gap = _LINE_POINTS / (72 * 3.9)  # share of the height of a panel
  ordered = sorted(ends, key=lambda end: end[1])
  heights: list[float] = []
  for _, value, _, _ in ordered:
    heights.append(max((value - low) / (high - low), heights[-1] + gap if heights else 0.0))
  for i in reversed(range(len(heights))):  # down again from the top
    heights[i] = min(heights[i], 1 - gap * (len(heights) - 1 - i))
  for (multiple, value, name, color), height in zip(ordered, heights):
    leader = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    axes.annotate(plain(name), (multiple, value), xycoords="data", xytext=(1.05, height), textcoords="axes fraction",
                  fontsize=9.5, color=color, va="center", annotation_clip=False, arrowprops=leader)


def _add_legend(figure: Figure, settings: Sequence[Setting], styles: dict[str, Style]) -> None:
  """Names the colours of the levels of the first factor below the panels."""
  colors = {" ".join(f"{value}" for _, value in s.labels[:1]) or "base": styles[s.name][0] for s in settings}
  axes = figure.axes[0]
  handles = [axes.plot([], [], color=color, linewidth=1.8)[0] for color in colors.values()]
  names = [plain(name) for name in colors]
  columns = int(figure.get_figwidth() * _LETTERS_PER_INCH / (max(map(len, names)) + 8))  # 8 for the line and the space between
  figure.legend(handles, names, loc="outside lower center", ncols=min(max(columns, 1), 6), frameon=False, fontsize=9)

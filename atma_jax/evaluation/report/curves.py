"""``curves.png``: the main measures of a sweep against context length, one line per setting.

The levels of the first factor are told apart by colour, the combinations of all others by line style and marker. Bars reach
from the lowest seed to the highest. (Intervals are in the tables; for two seeds they would be 13 times as long as the bars.)
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from atma_jax.evaluation.report.comparisons import Setting
from atma_jax.evaluation.report.drawing import GRAY, PALETTE, multiple_label, plain, save, style_axes
from atma_jax.evaluation.report.sweep_tables import MEASURES

PANELS = ("document_loss", "stream_loss", "needle_exact", "needle_accuracy")  # the measures that have a length
STYLES = tuple(zip(("-", "--", ":", "-.") * 2, "os^DvPX*", strict=True))
_MOST_NAMED = 12  # with more settings than this, the legend names the colours only
_LETTERS_PER_INCH = 11  # of the legend


def draw_curves(title: str, settings: Sequence[Setting]) -> bytes | None:
  """The figure as the content of a PNG file, or None if none of its measures was measured."""
  panels = [measure for measure in PANELS if any(s.measure == measure for s in settings)]
  if not panels:
    return None
  figure = Figure(figsize=(5.2 * len(panels), 5.0), dpi=140, layout="constrained")
  styles = line_styles(settings)
  for axes, measure in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    _draw_panel(axes, measure, settings, styles)
  figure.suptitle(plain(title), x=0.01, ha="left", fontsize=9, color=GRAY)
  handles, names = figure.axes[0].get_legend_handles_labels()  # the names are `plain`
  if len(names) > _MOST_NAMED:
    names = [name.split(" ")[0] for name in names]
  legend = dict(zip(names, handles, strict=True))
  columns = int(figure.get_figwidth() * _LETTERS_PER_INCH / (max(map(len, legend)) + 8))  # 8 for the line and the space between
  figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(max(columns, 1), 6), frameon=False,
                fontsize=9)
  return save(figure, "png")


def line_styles(settings: Sequence[Setting]) -> dict[str, tuple[str, str, str]]:
  """Colour, line style and marker of every setting, by its name."""
  first = list(dict.fromkeys(s.labels[:1] for s in settings))
  others = list(dict.fromkeys(s.labels[1:] for s in settings))
  return {s.name: (PALETTE[first.index(s.labels[:1]) % len(PALETTE)], *STYLES[others.index(s.labels[1:]) % len(STYLES)])
          for s in settings}


def _draw_panel(axes: Axes, measure: str, settings: Sequence[Setting], styles: dict[str, tuple[str, str, str]]) -> None:
  heading, factor, _ = MEASURES[measure]
  style_axes(axes)
  axes.set_title(heading, loc="left", fontsize=11, fontweight="bold")
  chosen = [s for s in settings if s.measure == measure]
  for name, (color, line, marker) in styles.items():
    points = sorted((s for s in chosen if s.name == name), key=lambda s: s.multiple)
    mean = factor * np.array([s.mean for s in points])
    bars = np.abs(factor * np.array([(s.mean - s.least, s.most - s.mean) for s in points]).reshape(-1, 2)).T
    axes.errorbar([s.multiple for s in points], mean, yerr=bars if bars.any() else None, color=color, linestyle=line,
                  marker=marker, markersize=5, linewidth=1.6, elinewidth=1.0, capsize=3, label=plain(name))
  multiples = sorted({s.multiple for s in chosen})
  axes.set_xscale("log", base=2)
  axes.set_xticks(multiples, [multiple_label(m) for m in multiples])
  axes.set_xticks([], minor=True)
  axes.set_xlabel("context, multiples of the training length")
  if measure.startswith("needle"):
    axes.set_ylim(-3, 103)

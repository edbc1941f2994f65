"""One PNG of a sweep: its main measures against the context length, a line a setting.

The levels of the first axis are colours, the combinations of the others line styles and markers; bars are the intervals
over seeds, where there is more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from atma_jax.ablation.contrasts import Setting
from atma_jax.ablation.tables import MEASURES
from atma_jax.evaluation.plots import GRAY, quiet, save, times

PANELS = ("document_loss", "stream_loss", "needle_accuracy")  # of `MEASURES`, those that have a length
COLORS = ("#0b63a5", "#d95f02", "#1b8a5a", "#8a3ffc", "#c2185b", "#6b7280", "#00838f", "#7a5900")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_NAMED = 12  # settings; of more the legend names the colours only


def plot_curves(path: pathlib.Path, title: str, settings: Sequence[Setting]) -> pathlib.Path:
  """Writes the figure; raises `UserError` where `path` cannot be written."""
  panels = [measure for measure in PANELS if any(s.measure == measure for s in settings)] or list(PANELS[:1])
  figure = Figure(figsize=(5.2 * len(panels), 5.0), dpi=140, layout="constrained")
  looks = looks_of(settings)
  for axes, measure in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    _panel(axes, measure, settings, looks)
  figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=GRAY)
  handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
  if len(looks) > _NAMED:
    handles = {label.split(" ")[0]: handle for label, handle in handles.items()}
  if handles:
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
  save(figure, path)
  return path


def looks_of(settings: Sequence[Setting]) -> dict[str, tuple[str, str, str]]:
  """Colour, line style and marker of every setting."""
  first = list(dict.fromkeys(s.labels[:1] for s in settings))
  others = list(dict.fromkeys(s.labels[1:] for s in settings))
  return {s.name: (COLORS[first.index(s.labels[:1]) % len(COLORS)], *STYLES[others.index(s.labels[1:]) % len(STYLES)])
          for s in settings}


def _panel(axes: Axes, measure: str, settings: Sequence[Setting], looks: dict[str, tuple[str, str, str]]) -> None:
  heading, factor, _ = MEASURES[measure]
  quiet(axes)
  axes.set_title(heading, loc="left", fontsize=11, fontweight="bold")
  chosen = [s for s in settings if s.measure == measure]
  for name, (color, line, marker) in looks.items():
    points = sorted((s for s in chosen if s.name == name), key=lambda s: s.multiple)
    mean = factor * np.array([s.mean for s in points])
    half = np.array([0.0 if s.high is None else factor * (s.high - s.mean) for s in points])
    axes.errorbar([s.multiple for s in points], mean, yerr=half if half.any() else None, color=color, linestyle=line,
                  marker=marker, markersize=5, linewidth=1.6, elinewidth=1.0, capsize=3, label=name)
  multiples = sorted({s.multiple for s in chosen})
  axes.set_xscale("log", base=2)
  axes.set_xticks(multiples, [times(m) for m in multiples])
  axes.set_xticks([], minor=True)
  axes.set_xlabel("context, multiples of the training length")
  if measure == "needle_accuracy":
    axes.set_ylim(-3, 103)

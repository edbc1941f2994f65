"""Parts of the PNG plots of one checkpoint.

The horizontal axis is logarithmic, in tokens and in multiples of the training length, which is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atma_jax.evaluation.records import Record
from atma_jax.evaluation.report.drawing import GRAY, multiple_label, plain, save, short_tokens, style_axes, values_and_errors


def new_plot(title: str, heading: str) -> tuple[Figure, Axes]:
  """An empty plot with a bold heading above a small title."""
  figure = Figure(figsize=(7.6, 4.8), dpi=160, layout="constrained")
  axes = figure.add_subplot()
  axes.set_title(heading, loc="left", fontsize=13, fontweight="bold", pad=22)
  axes.text(0, 1.02, plain(title), transform=axes.transAxes, fontsize=9, color=GRAY, va="bottom")
  style_axes(axes)
  return figure, axes


def draw_series(axes: Axes, records: Sequence[Record], label: str, color: str, marker: str, scale: float = 1.0) -> None:
  """Draws records against their length with error bars; missing values leave a gap."""
  records = sorted(records, key=lambda r: r["length"])
  values, errors = values_and_errors(records, scale)
  axes.errorbar([r["length"] for r in records], values, yerr=errors, color=color, marker=marker, markersize=6, linewidth=1.8,
                elinewidth=1.1, capsize=3, label=label)


def set_length_axis(axes: Axes, low: int, high: int, training_length: int, label: str) -> None:
  """Makes a log2 axis over [low, high] with ticks at the training length times powers of two, at most nine."""
  axes.set_xscale("log", base=2)
  first, last = (math.log2(n / training_length) for n in (low, high))
  powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
  every = math.ceil(len(powers) / 9) or 1
  ticks = [training_length * 2.0**p for p in powers if p % every == 0] or [low, high]
  axes.set_xticks(ticks, [f"{short_tokens(t)}\n{multiple_label(t / training_length)}" for t in ticks])
  axes.set_xticks([], minor=True)
  axes.set_xlim(low / 1.25, high * 1.25)
  axes.set_xlabel(label)
  if low / 1.25 <= training_length <= high * 1.25:
    axes.axvline(training_length, color=GRAY, linewidth=1.2, linestyle=":")
    axes.annotate("training length", (training_length, 1), xycoords=("data", "axes fraction"), xytext=(4, -3),
                  textcoords="offset points", fontsize=8.5, color=GRAY, va="top")


def png(figure: Figure, axes: Axes) -> bytes:
  """The finished plot, with a legend, as the content of a PNG file."""
  axes.legend(frameon=False, fontsize=9, loc="best")
  return save(figure, "png")

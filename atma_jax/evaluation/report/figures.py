"""SVG figures of the report: one series or one panel per checkpoint, lengths on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from atma_jax.evaluation.records import Record
from atma_jax.evaluation.report.drawing import (
  GRAY,
  PALETTE,
  draw_position_curve,
  save,
  short_tokens,
  style_axes,
  values_and_errors,
)

Series = Mapping[str, Sequence[Record]]  # the records of each checkpoint, by its label; one per length

_MARKERS = "os^Dvp*X"


def loss_panels(panels: Mapping[str, Series], axis: str = "loss (nats per token)", *, zero: bool = False) -> bytes:
  """One panel per measure, by its heading, and in it one line with standard errors per checkpoint; `zero` marks zero."""

  def draw(axes: Axes, series: Series) -> None:
    _draw_lines(axes, series)
    if zero:
      axes.axhline(0, color=GRAY, linewidth=1)

  return _panels(panels, draw, axis)


def accuracy_panels(panels: Mapping[str, Series], chance: bool, across: str = "length (tokens)") -> bytes:
  """Like `loss_panels` in percent, on an axis from 0 to 100.

  Args:
    panels: by their headings.
    chance: draws what guessing would give, where the records of a panel agree on it.
    across: what the records' lengths are.
  """

  def draw(axes: Axes, series: Series) -> None:
    _draw_lines(axes, series, scale=100)
    levels = {record.get("chance") for records in series.values() for record in records}
    if chance and len(levels) == 1 and (level := levels.pop()) is not None:
      axes.axhline(100 * level, color=GRAY, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_ylim(-4, 104)

  return _panels(panels, draw, "accuracy (%)", across)


def position_curves(curves: Mapping[str, Record]) -> bytes:
  """The loss by position of every checkpoint, by its label, with standard errors."""
  figure, (axes,) = _new_figure(1, 5.2)
  for index, (label, record) in enumerate(curves.items()):
    draw_position_curve(axes, record, color=PALETTE[index % len(PALETTE)], alpha=0.15, linewidth=1.7, label=label)
  _set_length_axis(axes, [1, *(record["length"] for record in curves.values())], "position (tokens)")
  axes.set_ylabel("loss at this position (nats per token)")
  _add_legend(figure, axes)
  return _svg(figure)


def half_life_histograms(panels: Mapping[str, Mapping[str, Sequence[float | None]]]) -> bytes:
  """Histograms of the half-lives of all heads in tokens: one panel per measure, one outline per checkpoint.

  A half-life of None is infinite and counted in a bin of its own at the right.
  """
  figure, all_axes = _new_figure(len(panels), 4.6)
  values = [v for series in panels.values() for heads in series.values() for v in heads if v is not None and v > 0]
  low, high = (math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1) if values else (0, 1)
  edges = list(range(low, high + 2))
  for axes, (title, series) in zip(all_axes, panels.items()):
    for index, (label, heads) in enumerate(series.items()):
      where = [high + 0.5 if v is None else math.log2(max(v, 2.0**low)) for v in heads]
      color = PALETTE[index % len(PALETTE)]
      axes.hist(where, edges, color=color, alpha=0.25)
      axes.hist(where, edges, color=color, histtype="step", linewidth=1.6, label=label)
    _set_heading(axes, title)
    endless = any(v is None for heads in series.values() for v in heads)
    every = max(1, math.ceil((high - low) / 6))
    ticks = [t for t in range(low, high + 1, every) if not endless or t <= high - every / 2]
    labels = [short_tokens(2.0**t) for t in ticks]
    axes.set_xticks([*ticks, high + 0.5] if endless else ticks, [*labels, "never"] if endless else labels)
    axes.set_xlabel("half-life (tokens)")
    locator = axes.yaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)
    locator.set_params(integer=True)
  all_axes[0].set_ylabel("heads")
  _add_legend(figure, all_axes[0])
  return _svg(figure)


def layer_panels(panels: Mapping[str, Mapping[int, Sequence[Record]]], axis: str) -> bytes:
  """A diagnostic against length: one panel per checkpoint, one line per layer, lighter with depth."""
  figure, all_axes = _new_figure(len(panels), 4.6, share=True)
  layers = sorted({layer for lines in panels.values() for layer in lines})
  shade = {layer: 0.1 + 0.75 * i / max(1, len(layers) - 1) for i, layer in enumerate(layers)}
  ramp = matplotlib.colormaps["viridis"]
  for axes, (title, lines) in zip(all_axes, panels.items()):
    for layer, records in sorted(lines.items()):
      records = sorted(records, key=lambda r: r["length"])
      axes.plot([r["length"] for r in records], [np.nan if r["value"] is None else r["value"] for r in records],
                color=ramp(shade[layer]), marker="o", markersize=3.5, linewidth=1.4,
                label=f"layer {layer}" if len(layers) <= 8 or layer in (layers[0], layers[-1]) else None)
    _set_heading(axes, title)
    _set_length_axis(axes, [r["length"] for records in lines.values() for r in records], "length (tokens)")
  all_axes[0].set_ylabel(axis)
  _add_legend(figure, all_axes[0])
  return _svg(figure)


def _panels(panels: Mapping[str, Series], draw: Callable[[Axes, Series], None], axis: str,
            across: str = "length (tokens)") -> bytes:
  figure, all_axes = _new_figure(len(panels), 4.6)
  for axes, (title, series) in zip(all_axes, panels.items()):
    draw(axes, series)
    _set_heading(axes, title)
    _set_length_axis(axes, [r["length"] for records in series.values() for r in records], across)
  all_axes[0].set_ylabel(axis)
  _add_legend(figure, max(all_axes, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
  return _svg(figure)


def _new_figure(count: int, width: float, share: bool = False) -> tuple[Figure, list[Axes]]:
  """A figure of `count` panels, at most three in a row; `share` gives all of them the same vertical axis."""
  columns = min(count, 3)
  rows = -(-count // columns)
  figure = Figure(figsize=(width * columns if count > 1 else 7.0, 3.5 * rows + 0.35), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharey=share)
  all_axes = list(grid.flat)
  for axes in all_axes[count:]:
    axes.remove()
  for axes in all_axes[:count]:
    style_axes(axes)
  return figure, all_axes[:count]


def _draw_lines(axes: Axes, series: Series, scale: float = 1.0) -> None:
  for index, (label, records) in enumerate(series.items()):
    records = sorted(records, key=lambda r: r["length"])
    values, errors = values_and_errors(records, scale)
    zero = _place_of_zero([r["length"] for records in series.values() for r in records])
    axes.errorbar([r["length"] or zero for r in records], values, yerr=errors, color=PALETTE[index % len(PALETTE)],
                  marker=_MARKERS[index % len(_MARKERS)], markersize=5, linewidth=1.7, elinewidth=1, capsize=2.5, label=label)


def _set_heading(axes: Axes, text: str) -> None:
  axes.set_title(text if len(text) <= 52 else text[:51] + "…", loc="left", fontsize=10.5, fontweight="bold", pad=8)


def _set_length_axis(axes: Axes, lengths: Sequence[int], label: str) -> None:
  """Makes a log2 axis with ticks at the lengths, or at powers of two for a curve that starts at 1."""
  axes.set_xscale("log", base=2)
  zero = _place_of_zero(lengths)
  places = sorted({float(n or zero) for n in lengths})
  if 1 in lengths:
    places = [2.0**p for p in range(math.floor(math.log2(max(lengths))) + 1)]
  spacing, ticks = max(0.9, math.log2(places[-1] / places[0]) / 6), []
  for place in places:
    if not ticks or math.log2(place / ticks[-1]) >= spacing:
      ticks.append(place)
  axes.set_xticks(ticks, ["0" if 0 in lengths and t == zero else short_tokens(t) for t in ticks])
  axes.set_xticks([], minor=True)
  axes.set_xlim(places[0] / 1.2, max(*places, *lengths) * 1.2)
  axes.set_xlabel(label)


def _place_of_zero(lengths: Sequence[int]) -> float:
  """Where a logarithmic axis shows the length 0: at half the least other length."""
  return min((n for n in lengths if n), default=2) / 2


def _add_legend(figure: Figure, axes: Axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  if labels:
    width = 0.075 * max(map(len, labels)) + 0.7  # inches that the longest entry takes
    columns = max(1, min(len(labels), 4, int(figure.get_figwidth() / width)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _svg(figure: Figure) -> bytes:
  return save(figure, "svg")

"""Pictures of the report, as SVG: every series is one checkpoint, every horizontal axis of lengths is logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import io
import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from atma_jax.evaluation.needle import CHANCE
from atma_jax.evaluation.plots import GRAY, short_tokens

Record = dict[str, Any]
Series = Mapping[str, Sequence[Record]]  # label of a checkpoint -> records, a length each

PALETTE = ("#0b63a5", "#d95f02", "#1b8a5a", "#7b4fb3", "#b8860b", "#c2255c", "#0c8599", "#5c4033")
_MARKERS = "os^Dvp*X"


def loss_panels(panels: Mapping[str, Series], axis: str = "loss (nats per token)") -> bytes:
  """A panel a measure, the checkpoints' lines in each, with standard errors."""
  return _panels(panels, lambda axes, series: _lines(axes, series), axis)


def accuracy_panels(panels: Mapping[str, Series], chance: bool) -> bytes:
  """The same in percent, with intervals, from 0 to 100."""

  def draw(axes: Axes, series: Series) -> None:
    _lines(axes, series, scale=100)
    if chance:
      axes.axhline(100 * CHANCE, color=GRAY, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_ylim(-4, 104)

  return _panels(panels, draw, "accuracy (%)")


def position_curves(curves: Mapping[str, Record]) -> bytes:
  """L(t) of every checkpoint with its standard error."""
  figure, (axes,) = _figure(1, 5.2)
  for index, (label, record) in enumerate(curves.items()):
    bins = [b for b in record["bins"] if b["value"] is not None]
    center = np.array([math.sqrt((b["start"] + 1) * b["stop"]) for b in bins])
    value = np.array([b["value"] for b in bins])
    error = np.array([b["standard_error"] or 0.0 for b in bins])
    color = PALETTE[index % len(PALETTE)]
    axes.fill_between(center, value - error, value + error, color=color, alpha=0.15, linewidth=0)
    axes.plot(center, value, color=color, linewidth=1.7, label=label)
  _length_axis(axes, [1, *(record["length"] for record in curves.values())], "position (tokens)")
  axes.set_ylabel("loss at this position (nats per token)")
  _legend(figure, axes)
  return _svg(figure)


def half_life_histograms(panels: Mapping[str, Mapping[str, Sequence[float | None]]]) -> bytes:
  """Half-lives in tokens of all heads, None being without end: a panel a measure, outlined bars a checkpoint."""
  figure, all_axes = _figure(len(panels), 4.6)
  values = [v for series in panels.values() for heads in series.values() for v in heads if v is not None and v > 0]
  low, high = (math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1) if values else (0, 1)
  edges = np.arange(low, high + 2)  # the last bin is for heads that never forget
  for axes, (title, series) in zip(all_axes, panels.items()):
    for index, (label, heads) in enumerate(series.items()):
      where = [high + 0.5 if v is None else math.log2(max(v, 2.0**low)) for v in heads]
      color = PALETTE[index % len(PALETTE)]
      axes.hist(where, edges, color=color, alpha=0.25)
      axes.hist(where, edges, color=color, histtype="step", linewidth=1.6, label=label)
    _heading(axes, title)
    stride = max(1, (high - low) // 6)
    ticks = list(range(low, high + 1, stride))
    axes.set_xticks(ticks, [short_tokens(2.0**t) for t in ticks])
    if any(v is None for heads in series.values() for v in heads):
      axes.set_xticks([*ticks, high + 0.5], [*(short_tokens(2.0**t) for t in ticks), "never"])
    axes.set_xlabel("half-life (tokens)")
    axes.yaxis.get_major_locator().set_params(integer=True)
  all_axes[0].set_ylabel("heads")
  _legend(figure, all_axes[0])
  return _svg(figure)


def layer_panels(panels: Mapping[str, Mapping[int, Sequence[Record]]], axis: str) -> bytes:
  """A diagnostic against length, a panel a checkpoint, a line a layer, dark to light with depth."""
  figure, all_axes = _figure(len(panels), 4.6, share=True)
  layers = sorted({layer for lines in panels.values() for layer in lines})
  shade = {layer: 0.1 + 0.75 * i / max(1, len(layers) - 1) for i, layer in enumerate(layers)}
  ramp = matplotlib.colormaps["viridis"]
  for axes, (title, lines) in zip(all_axes, panels.items()):
    for layer, records in sorted(lines.items()):
      records = sorted(records, key=lambda r: r["length"])
      axes.plot([r["length"] for r in records], [np.nan if r["value"] is None else r["value"] for r in records],
                color=ramp(shade[layer]), marker="o", markersize=3.5, linewidth=1.4,
                label=f"layer {layer}" if len(layers) <= 8 or layer in (layers[0], layers[-1]) else None)
    _heading(axes, title)
    _length_axis(axes, [r["length"] for records in lines.values() for r in records], "length (tokens)")
  all_axes[0].set_ylabel(axis)
  _legend(figure, all_axes[0])
  return _svg(figure)


def _panels(panels: Mapping[str, Series], draw: Callable[[Axes, Series], None], axis: str) -> bytes:
  figure, all_axes = _figure(len(panels), 4.6)
  for axes, (title, series) in zip(all_axes, panels.items()):
    draw(axes, series)
    _heading(axes, title)
    _length_axis(axes, [r["length"] for records in series.values() for r in records], "length (tokens)")
  all_axes[0].set_ylabel(axis)
  _legend(figure, max(all_axes, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
  return _svg(figure)


def _figure(count: int, width: float, share: bool = False) -> tuple[Figure, list[Axes]]:
  """Panels side by side, three a row at most."""
  columns = min(count, 3)
  rows = -(-count // columns)
  figure = Figure(figsize=(width * columns if count > 1 else 7.0, 3.5 * rows + 0.35), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharey=share)
  all_axes = list(grid.flat)
  for axes in all_axes[count:]:
    axes.remove()
  for axes in all_axes[:count]:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
  return figure, all_axes[:count]


def _lines(axes: Axes, series: Series, scale: float = 1.0) -> None:
  for index, (label, records) in enumerate(series.items()):
    records = sorted(records, key=lambda r: r["length"])
    value = np.array([np.nan if r["value"] is None else r["value"] for r in records]) * scale
    bounds = np.array([_bounds(r) for r in records]) * scale
    axes.errorbar([max(r["length"], 1) for r in records], value, yerr=np.maximum(0, [value - bounds[:, 0], bounds[:, 1] - value]),
                  color=PALETTE[index % len(PALETTE)], marker=_MARKERS[index % len(_MARKERS)], markersize=5, linewidth=1.7,
                  elinewidth=1, capsize=2.5, label=label)


def _bounds(record: Record) -> tuple[float, float]:
  if record["value"] is None:
    return np.nan, np.nan
  if record.get("interval") is not None:
    return tuple(record["interval"])
  error = record.get("standard_error") or 0.0
  return record["value"] - error, record["value"] + error


def _heading(axes: Axes, text: str) -> None:
  axes.set_title(text if len(text) <= 52 else text[:51] + "…", loc="left", fontsize=10.5, fontweight="bold", pad=8)


def _length_axis(axes: Axes, lengths: Sequence[int], label: str) -> None:
  """log2, with a tick at every length, or at a few powers of two where those are many."""
  axes.set_xscale("log", base=2)
  ticks = sorted({max(n, 1) for n in lengths})
  if len(ticks) > 7 or (ticks[0] == 1 and len(ticks) == 2):
    low, high = math.ceil(math.log2(ticks[0])), math.floor(math.log2(ticks[-1]))
    ticks = [2**p for p in range(low, high + 1, max(1, math.ceil((high - low + 1) / 7)))]
  axes.set_xticks(ticks, [short_tokens(t) if t > 1 or min(lengths) == 1 else "0" for t in ticks])
  axes.set_xticks([], minor=True)
  axes.set_xlim(min(max(n, 1) for n in lengths) / 1.2, max(max(n, 1) for n in lengths) * 1.2)
  axes.set_xlabel(label)


def _legend(figure: Figure, axes: Axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  if labels:
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)


def _svg(figure: Figure) -> bytes:
  content = io.BytesIO()
  figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
  return content.getvalue()

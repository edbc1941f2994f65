"""PNG plots of the records of one checkpoint: loss against length, loss by position, needle against distance.

Every horizontal axis is logarithmic, in tokens and in multiples of the training length, which is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
import io
import math
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from atma_jax.errors import UserError

Record = dict[str, Any]
BLUE, ORANGE, GREEN, GRAY = "#0b63a5", "#d95f02", "#1b8a5a", "#6b7280"
CHANCE = 0.1  # that a digit is right


def plot_loss_vs_length(path: pathlib.Path, title: str, training_length: int, *, document: Sequence[Record],
                        stream: Sequence[Record]) -> None:
  """Document loss and stream loss with their standard errors."""
  figure, axes = _figure(title, "Loss against context length")
  if document:
    _line(axes, document, f"documents, nested prefixes ({document[0]['n']} documents)", BLUE, "o")
  if stream:
    _line(axes, stream, "validation stream", ORANGE, "s")
  lengths = [r["length"] for r in [*document, *stream]]
  _length_axis(axes, min(lengths), max(lengths), training_length, "context length (tokens, multiples of training)")
  axes.set_ylabel("loss (nats per token, ± standard error)")
  _save(figure, axes, path)


def plot_loss_by_position(path: pathlib.Path, title: str, training_length: int, *, curve: Record) -> None:
  """L(t): the loss of the token at position t, averaged over documents, in bins of equal logarithmic width."""
  figure, axes = _figure(title, f"Loss by position ({curve['n']} documents of {short_tokens(curve['length'])} tokens)")
  bins = [b for b in curve["bins"] if b["value"] is not None]
  center = np.array([math.sqrt((b["start"] + 1) * b["stop"]) for b in bins])
  value = np.array([b["value"] for b in bins])
  error = np.array([b["standard_error"] or 0.0 for b in bins])
  axes.fill_between(center, value - error, value + error, color=BLUE, alpha=0.18, linewidth=0)
  axes.plot(center, value, color=BLUE, linewidth=1.8, label="mean over documents ± standard error")
  _length_axis(axes, 1, curve["length"], training_length, "position (tokens, multiples of training)")
  axes.set_ylabel("loss at this position (nats per token)")
  _save(figure, axes, path)


def plot_needle_vs_distance(path: pathlib.Path, title: str, training_length: int, *, accuracy: Sequence[Record],
                            exact: Sequence[Record], absent: Sequence[Record]) -> None:
  """Needle accuracy against distance, with the needle-absent baseline and the level of chance."""
  figure, axes = _figure(title, f"Induction needle ({exact[0]['n']} trials a distance)")
  _line(axes, accuracy, "needle present: digits right", BLUE, "o", scale=100)
  _line(axes, exact, "needle present: all five right", GREEN, "^", scale=100)
  _line(axes, absent, "needle absent: digits right", ORANGE, "s", scale=100)
  axes.axhline(100 * CHANCE, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2, label="chance, one digit of ten")
  lengths = [r["length"] for r in accuracy]
  _length_axis(axes, min(lengths), max(lengths), training_length, "distance (tokens, multiples of training)")
  axes.set_ylim(-3, 110)
  axes.set_yticks(range(0, 101, 20))
  axes.set_ylabel("accuracy (%, 95 % Wilson interval)")
  _save(figure, axes, path)


def _figure(title: str, heading: str) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(7.6, 4.8), dpi=160, layout="constrained")
  axes = figure.add_subplot()
  axes.set_title(heading, loc="left", fontsize=13, fontweight="bold", pad=22)
  axes.text(0, 1.02, title, transform=axes.transAxes, fontsize=9, color=GRAY, va="bottom")
  style_axes(axes)
  return figure, axes


def style_axes(axes: Axes) -> None:
  """Horizontal grid lines behind the data, no frame above and to the right."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
  axes.set_axisbelow(True)


def _line(axes: Axes, records: Sequence[Record], label: str, color: str, marker: str, scale: float = 1.0) -> None:
  """One series with its interval or standard error as bars; values that are not finite leave a gap."""
  records = sorted(records, key=lambda r: r["length"])
  length = np.array([r["length"] for r in records])
  value = np.array([np.nan if r["value"] is None else r["value"] for r in records]) * scale
  bounds = np.array([_bounds(r) for r in records]) * scale
  axes.errorbar(length, value, yerr=np.maximum(0.0, [value - bounds[:, 0], bounds[:, 1] - value]), color=color,
                marker=marker, markersize=6, linewidth=1.8, elinewidth=1.1, capsize=3, label=label)


def _bounds(record: Record) -> tuple[float, float]:
  if record["value"] is None:
    return np.nan, np.nan
  if record["interval"] is not None:
    return tuple(record["interval"])
  error = record["standard_error"] or 0.0
  return record["value"] - error, record["value"] + error


def _length_axis(axes: Axes, low: int, high: int, training_length: int, label: str) -> None:
  """A log2 axis over [low, high] with a tick at the training length times every power of two, or every few."""
  axes.set_xscale("log", base=2)
  first, last = (math.log2(n / training_length) for n in (low, high))
  powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
  stride = math.ceil(len(powers) / 9) or 1
  ticks = [training_length * 2.0**p for p in powers if p % stride == 0] or [low, high]
  axes.set_xticks(ticks, [f"{short_tokens(t)}\n{multiple_label(t / training_length)}" for t in ticks])
  axes.set_xticks([], minor=True)
  axes.set_xlim(low / 1.25, high * 1.25)
  axes.set_xlabel(label)
  if low / 1.25 <= training_length <= high * 1.25:
    axes.axvline(training_length, color=GRAY, linewidth=1.2, linestyle=":")
    axes.annotate("training length", (training_length, 1), xycoords=("data", "axes fraction"), xytext=(4, -3),
                  textcoords="offset points", fontsize=8.5, color=GRAY, va="top")


def short_tokens(n: float) -> str:
  """2048 -> 2K, 1000 -> 1000, 1.5 -> 1.5."""
  for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
    if n >= size and n % (size / 4) == 0:
      return f"{n / size:g}{unit}"
  return f"{n:.3g}" if n < 100 else f"{n:.0f}"


def multiple_label(ratio: float) -> str:
  """2.0 -> 2×, 0.125 -> 1/8×."""
  return f"{ratio:g}×" if ratio >= 1 or ratio == 0 else f"1/{1 / ratio:g}×"


def _save(figure: Figure, axes: Axes, path: pathlib.Path) -> None:
  axes.legend(frameon=False, fontsize=9, loc="best")
  content = io.BytesIO()
  figure.savefig(content, format="png")
  try:
    path.write_bytes(content.getvalue())
  except OSError as error:
    raise UserError(f"--output: cannot write {path}: {error.strerror or error}") from error

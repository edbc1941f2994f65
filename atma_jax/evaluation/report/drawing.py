"""What all figures share: colours, axis style, error bars of records, and labels of token counts."""

from __future__ import annotations

from collections.abc import Sequence
import io
import math

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
import numpy as np

from atma_jax.evaluation.records import Record

BLUE, ORANGE, GREEN, GRAY = "#0b63a5", "#d95f02", "#1b8a5a", "#6b7280"
PALETTE = (BLUE, ORANGE, GREEN, "#7b4fb3", "#b8860b", "#c2255c", "#0c8599", "#5c4033")


_LONGEST_NAME = 80  # characters of a name in figures and tables


def plain(name: str, most: int = _LONGEST_NAME) -> str:
  """A name as figures and tables show it: one line of at most 80 characters that print, or of at most `most`.

  A legend would leave out a name that begins with an underscore, so that a space is put before it.
  """
  text = _printable(" ".join(name.split())) or "(no name)"
  text = text if len(text) <= most else text[:most - 1] + "…"
  return f" {text}" if text.startswith("_") else text


def _printable(text: str) -> str:
  """The text with what does not print, but for the ends of lines, replaced: an SVG must not hold it."""
  return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def save(figure: Figure, kind: str) -> bytes:
  """The figure as the content of a file, every text as it stands: a dollar in a name begins no formula.

  Args:
    figure: is finished.
    kind: "png" or "svg".
  """
  for text in figure.findobj(Text):
    assert isinstance(text, Text)
    text.set_parse_math(False)
    text.set_text(_printable(text.get_text()))
  content, metadata = io.BytesIO(), {"Date": None, "Creator": None} if kind == "svg" else None
  figure.savefig(content, format=kind, metadata=metadata)
  return content.getvalue()


def style_axes(axes: Axes) -> None:
  """Draws horizontal grid lines behind the data and removes the frame at the top and on the right."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
  axes.set_axisbelow(True)


def values_and_errors(records: Sequence[Record], scale: float = 1.0) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, "2 N"]]:
  """Values of records and the lengths of their error bars, downwards and upwards; missing values are NaN.

  A bar spans the record's interval or, without one, one standard error to either side.
  """
  values = np.array([math.nan if r["value"] is None else r["value"] for r in records]) * scale
  bounds = np.array([_bounds(r) for r in records]) * scale
  return values, np.maximum(0.0, [values - bounds[:, 0], bounds[:, 1] - values])


def _bounds(record: Record) -> tuple[float, float]:
  if record["value"] is None:
    return math.nan, math.nan
  if record.get("interval") is not None:
    low, high = record["interval"]
    return low, high
  error = record.get("standard_error") or 0.0
  return record["value"] - error, record["value"] + error


def draw_position_curve(axes: Axes, record: Record, *, color: str, alpha: float, linewidth: float, label: str) -> None:
  """Draws the bins of a loss by position, each at its geometric centre, within a band of one standard error."""
  bins = [b for b in record["bins"] if b["value"] is not None]
  center = np.array([math.sqrt((b["start"] + 1) * b["stop"]) for b in bins])
  value = np.array([b["value"] for b in bins])
  error = np.array([b["standard_error"] or 0.0 for b in bins])
  axes.fill_between(center, value - error, value + error, color=color, alpha=alpha, linewidth=0)
  axes.plot(center, value, color=color, linewidth=linewidth, label=label)


def short_tokens(n: float) -> str:
  """A number of tokens as an axis shows it: 2048 -> 2K, 1000 -> 1000, 1.5 -> 1.5."""
  for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
    if n >= size and n % (size / 4) == 0:
      return f"{n / size:g}{unit}"
  return f"{n:.3g}" if n < 100 else f"{n:.0f}"


def multiple_label(ratio: float) -> str:
  """A multiple of the training length as an axis shows it: 2.0 -> 2×, 0.125 -> 1/8×."""
  return f"{ratio:g}×" if ratio >= 1 or ratio == 0 else f"1/{1 / ratio:g}×"

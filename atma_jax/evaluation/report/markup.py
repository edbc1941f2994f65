"""HTML of the report: tables, heat maps and embedded figures. All text is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
import html
from typing import Any

from atma_jax.evaluation.records import Record
from atma_jax.evaluation.report.drawing import short_tokens
from atma_jax.evaluation.report.runs import Run, lengths_of


def image(svg: bytes, alt: str) -> str:
  """A figure inside the page, with its text alternative."""
  return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], classes: str = "") -> str:
  """A table whose cells are values or pairs of a value and the attributes of its cell."""

  def cell(value: Any) -> str:
    text, attributes = value if isinstance(value, tuple) else (value, "")
    return f"<td {attributes}>{html.escape(str(text))}</td>"

  top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
  body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
  return f'<div class="wide"><table class="{classes}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def value_table(runs: Sequence[Run], headings: Mapping[str, str], digits: int) -> str:
  """One row per checkpoint and measure, one column per length; `headings` says what the measures are called."""
  lengths = lengths_of(runs, headings)
  rows = []
  for run in runs:
    for measure, heading in headings.items():
      found = {r["length"]: r for r in run.select(measure)}
      if found:
        rows.append([run.label, heading, *(_value_cell(found.get(n), digits) for n in lengths)])
  return table(["checkpoint", "measure", *map(short_tokens, lengths)], rows, "numbers")


def _value_cell(record: Record | None, digits: int) -> Any:
  if record is None:
    return ""
  if record["value"] is None:
    return ("out of memory" if record.get("status") == "out_of_memory" else "not finite"), 'class="bad"'
  return f"{record['value']:.{digits}f}", f'title="{html.escape(uncertainty(record, 1, digits))}"'


def uncertainty(record: Record, scale: float, digits: int) -> str:
  """Interval or standard error of a record, and its number of samples, in words."""
  if record.get("interval"):
    low, high = (f"{scale * bound:.{digits}f}" for bound in record["interval"])
    chance = f", by chance {scale * record['chance']:.3g}" if record.get("chance") is not None else ""
    return f"95 % interval {low} to {high}, n = {record['n']}{chance}"
  if record.get("standard_error") is not None:
    return f"± {scale * record['standard_error']:.{digits}f} standard error, n = {record['n']}"
  return f"n = {record['n']}"


def heatmap(caption: str, rows: Mapping[str, Mapping[int, Record]], lengths: Sequence[int]) -> str:
  """Shares as coloured percentages: one row per label, one column per length."""
  head = "".join(f"<th>{short_tokens(n)}</th>" for n in lengths)
  body = "".join(f"<tr><th>{html.escape(label)}</th>{''.join(_heat_cell(found.get(n)) for n in lengths)}</tr>"
                 for label, found in rows.items())
  title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
  return f'<table class="heat">{title}<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _heat_cell(record: Record | None) -> str:
  if record is None:
    return '<td class="none"></td>'
  if record["value"] is None:
    return f'<td class="bad" title="{html.escape(str(record.get("reason", "")))}">no memory</td>'
  share = record["value"]
  hue, light = 8 + 130 * share, 88 - 42 * abs(share - 0.5) * (share > 0.5) - 12 * (share < 0.5) * (0.5 - share)
  ink = "#fff" if light < 60 else "#111827"
  return (f'<td style="background:hsl({hue:.0f} 55% {light:.0f}%);color:{ink}" '
          f'title="{html.escape(uncertainty(record, 100, 1))}">{100 * share:.0f}</td>')


def tabs(panes: Mapping[str, str]) -> str:
  """Panes of HTML of which one is shown at a time, chosen by buttons with their titles."""
  buttons = "".join(f'<button data-pane="{i}" class="{"on" if i == 0 else ""}">{html.escape(title)}</button>'
                    for i, title in enumerate(panes))
  bodies = "".join(f'<div class="pane" {"" if i == 0 else "hidden"}>{body}</div>' for i, body in enumerate(panes.values()))
  return f"<div class='tabs'>{buttons}</div>{bodies}"

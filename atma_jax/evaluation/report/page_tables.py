"""One HTML page of everything measured: pictures and numbers of several checkpoints side by side, in a file of its own.

Nothing is loaded from elsewhere: pictures are SVG within the page, tables are HTML, the few lines of script are inline.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import html
import pathlib
from typing import Any

from absl import logging

from atma_jax.errors import UserError
from atma_jax.evaluation.records import parse_records
from atma_jax.evaluation.report import page_figures as figures
from atma_jax.evaluation.report.page import PAGE
from atma_jax.evaluation.report.plots import short_tokens

Record = dict[str, Any]
HALF_LIVES = {"half_life_zero_input": "zero input", "half_life_measured": "measured over text"}
_LOSSES = {"document_loss": "documents, nested prefixes", "stream_loss": "validation stream"}
_NEEDLE = {"needle_accuracy": "digits right", "needle_exact": "all five right", "absent_accuracy": "needle absent: digits right"}
_GRID = {"retrieval_accuracy": "token accuracy", "retrieval_exact": "all five right"}
_KEY = ("layer", "head")  # fields that tell records of one measure and length apart, besides these settings
_SETTINGS = ("task", "haystack", "depth")
_NEEDED = {"checkpoint": str, "step": int, "name": str, "suite": str, "settings": dict, "measure": str, "length": int, "n": int,
           "config": dict, "hardware": str, "jax": str, "training_length": int}
_WORST = 12  # heads listed


@dataclasses.dataclass
class Run:
  """What was measured of one checkpoint step, in one way of running it: the latest record of everything."""

  label: str
  records: list[Record]

  def of(self, measure: str, **settings: Any) -> list[Record]:
    """Records of a measure, of these settings."""
    return [r for r in self.records if r["measure"] == measure
            and all(r["settings"].get(name) == value for name, value in settings.items())]


def write_report(sources: Sequence[pathlib.Path], target: pathlib.Path) -> None:
  """Writes the page of all records of these ``results.jsonl`` files.

  Raises:
    UserError: a file cannot be read, holds no record, or the page cannot be written.
  """
  records = []
  for path in sources:
    try:
      found = parse_records(path.read_bytes(), path)
    except OSError as error:
      raise UserError(f"--report: cannot read {path}: {error.strerror or error}") from error
    if not found:
      raise UserError(f"--report: {path} holds no results")
    for record in found:
      wrong = [name for name, kind in _NEEDED.items() if not isinstance(record.get(name), kind)]
      if wrong or not isinstance(record.get("value", ""), int | float | None):
        raise UserError(f"--report: {path}: a record of {record.get('measure')!r} has no legal {(wrong or ['value'])[0]}")
    records += found
  try:
    target.write_text(render(records), encoding="utf-8")
  except OSError as error:
    raise UserError(f"--report: cannot write {target}: {error.strerror or error}") from error
  logging.info("report: %s", target)


def render(records: Iterable[Record]) -> str:
  """The page."""
  runs = group(records)
  sections = [("Checkpoints", _checkpoints(runs)), ("Loss against context length", _losses(runs)),
              ("Loss by position, L(t)", _positions(runs)), ("Bits per byte of a fixed span", _bits(runs)),
              ("Induction needle", _needles(runs)), ("Retrieval: length by depth", _grid(runs)),
              ("BABILong after answer-only fine-tuning", _babilong(runs)), ("Retention of the memory", _retention(runs)),
              ("Diagnostics", _diagnostics(runs)), ("Not measured", _missing(runs)), ("All numbers", _numbers(runs))]
  sections = [(title, body) for title, body in sections if body]
  links = "".join(f'<a href="#s{i}">{html.escape(title)}</a>' for i, (title, _) in enumerate(sections))
  body = "".join(f'<section id="s{i}"><h2>{html.escape(title)}</h2>{part}</section>' for i, (title, part) in enumerate(sections))
  return PAGE.replace("{{links}}", links).replace("{{body}}", body)


def group(records: Iterable[Record]) -> list[Run]:
  """Runs in the order of their first record. Of what was measured more than once, with whatever options, the latest counts."""
  grouped: dict[tuple, dict[tuple, Record]] = {}
  for record in records:
    variant = bool(record.get("ema")), record.get("window"), record.get("null_length"), record.get("count_length"), _cap(record)
    run = record["checkpoint"], record["step"], *variant
    key = (record["suite"], record["measure"], record["length"], *(record.get(name) for name in _KEY),
           *(record["settings"].get(name) for name in _SETTINGS))
    grouped.setdefault(run, {}).pop(key, None)
    grouped[run][key] = record
  runs = []
  for (checkpoint, step, ema, window, null, count, cap), latest in grouped.items():
    window = "" if window is None else f", window {window}"
    null = "" if null is None else f", null to {null}"
    count = "" if count is None else f", counts to {count}"
    label = f"{next(iter(latest.values()))['name']}, step {step}" + ", EMA" * ema + window + null + count + cap
    if any(run.label == label for run in runs):
      label += f" ({pathlib.PurePath(checkpoint).name} {len(runs) + 1})"
    runs.append(Run(label, list(latest.values())))
  return runs


def _cap(record: Record) -> str:
  """The retention cap a record was measured under, in words; "" without one."""
  cap = record["settings"].get("retention_cap")
  return "" if cap is None else f", cap {cap}"


def _image(svg: bytes, alt: str) -> str:
  return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _series(runs: Sequence[Run], measure: str, **settings: Any) -> dict[str, list[Record]]:
  return {run.label: found for run in runs if (found := run.of(measure, **settings))}


def _panels(runs: Sequence[Run], measures: dict[str, str]) -> dict[str, dict[str, list[Record]]]:
  return {title: series for measure, title in measures.items() if (series := _series(runs, measure))}


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], classes: str = "") -> str:
  """Cells are text, or (text, attributes)."""

  def cell(value: Any) -> str:
    text, attributes = value if isinstance(value, tuple) else (value, "")
    return f"<td {attributes}>{html.escape(str(text))}</td>"

  top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
  body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
  return f'<div class="wide"><table class="{classes}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _checkpoints(runs: Sequence[Run]) -> str:
  rows = []
  for index, run in enumerate(runs):
    latest = run.records[-1]
    model = latest["config"]["model"]
    memory = "on" if model["memory"]["enabled"] else "off"
    kind = f"{model['attention']}, memory {memory}, {model['num_layers']} x {model['width']}"
    color = figures.PALETTE[index % len(figures.PALETTE)]
    hardware = sorted({f"{r['hardware']}, jax {r['jax']}" for r in run.records})
    code = sorted({r.get("code", "unknown") for r in run.records})
    rows.append([(f"● {run.label}", f'style="color:{color};font-weight:600"'), (latest["checkpoint"], 'class="path"'), kind,
                 latest["training_length"], "; ".join(hardware), "; ".join(code), len(run.records)])
  return _table(["name", "directory", "model", "trained at", "hardware", "code", "numbers"], rows)


def _lengths(runs: Sequence[Run], *measures: str) -> list[int]:
  return sorted({r["length"] for run in runs for measure in measures for r in run.of(measure)})


def _value_table(runs: Sequence[Run], measures: dict[str, str], scale: float, digits: int) -> str:
  """A row a checkpoint and measure, a column a length."""
  lengths = _lengths(runs, *measures)
  rows = []
  for run in runs:
    for measure, title in measures.items():
      found = {r["length"]: r for r in run.of(measure)}
      if found:
        rows.append([run.label, title, *(_shown(found.get(n), scale, digits) for n in lengths)])
  return _table(["checkpoint", "measure", *map(short_tokens, lengths)], rows, "numbers")


def _shown(record: Record | None, scale: float, digits: int) -> Any:
  if record is None:
    return ""
  if record["value"] is None:
    return ("out of memory" if record.get("status") == "out_of_memory" else "not finite"), 'class="bad"'
  return f"{record['value'] * scale:.{digits}f}", f'title="{html.escape(_uncertainty(record, scale, digits))}"'


def _uncertainty(record: Record, scale: float, digits: int) -> str:
  if record.get("interval"):
    low, high = (f"{scale * bound:.{digits}f}" for bound in record["interval"])
    return f"95 % interval {low} to {high}, n = {record['n']}"
  if record.get("standard_error") is not None:
    return f"± {scale * record['standard_error']:.{digits}f} standard error, n = {record['n']}"
  return f"n = {record['n']}"


def _losses(runs: Sequence[Run]) -> str:
  panels = _panels(runs, _LOSSES)
  if not panels:
    return ""
  return _image(figures.loss_panels(panels), "loss against length") + _value_table(runs, _LOSSES, 1, 3)


def _positions(runs: Sequence[Run]) -> str:
  curves = {}
  for run in runs:
    longest = max(run.of("position_loss"), key=lambda r: r["length"] if r.get("bins") else -1, default=None)
    if longest is not None and longest.get("bins"):
      curves[run.label] = longest
  return _image(figures.position_curves(curves), "loss by position") if curves else ""


def _bits(runs: Sequence[Run]) -> str:
  series = _series(runs, "bits_per_byte")
  if not series:
    return ""
  picture = figures.loss_panels({"the same span under every context": series}, "bits per byte")
  return _image(picture, "bits per byte") + _value_table(runs, {"bits_per_byte": "bits per byte"}, 1, 4)


def _needles(runs: Sequence[Run]) -> str:
  panels = _panels(runs, _NEEDLE)
  if not panels:
    return ""
  heat = {run.label: {r["length"]: r for r in run.of("needle_accuracy")} for run in runs if run.of("needle_accuracy")}
  return (_image(figures.accuracy_panels(panels, chance=True), "needle accuracy against distance")
          + "<p>Digits right, in %, by distance. The dashed line is chance, one digit of ten.</p>"
          + _heatmap("", heat, sorted({n for found in heat.values() for n in found}), lambda record: record))


def _heatmap(caption: str, rows: dict[str, dict[int, Any]], lengths: Sequence[int], of: Callable[[Any], Record | None]) -> str:
  """A cell a row and length, coloured and labelled in percent."""
  head = "".join(f"<th>{short_tokens(n)}</th>" for n in lengths)
  body = "".join(f"<tr><th>{html.escape(label)}</th>{''.join(_heat(of(found.get(n))) for n in lengths)}</tr>"
                 for label, found in rows.items())
  title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
  return f'<table class="heat">{title}<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _heat(record: Record | None) -> str:
  if record is None:
    return '<td class="none"></td>'
  if record["value"] is None:
    return f'<td class="bad" title="{html.escape(str(record.get("reason", "")))}">no memory</td>'
  share = record["value"]
  hue, light = 8 + 130 * share, 88 - 42 * abs(share - 0.5) * (share > 0.5) - 12 * (share < 0.5) * (0.5 - share)
  ink = "#fff" if light < 60 else "#111827"
  return (f'<td style="background:hsl({hue:.0f} 55% {light:.0f}%);color:{ink}" '
          f'title="{html.escape(_uncertainty(record, 100, 1))}">{100 * share:.0f}</td>')


def _grid(runs: Sequence[Run]) -> str:
  parts = []
  for measure, title in _GRID.items():
    grids = []
    for task, haystack in sorted({(r["settings"]["task"], r["settings"]["haystack"]) for run in runs for r in run.of(measure)}):
      cards = []
      for run in runs:
        found = run.of(measure, task=task, haystack=haystack)
        rows: dict[str, dict[int, Record]] = {}
        for record in sorted(found, key=lambda r: r["settings"]["depth"]):
          rows.setdefault(f"{100 * record['settings']['depth']:g} %", {})[record["length"]] = record
        if rows:
          cards.append(_heatmap(run.label, rows, sorted({r["length"] for r in found}), lambda record: record))
      grids.append(f"<h3>{html.escape(task)} in {html.escape(haystack)}</h3><div class='cards'>{''.join(cards)}</div>")
    if grids:
      parts.append((title, "".join(grids)))
  if not parts:
    return ""
  buttons = "".join(f'<button data-pane="{i}" class="{"on" if i == 0 else ""}">{html.escape(title)}</button>'
                    for i, (title, _) in enumerate(parts))
  panes = "".join(f'<div class="pane" {"" if i == 0 else "hidden"}>{body}</div>' for i, (_, body) in enumerate(parts))
  return f"<p>Depth of the statement down, length across; in %.</p><div class='tabs'>{buttons}</div>{panes}"


def _babilong(runs: Sequence[Run]) -> str:
  tasks = sorted({r["settings"]["task"] for run in runs for r in run.of("babilong_exact")}, key=lambda t: (len(t), t))
  if not tasks:
    return ""
  panels = {task: _series(runs, "babilong_exact", task=task) for task in tasks}
  return _image(figures.accuracy_panels(panels, chance=False), "BABILong exact match")


def _retention(runs: Sequence[Run]) -> str:
  heads = [(run.label, title, r) for run in runs for measure, title in HALF_LIVES.items()
           for r in _at_the_longest([r for r in run.of(measure) if r.get("status", "ok") == "ok"])]
  if not heads:
    return ""
  panels: dict[str, dict[str, list[float | None]]] = {}
  for label, title, record in heads:
    panels.setdefault(title, {}).setdefault(label, []).append(record["value"])
  heads.sort(key=lambda item: float("inf") if item[2]["value"] is None else item[2]["value"], reverse=True)
  rows = [[label, kind, r.get("layer", ""), r.get("head", ""), "never" if r["value"] is None else f"{r['value']:,.0f}",
           "outlier" if r.get("outlier") else ""] for label, kind, r in heads[:_WORST]]
  table = _table(["checkpoint", "half-life", "layer", "head", "tokens", ""], rows, "numbers")
  picture = _image(figures.half_life_histograms(panels), "half-lives of the memory's heads")
  return f"{picture}<p>The longest half-lives, in tokens; over text, the median at the longest length.</p>{table}"


def _at_the_longest(records: Sequence[Record]) -> list[Record]:
  """Records at the longest length there is of them."""
  longest = max((r["length"] for r in records), default=0)
  return [r for r in records if r["length"] == longest]


def _diagnostics(runs: Sequence[Run]) -> str:
  measures = dict.fromkeys(r["measure"] for run in runs for r in run.records
                           if r.get("layer") is not None and r["measure"] not in HALF_LIVES and r["length"] > 0)
  parts = []
  for measure in measures:
    panels: dict[str, dict[int, list[Record]]] = {}
    for run in runs:
      for record in run.of(measure):
        if record.get("head") is None:
          panels.setdefault(run.label, {}).setdefault(record["layer"], []).append(record)
    if panels:
      name = measure.replace("_", " ")
      parts.append(f"<h3>{html.escape(name)}</h3>" + _image(figures.layer_panels(panels, name), name))
  return "".join(parts)


def _missing(runs: Sequence[Run]) -> str:
  rows = [[run.label, r["suite"], r["measure"], r["length"], _settings(r), r.get("status", "ok").replace("_", " "),
           (r.get("reason", ""), 'class="path"')] for run in runs for r in run.records if r.get("status", "ok") != "ok"]
  return _table(["checkpoint", "suite", "measure", "length", "of", "status", "reason"], rows) if rows else ""


def _settings(record: Record) -> str:
  parts = [str(record["settings"][name]) for name in ("task", "haystack") if name in record["settings"]]
  parts += [f"depth {100 * record['settings']['depth']:g} %"] if "depth" in record["settings"] else []
  return ", ".join([*parts, *(f"{name} {record[name]}" for name in _KEY if record.get(name) is not None)])


def _numbers(runs: Sequence[Run]) -> str:
  rows = []
  for run in runs:
    for r in sorted(run.records, key=lambda r: (r["suite"], r["measure"], r["length"])):
      if r["value"] is not None:
        memory = f"{r['program_gib']:.2f}" if "program_gib" in r else ""
        rows.append([run.label, r["suite"], r["measure"], r["length"], _settings(r), f"{r['value']:.6g}",
                     _uncertainty(r, 1, 4), f"{r.get('seconds', 0):.1f}", memory])
  search = '<input id="filter" type="search" aria-label="filter" placeholder="words that a row must hold, e.g. needle 2048">'
  head = ["checkpoint", "suite", "measure", "length", "of", "value", "uncertainty", "cell seconds", "program GiB"]
  return f"<details><summary>{len(rows)} numbers</summary>{search}{_table(head, rows, 'numbers all')}</details>"

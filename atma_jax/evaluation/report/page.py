"""``report.html``: the numbers of several checkpoints side by side, in one file that loads nothing from elsewhere.

Figures are SVG inside the page, tables are HTML, and the script is inline. Every suite contributes its own sections
(`atma_jax.evaluation.suite.Suite.sections`); this module adds those about all suites, and the frame from ``page.html``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import html
import importlib.resources
import pathlib

from absl import logging

from atma_jax.errors import UserError
from atma_jax.evaluation.records import COMPLETE, Record, is_ok, parse_records
from atma_jax.evaluation.report.drawing import PALETTE
from atma_jax.evaluation.report.markup import table, uncertainty
from atma_jax.evaluation.report.runs import POSITION_FIELDS, Run, group_runs
from atma_jax.evaluation.suite import Suite
from atma_jax.evaluation.suites import all_suites
from atma_jax.json_input import mismatch, read_bytes

_MOST_BYTES = 1 << 30  # of a file of results


def write_report(sources: Sequence[pathlib.Path], target: pathlib.Path) -> None:
  """Writes the report of all records of these ``results.jsonl`` files to `target`; malformed ones are left out and counted.

  Raises:
    UserError: a file cannot be read or holds no valid records, or the page cannot be written.
  """
  records, suites = [], all_suites()
  for path in sources:
    try:
      found, malformed = parse_records(read_bytes(path, most_bytes=_MOST_BYTES), path, lambda record: _problem(record, suites))
    except OSError as error:
      raise UserError(f"--report: cannot read {path}: {error.strerror or error}") from error
    if not found:
      raise UserError(f"--report: {path} holds no results" + (f": {malformed}" if malformed else ""))
    records += found
  try:
    target.write_text(render_page(records), encoding="utf-8")
  except OSError as error:
    raise UserError(f"--report: cannot write {target}: {error.strerror or error}") from error
  logging.info("report: %s", target)


def _problem(record: Record, suites: dict[str, Suite]) -> str | None:
  """What keeps a record from being shown, by the schemas of all records and of its suite; None if nothing does."""
  if problem := mismatch(record, COMPLETE):
    return problem
  suite = suites.get(record["suite"])
  if suite is None:
    return None
  if problem := mismatch(record, suite.schema):
    return problem
  for name, text in suite.settings.items():
    try:
      if name in record["settings"]:
        hash(record["settings"][name])
        text(record["settings"][name])
    except (TypeError, ValueError, LookupError, AttributeError):
      return f"field 'settings'.{name} is of another type"
  return None


def render_page(records: Iterable[Record]) -> str:
  """The page as HTML; sections without content are left out."""
  suites = all_suites()
  runs = group_runs(records, suites)
  sections = [("Checkpoints", _checkpoints(runs)),
              *((heading, section(runs)) for suite in suites.values() for heading, section in suite.sections.items()),
              ("Not measured", _failures(runs, suites)), ("All numbers", _numbers(runs, suites))]
  sections = [(heading, body) for heading, body in sections if body]
  links = "".join(f'<a href="#s{i}">{html.escape(heading)}</a>' for i, (heading, _) in enumerate(sections))
  body = "".join(f'<section id="s{i}"><h2>{html.escape(heading)}</h2>{part}</section>' for i, (heading, part) in
                 enumerate(sections))
  frame = importlib.resources.files("atma_jax.evaluation.report").joinpath("page.html").read_text(encoding="utf-8")
  return frame.replace("{{links}}", links).replace("{{body}}", body)


def _checkpoints(runs: Sequence[Run]) -> str:
  """One row per run: its directory, model, hardware and code."""
  rows = []
  for index, run in enumerate(runs):
    latest = run.records[-1]
    model = latest["config"]["model"]
    memory = "on" if model["memory"]["enabled"] else "off"
    kind = f"{model['attention']}, memory {memory}, {model['num_layers']} x {model['width']}"
    color = PALETTE[index % len(PALETTE)]
    hardware = sorted({f"{r['hardware']}, jax {r['jax']}" for r in run.records})
    code = sorted({r.get("code", "unknown") for r in run.records})
    rows.append([(f"● {run.label}", f'style="color:{color};font-weight:600"'), (latest["checkpoint"], 'class="path"'), kind,
                 latest["training_length"], "; ".join(hardware), "; ".join(code), len(run.records)])
  return table(["name", "directory", "model", "trained at", "hardware", "code", "numbers"], rows)


def _failures(runs: Sequence[Run], suites: dict[str, Suite]) -> str:
  """One row per record without a value, and why it has none."""
  rows = [[run.label, r["suite"], r["measure"], r["length"], _settings_text(r, suites), r.get("status", "ok").replace("_", " "),
           (r.get("reason", ""), 'class="path"')] for run in runs for r in run.records if not is_ok(r)]
  return table(["checkpoint", "suite", "measure", "length", "of", "status", "reason"], rows) if rows else ""


def _numbers(runs: Sequence[Run], suites: dict[str, Suite]) -> str:
  """One row per record with a value, folded away, with a search field."""
  rows = []
  for run in runs:
    for r in sorted(run.records, key=lambda r: (r["suite"], r["measure"], r["length"])):
      if r["value"] is not None:
        memory = f"{r['program_gib']:.2f}" if "program_gib" in r else ""
        rows.append([run.label, r["suite"], r["measure"], r["length"], _settings_text(r, suites), f"{r['value']:.6g}",
                     uncertainty(r, 1, 4), f"{r.get('seconds', 0):.1f}", memory])
  search = '<input id="filter" type="search" aria-label="filter" placeholder="words that a row must hold, e.g. needle 2048">'
  head = ["checkpoint", "suite", "measure", "length", "of", "value", "uncertainty", "cell seconds", "program GiB"]
  return f"<details><summary>{len(rows)} numbers</summary>{search}{table(head, rows, 'numbers all')}</details>"


def _settings_text(record: Record, suites: dict[str, Suite]) -> str:
  """What tells a record apart from others of its measure and length, such as "niah, text, depth 10 %, layer 2"."""
  suite = suites.get(record["suite"])
  parts = [text(record["settings"][name]) for name, text in (suite.settings.items() if suite else ())
           if name in record["settings"]]
  return ", ".join([*parts, *(f"{name} {record[name]}" for name in POSITION_FIELDS if record.get(name) is not None)])

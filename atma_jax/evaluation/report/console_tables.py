"""Text tables that `evaluate` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import itertools
import textwrap

from atma_jax.evaluation.records import Record
from atma_jax.evaluation.suite import Suite

_WIDTH = 100  # letters of a line

def results_text(records: Sequence[Record], suites: dict[str, Suite], training_length: int, title: str = "") -> str:
  """The tables of one evaluation: all columns of all suites by length, then the tables of single suites.

  Args:
    records: of the evaluation.
    suites: by name, in the order in which they are shown.
    training_length: in tokens.
    title: printed above the tables, unless empty.
  """
  parts = [title] if title else []
  columns = [column for suite in suites.values() for column in suite.columns]
  if {record["measure"] for record in records} & set(columns):
    parts.append(_table_by_length(records, columns, training_length))
  for name, suite in suites.items():
    if suite.table is not None and (own := [record for record in records if record["suite"] == name]):
      parts.append(suite.table(own))
  return "\n\n".join(parts)


def _table_by_length(records: Sequence[Record], columns: Sequence[str], training_length: int) -> str:
  """One line per length and one column per measure; where a suite measures several settings, their mean.

  Shares are in percent. Columns that do not fit into `_WIDTH` letters are a table of their own below.
  """
  columns = [column for column in columns if any(r["measure"] == column for r in records)]
  values: dict[tuple[str, int], list[float | None]] = {}
  failed = {(r["measure"], r["length"]) for r in records if r.get("status", "ok") == "out_of_memory"}
  for record in records:
    values.setdefault((record["measure"], record["length"]), []).append(record["value"])
  lengths = sorted({length for measure, length in values if measure in columns})
  multiples = ["x", *(f"{length / training_length:g}" for length in lengths)]
  width = max(6, *map(len, multiples))
  labels = [f"{length:>8}  {multiple:>{width}}" for length, multiple in zip(["length", *lengths], multiples)]
  tables, used = [labels], len(labels[0])
  for column in columns:
    cells = [column]
    cells += [_mean_text(values.get((column, n), []), (column, n) in failed, share=_is_share(column)) for n in lengths]
    width = max(map(len, cells))
    if used + 2 + width > _WIDTH and tables[-1] is not labels:
      tables.append(labels)
      used = len(labels[0])
    tables[-1] = [f"{line}  {cell:>{width}}" for line, cell in zip(tables[-1], cells)]
    used += 2 + width
  return "\n\n".join("\n".join(table) for table in tables)


def _is_share(measure: str) -> bool:
  """Whether a measure is a share of right answers, shown in percent as in the plots."""
  return measure.endswith(("_exact", "_accuracy"))


def shares_text(records: Sequence[Record], heading: str, label: Callable[[Record], str]) -> str:
  """Shares in percent with their 95 % Wilson intervals: one line per label, one column per length.

  Columns that do not fit into `_WIDTH` letters stand below, and so do labels that leave no room for one.

  Args:
    records: of any measures whose records have an interval.
    heading: printed above the labels, with the number of trials.
    label: what a record is called.
  """
  found: dict[str, dict[int, Record]] = {}
  for record in records:
    found.setdefault(label(record), {})[record["length"]] = record
  lengths = sorted({record["length"] for record in records})
  trials = sorted({record["settings"]["trials"] for record in records})
  title = f"{heading}: % [95 % Wilson interval], {' and '.join(map(str, trials))} trials a cell"
  cells = {name: [_share_text(by_length.get(n)) for n in lengths] for name, by_length in found.items()}
  cell = max(map(len, [*map(str, lengths), *itertools.chain(*cells.values())]), default=0)
  width = min(max(map(len, found), default=0), _WIDTH - 2 - cell)
  at_once = (_WIDTH - width) // (2 + cell)
  lines = [title]
  for first in range(0, len(lengths), at_once):
    here = slice(first, first + at_once)
    lines += [""] if first else []
    lines.append("  ".join([" " * width, *(f"{length:>{cell}}" for length in lengths[here])]))
    for name, texts in cells.items():
      *above, last = textwrap.wrap(name, width) or [""]
      lines += [*above, "  ".join([f"{last:<{width}}", *(f"{text:>{cell}}" for text in texts[here])])]
  return "\n".join(lines)


def _share_text(record: Record | None) -> str:
  if record is None:
    return ""
  if record["value"] is None:
    return "no memory" if record.get("status") == "out_of_memory" else "not finite"
  interval = record.get("interval")
  bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
  return f"{100 * record['value']:.0f}{bounds}"


def cap_sweep_text(results: Sequence[tuple[str, Sequence[Record]]], suites: dict[str, Suite]) -> str:
  """The same evaluation under several retention caps: per measure, one line per length and one column per cap.

  Args:
    results: each cap in words, and the records measured under it.
    suites: by name, in the order in which they are shown.
  """
  lines = []
  for measure in (column for suite in suites.values() for column in suite.columns):
    values: dict[tuple[str, int], list[float | None]] = {}
    failed = set()
    for name, records in results:
      for record in records:
        if record["measure"] == measure:
          values.setdefault((name, record["length"]), []).append(record["value"])
          if record.get("status", "ok") == "out_of_memory":
            failed.add((name, record["length"]))
    if values:
      lines.append("  ".join([f"{measure:>18}", *(f"{f'cap {name}':>16}" for name, _ in results)]))
      for length in sorted({length for _, length in values}):
        cells = [_mean_text(values.get((name, length), []), (name, length) in failed, share=_is_share(measure))
                 for name, _ in results]
        lines.append("  ".join([f"{length:>18}", *(f"{c:>16}" for c in cells)]))
  return "\n".join(lines)


def _mean_text(values: Sequence[float | None], out_of_memory: bool, *, share: bool) -> str:
  measured = [value for value in values if value is not None]
  if len(measured) < len(values):
    return "no memory" if out_of_memory else "not finite"
  if not measured:
    return ""
  mean = sum(measured) / len(measured)
  return f"{100 * mean:.1f} %" if share else f"{mean:.4f}"

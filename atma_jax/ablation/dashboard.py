"""The report of a sweep: the table of results, the main tables and the dashboard."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import importlib.resources
import json
import pathlib
from typing import Any

from absl import logging

from atma_jax.ablation.contrasts import Contrast, contrasts, settings
from atma_jax.ablation.curves import plot_curves
from atma_jax.ablation.results import HIGHER_IS_BETTER, Row, gather, write_table, write_text
from atma_jax.ablation.sweep import CellFolder
from atma_jax.ablation.tables import latex, main_tables, markdown
from atma_jax.errors import UserError

_CURVE_POINTS = 200


def report(directory: pathlib.Path, cells: Sequence[CellFolder]) -> list[pathlib.Path]:
  """Writes the report over the cells that are done; raises `UserError` where none is.

  Files: ``results.jsonl``, ``.parquet`` and ``.csv``, ``contrasts.json``, ``tables.md`` and ``.tex``, ``curves.png``,
  ``dashboard.html``.
  """
  axes, rows, results = gather(cells)
  if not rows:
    raise UserError(f"--output={directory}: no cell is done yet, there is nothing to report")
  found, about = contrasts(rows, axes), _about(results)
  means = settings(rows, axes)
  tables = main_tables(means, found)
  written = [*write_table(rows, axes, directory),
             write_text(directory / "contrasts.json", json.dumps([dataclasses.asdict(c) for c in found], indent=1) + "\n"),
             write_text(directory / "tables.md", markdown(tables)), write_text(directory / "tables.tex", latex(tables)),
             *plot_curves(directory / "curves.png", f"{directory.name}: {about}", means),
             write_text(directory / "dashboard.html", dashboard(directory.name, about, axes, rows, results, found, len(cells)))]
  logging.info("report over %d of %d cells: %s", len(results), len(cells), ", ".join(str(path) for path in written))
  return written


def dashboard(name: str, about: str, axes: Sequence[str], rows: Sequence[Row], results: Sequence[dict[str, Any]],
              found: Sequence[Contrast], total: int) -> str:
  """One HTML page that needs nothing else: filter, sort, compare curves."""
  cells = []
  for result in results:
    own = [row for row in rows if row["cell"] == result["id"]]
    measures: dict[str, list[dict[str, Any]]] = {}
    for row in own:
      measures.setdefault(row["measure"], []).append({key: row[key] for key in ("multiple", "value", "n", "low", "high")})
    cells.append({"id": result["id"], "labels": {axis: own[0][axis] for axis in axes}, "measures": measures,
                  "loss": _thinned(result["training"]["loss"])})
  data = {"title": f"Sweep {name}", "about": about, "axes": list(axes), "cells": cells, "unfinished": total - len(results),
          "contrasts": [dataclasses.asdict(c) for c in found], "higher_is_better": HIGHER_IS_BETTER}
  page = importlib.resources.files("atma_jax.ablation").joinpath("dashboard.html").read_text()
  return page.replace("@DATA@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def _about(results: Sequence[dict[str, Any]]) -> str:
  hardware = sorted({result["hardware"] for result in results})
  tokens, parameters = {_tokens(result["config"]) for result in results}, {result["parameters"] for result in results}
  return f"{len(results)} runs of {_span(tokens)} tokens and {_span(parameters)} parameters on {', '.join(hardware)}"


def _tokens(config: dict[str, Any]) -> int:
  return config["train"]["steps"] * config["data"]["batch_size"] * config["data"]["sequence_length"]


def _thinned(curve: list[list[float]]) -> list[list[float]]:
  stride = -(-len(curve) // _CURVE_POINTS) or 1
  return curve[::-stride][::-1]


def _span(numbers: set[int]) -> str:
  return " to ".join(f"{n:,}" for n in sorted({min(numbers), max(numbers)}))

"""Writes the report of a sweep: the table of results, the main tables, the curves and the dashboard."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

from absl import logging

from atma_jax.ablation.contrasts import find_contrasts, seed_means
from atma_jax.ablation.results import HIGHER_IS_BETTER, gather, read_results, table_files
from atma_jax.ablation.sweep import CellFolder, write_file
from atma_jax.errors import UserError
from atma_jax.evaluation.report.curves import draw_curves
from atma_jax.evaluation.report.dashboard import render_dashboard
from atma_jax.evaluation.report.sweep_tables import latex, main_tables, markdown


def write_summary(directory: pathlib.Path, cells: Sequence[CellFolder]) -> list[pathlib.Path]:
  """Writes the report over the cells that are done, and returns its files.

  The files are ``results.jsonl``, ``.parquet`` and ``.csv``, ``contrasts.json``, ``tables.md`` and ``.tex``, ``curves.png``
  and ``dashboard.html``.

  Raises:
    UserError: no cell is done, or a file cannot be written. Damaged results are counted, reported and left out.
  """
  axes, rows, results = gather(cells)
  _, problems = read_results(cells)
  damaged = f"{len(problems)} results are damaged and left out, the first: {problems[0]}" if problems else ""
  if not rows:
    raise UserError(f"--output={directory}: no cell is done yet, there is nothing to report" + (damaged and f"; {damaged}"))
  if problems:
    logging.warning("%s", damaged)
  contrasts, settings, about = find_contrasts(rows, axes), seed_means(rows, axes), _about(results)
  tables = main_tables(settings, contrasts)
  page = render_dashboard(f"Sweep {directory.name}", about, axes, rows, contrasts,
                          {result["id"]: result["training"]["loss"] for result in results},
                          unfinished=len(cells) - len(results), higher_is_better=HIGHER_IS_BETTER)
  curves = draw_curves(f"{directory.name}: {about}", settings)
  texts = {"contrasts.json": json.dumps([dataclasses.asdict(c) for c in contrasts], indent=1) + "\n",
           "tables.md": markdown(tables), "tables.tex": latex(tables), "dashboard.html": page}
  contents = table_files(rows, axes) | {name: text.encode() for name, text in texts.items()}
  if curves is not None:
    contents["curves.png"] = curves
  for name, content in contents.items():
    try:
      write_file(directory / name, content)
    except OSError as error:
      raise UserError(f"--output: cannot write {directory / name}: {error.strerror or error}") from error
  written = [directory / name for name in contents]
  logging.info("report over %d of %d cells: %s", len(results), len(cells), ", ".join(str(path) for path in written))
  return written


def _about(results: Sequence[dict[str, Any]]) -> str:
  """What the cells have in common: their number, tokens, parameters and hardware."""
  hardware = sorted({result["hardware"] for result in results})
  tokens, parameters = {_training_tokens(result["config"]) for result in results}, {result["parameters"] for result in results}
  return f"{len(results)} runs of {_range_text(tokens)} tokens and {_range_text(parameters)} parameters on {', '.join(hardware)}"


def _training_tokens(config: dict[str, Any]) -> int:
  return config["train"]["steps"] * config["data"]["batch_size"] * config["data"]["sequence_length"]


def _range_text(numbers: set[int]) -> str:
  return " to ".join(f"{n:,}" for n in sorted({min(numbers), max(numbers)}))

"""``dashboard.html``: one page to filter, sort and compare the cells of a sweep, which loads nothing from elsewhere.

Plotly draws its curves. The page holds the library's script, 5 MB, out of the package `plotly`, with its licence; a policy in the
page has the browser load nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import importlib.resources
import json
from typing import Any

from plotly.offline import get_plotlyjs

from atma_jax.evaluation.report.comparisons import Contrast

_CURVE_POINTS = 200  # most points of a training curve


def render_dashboard(title: str, about: str, axes: Sequence[str], rows: Sequence[dict[str, Any]], contrasts: Sequence[Contrast],
                     curves: dict[str, Sequence[Sequence[float]]], *, unfinished: int, higher_is_better: Sequence[str]) -> str:
  """The page as HTML.

  Args:
    title: heading of the page.
    about: one line on what the cells have in common.
    axes: names of the factors.
    rows: one per measurement, with the fields of `atma_jax.ablation.results`.
    contrasts: to show in a table.
    curves: training loss of every cell by its id, as (step, loss) pairs. The page shows the cells in this order.
    unfinished: number of cells without results.
    higher_is_better: endings of the names of measures whose higher values are better.
  """
  cells = []
  for cell, curve in curves.items():
    own = [row for row in rows if row["cell"] == cell]
    measures: dict[str, list[dict[str, Any]]] = {}
    for row in own:
      measures.setdefault(row["measure"], []).append({key: row[key] for key in ("multiple", "value", "n", "low", "high")})
    labels = {axis: own[0][axis] for axis in axes} if own else {}
    cells.append({"id": cell, "labels": labels, "measures": measures, "loss": _thin_out(curve)})
  data = {"title": title, "about": about, "axes": list(axes), "cells": cells, "unfinished": unfinished,
          "contrasts": [dataclasses.asdict(c) for c in contrasts], "higher_is_better": higher_is_better}
  page = importlib.resources.files("atma_jax.evaluation.report").joinpath("dashboard.html").read_text(encoding="utf-8")
  page = page.replace("@PLOTLY@", get_plotlyjs())  # before the data, which may hold any text
  return page.replace("@DATA@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def _thin_out(curve: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
  """Evenly spaced points of a curve, its last one among them."""
  every = -(-len(curve) // _CURVE_POINTS) or 1
  return curve[::-every][::-1]

"""Suite ``retention``: how long every head of the memory remembers, in tokens until a half is left.

* ``half_life_zero_input``: from the bias of the decay gate alone, ``ln(1/2) / ln(sigmoid(bias + gamma_bias))`` (with
  `max_half_life` and a cap as the model has them); its length is 0.
* ``half_life_measured``: over the tokens of held-out documents, nested prefixes of one pass at the longest length; the value
  is the median, `bins` hold quantiles.

A head is an outlier where its half-life is longer than the training length, so that nothing in training could tell it from
never forgetting, and more than 16 times the median over all heads of the same measure and length.
"""

from __future__ import annotations

from collections.abc import Sequence
import itertools
from typing import Any

import jax
import numpy as np

from atma_jax.errors import UserError
from atma_jax.evaluation.cells import Cell, Inputs, Progress, fingerprint
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.tapping import document_rows, tapped
from atma_jax.models.block import Block, Trace
from atma_jax.models.retention_cap import half_life, zero_input_half_lives

ZERO_INPUT, MEASURED = "half_life_zero_input", "half_life_measured"
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
OUTLIER_FACTOR = 16


def retention_cells(inputs: Inputs) -> list[Cell]:
  """One cell for the biases and one for the text."""
  heads = [(layer, head) for layer, values in zero_input_half_lives(inputs.model).items() for head in range(len(values))]
  if not heads:
    raise UserError("--suite=retention: the model has no memory")
  rows = document_rows(inputs, "retention")
  zero_input = Cell("half-lives of the biases", tuple((ZERO_INPUT, 0, *where) for where in heads), {}, 0,
                    lambda progress: _zero_input(inputs))
  expected = tuple((MEASURED, length, *where) for length, where in itertools.product(inputs.lengths, heads))
  measured = Cell(f"half-lives to {rows.shape[1]}", expected, {"documents": len(rows), "text": fingerprint(rows)}, rows.size,
                  lambda progress: _measured(inputs, rows, progress))
  return [zero_input, measured]


def outliers(half_lives: dict[tuple[int, int], float], training_length: int) -> set[tuple[int, int]]:
  """The (layer, head) pairs that stand out by the suite's rule."""
  bound = max(training_length, OUTLIER_FACTOR * float(np.median(list(half_lives.values()))))
  return {where for where, value in half_lives.items() if value > bound}


def distribution(measure: str, length: int, samples: dict[tuple[int, int], np.ndarray],
                 training_length: int) -> list[Measurement]:
  """Medians and quantiles of the half-lives of every (layer, head)."""
  found = outliers({where: float(np.median(values)) for where, values in samples.items()}, training_length)
  measurements = []
  for (layer, head), values in samples.items():
    bins = [{"quantile": q, "value": float(v)} for q, v in zip(QUANTILES, np.quantile(values, QUANTILES))]
    measurements.append(Measurement(measure, length, float(np.median(values)), values.size, bins=bins, layer=layer, head=head,
                                    outlier=(layer, head) in found))
  return measurements


def _zero_input(inputs: Inputs) -> list[Measurement]:
  values = {(layer, head): float(value) for layer, heads in zero_input_half_lives(inputs.model).items()
            for head, value in enumerate(heads)}
  found = outliers(values, inputs.config.data.sequence_length)
  return [Measurement(ZERO_INPUT, 0, value, 1, layer=layer, head=head, outlier=(layer, head) in found)
          for (layer, head), value in values.items()]


def _gates(block: Block, trace: Trace, layer: jax.Array) -> jax.Array | None:
  """A tap: log-decays (B, T, H) of a block with a memory."""
  del block, layer
  return trace.get("log_gamma")


def _measured(inputs: Inputs, rows: np.ndarray, progress: Progress) -> list[Measurement]:
  traces = tapped(inputs, rows, _gates)
  progress(rows.size)
  layers = {layer: half_life(log_gamma) for layer, log_gamma in enumerate(traces) if log_gamma is not None}
  measurements = []
  for length in inputs.lengths:
    samples = {(layer, head): values[:, :length, head].ravel() for layer, values in layers.items()
               for head in range(values.shape[2])}
    measurements += distribution(MEASURED, length, samples, inputs.config.data.sequence_length)
  return measurements


def retention_table(records: Sequence[dict[str, Any]]) -> str:
  """One line a head: zero-input half-life, and quantiles of the measured ones at the longest length."""
  zero = {(r["layer"], r["head"]): r for r in records if r["measure"] == ZERO_INPUT}
  longest = max((r["length"] for r in records if r["measure"] == MEASURED), default=0)
  measured = {(r["layer"], r["head"]): r for r in records if r["measure"] == MEASURED and r["length"] == longest}
  lines = [f"half-lives in tokens; measured over {longest} tokens of text; * longer than the training length and "
           f"{OUTLIER_FACTOR} times the median head",
           "  ".join([" layer", "  head", *(f"{name:>12}" for name in ("zero input", "5 %", "median", "95 %", "longest"))])]
  for where in sorted(zero.keys() | measured.keys()):
    known = [r for r in (zero.get(where), measured.get(where)) if r is not None]
    quantiles = {b["quantile"]: b["value"] for b in measured[where]["bins"] or []} if where in measured else {}
    values = [zero[where]["value"] if where in zero else None, *(quantiles.get(q) for q in (0.05, 0.5, 0.95, 1.0))]
    lines.append("  ".join([f"{where[0]:>6}", f"{where[1]:>6}", *(f"{_tokens(v):>12}" for v in values),
                            "*" if any(r.get("outlier") for r in known) else ""]).rstrip())
  return "\n".join(lines)


def _tokens(value: float | None) -> str:
  return "" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.3g}"

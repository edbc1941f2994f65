"""Suite ``retention``: the half-life of every memory head, the number of tokens after which half of its content is left.

* ``half_life_zero_input``: from the bias of the decay gate alone, ``ln(1/2) / ln(sigmoid(bias + gamma_bias))``, with
  `max_half_life` and a retention cap if the model has them. It is recorded under the length 0.
* ``half_life_measured``: over the tokens of held-out documents. All lengths are prefixes of one pass over the longest one. The
  value is the median, `bins` hold quantiles.

A head is an outlier if its half-life is both longer than the training length, so that nothing in training could tell it from
infinity, and more than 16 times the median over all heads of the same measure and length.
"""

from __future__ import annotations

from collections.abc import Sequence
import itertools

import jax
from jaxtyping import Float, Int
import numpy as np

from atma_jax.errors import UserError
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record, is_ok
from atma_jax.evaluation.report import figures, markup
from atma_jax.evaluation.report.runs import Run
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint
from atma_jax.evaluation.tapping import document_rows, tap_layers
from atma_jax.models.block import Block, Trace
from atma_jax.models.retention_cap import half_life, zero_input_half_lives

ZERO_INPUT, MEASURED = "half_life_zero_input", "half_life_measured"
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
OUTLIER_FACTOR = 16
_HEADINGS = {ZERO_INPUT: "zero input", MEASURED: "measured over text"}
_LISTED_HEADS = 12  # in the report

Head = tuple[int, int]  # layer and head


def retention_cells(inputs: Inputs, options: CheckedOptions) -> list[Cell]:
  """One cell for the biases and one for the text."""
  del options
  heads = [(layer, head) for layer, values in zero_input_half_lives(inputs.model).items() for head in range(len(values))]
  if not heads:
    raise UserError("--suite=retention: the model has no memory")
  rows = document_rows(inputs, "retention")
  zero_input = Cell("half-lives of the biases", tuple((ZERO_INPUT, 0, *head) for head in heads), {}, 0,
                    lambda progress: _zero_input(inputs))
  expected = tuple((MEASURED, length, *head) for length, head in itertools.product(inputs.lengths, heads))
  measured = Cell(f"half-lives to {rows.shape[1]}", expected, {"documents": len(rows), "text": fingerprint(rows)}, rows.size,
                  lambda progress: _measured(inputs, rows, progress))
  return [zero_input, measured]


def outliers(half_lives: dict[Head, float], training_length: int) -> set[Head]:
  """The heads that are outliers by the suite's rule."""
  bound = max(training_length, OUTLIER_FACTOR * float(np.median(list(half_lives.values()))))
  return {head for head, value in half_lives.items() if value > bound}


def half_life_measurements(measure: str, length: int, samples: dict[Head, Float[np.ndarray, " n"]],
                           training_length: int) -> list[Measurement]:
  """Median and quantiles of the half-lives of every head."""
  standing_out = outliers({head: float(np.median(values)) for head, values in samples.items()}, training_length)
  measurements = []
  for (layer, head), values in samples.items():
    bins = [{"quantile": q, "value": float(v)} for q, v in zip(QUANTILES, np.quantile(values, QUANTILES))]
    measurements.append(Measurement(measure, length, float(np.median(values)), values.size, bins=bins, layer=layer, head=head,
                                    outlier=(layer, head) in standing_out))
  return measurements


def _zero_input(inputs: Inputs) -> list[Measurement]:
  values = {(layer, head): float(value) for layer, heads in zero_input_half_lives(inputs.model).items()
            for head, value in enumerate(heads)}
  standing_out = outliers(values, inputs.config.data.sequence_length)
  return [Measurement(ZERO_INPUT, 0, value, 1, layer=layer, head=head, outlier=(layer, head) in standing_out)
          for (layer, head), value in values.items()]


def _log_gamma(block: Block, trace: Trace, layer: jax.Array) -> jax.Array | None:
  """A tap that takes the log-decays (B, T, H) of a block with a memory."""
  del block, layer
  return trace.get("log_gamma")


def _measured(inputs: Inputs, rows: Int[np.ndarray, "N T"], progress: Progress) -> list[Measurement]:
  taps = tap_layers(inputs, rows, _log_gamma)
  progress(rows.size)
  layers = {layer: half_life(log_gamma) for layer, log_gamma in enumerate(taps) if log_gamma is not None}
  measurements = []
  for length in inputs.lengths:
    samples = {(layer, head): values[:, :length, head].ravel() for layer, values in layers.items()
               for head in range(values.shape[2])}
    measurements += half_life_measurements(MEASURED, length, samples, inputs.config.data.sequence_length)
  return measurements


# --- Table and report -------------------------------------------------------------------------------------------------


def retention_table(records: Sequence[Record]) -> str:
  """One line per head: its zero-input half-life, and quantiles of the measured ones at the longest length."""
  zero = {(r["layer"], r["head"]): r for r in records if r["measure"] == ZERO_INPUT}
  longest = max((r["length"] for r in records if r["measure"] == MEASURED), default=0)
  measured = {(r["layer"], r["head"]): r for r in records if r["measure"] == MEASURED and r["length"] == longest}
  lines = [f"half-lives in tokens; measured over {longest} tokens of text; * longer than the training length and "
           f"{OUTLIER_FACTOR} times the median head",
           "  ".join([" layer", "  head", *(f"{name:>12}" for name in ("zero input", "5 %", "median", "95 %", "longest"))])]
  for head in sorted(zero.keys() | measured.keys()):
    known = [r for r in (zero.get(head), measured.get(head)) if r is not None]
    quantiles = {b["quantile"]: b["value"] for b in measured[head]["bins"] or []} if head in measured else {}
    values = [zero[head]["value"] if head in zero else None, *(quantiles.get(q) for q in (0.05, 0.5, 0.95, 1.0))]
    lines.append("  ".join([f"{head[0]:>6}", f"{head[1]:>6}", *(f"{_tokens_text(v):>12}" for v in values),
                            "*" if any(r.get("outlier") for r in known) else ""]).rstrip())
  return "\n".join(lines)


def _tokens_text(value: float | None) -> str:
  return "" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.3g}"


def retention_section(runs: Sequence[Run]) -> str:
  """Histograms of the half-lives, and the heads with the longest ones."""
  heads = [(run.label, heading, r) for run in runs for measure, heading in _HEADINGS.items()
           for r in _at_the_longest_length([r for r in run.select(measure) if is_ok(r)])]
  if not heads:
    return ""
  panels: dict[str, dict[str, list[float | None]]] = {}
  for label, heading, record in heads:
    panels.setdefault(heading, {}).setdefault(label, []).append(record["value"])
  heads.sort(key=lambda item: float("inf") if item[2]["value"] is None else item[2]["value"], reverse=True)
  rows = [[label, heading, r.get("layer", ""), r.get("head", ""), "never" if r["value"] is None else f"{r['value']:,.0f}",
           "outlier" if r.get("outlier") else ""] for label, heading, r in heads[:_LISTED_HEADS]]
  table = markup.table(["checkpoint", "half-life", "layer", "head", "tokens", ""], rows, "numbers")
  picture = markup.image(figures.half_life_histograms(panels), "half-lives of the memory's heads")
  return f"{picture}<p>The longest half-lives, in tokens; over text, the median at the longest length.</p>{table}"


def _at_the_longest_length(records: Sequence[Record]) -> list[Record]:
  longest = max((r["length"] for r in records), default=0)
  return [r for r in records if r["length"] == longest]


SUITE = Suite(
  help="half-life of every memory head, from its bias alone and over text",
  cells=retention_cells,
  table=retention_table,
  sections={"Retention of the memory": retention_section},
  order=60,
  schema={"layer": int, "head": int, "bins?": ([{"quantile": float, "value": float | None}], None)},
)

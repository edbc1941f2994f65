"""Suite ``needle``: induction over a distance, one synthetic record per trial.

A row is end-of-text, the sentence " The access code for record {key} is" with a seven-digit key and five digits, d tokens of
real text, and the key again. It is scored on the five digits under teacher forcing. The baseline ("absent") is the same row
with text in place of the record. A trial has the same key, digits and text at every distance: the text of a shorter distance
is a prefix of that of a longer one.

Measures, each also as ``absent_*``: ``needle_accuracy`` (share of digits predicted correctly; the interval treats digits as
independent), ``needle_exact`` (share of trials with all five digits correct) and ``needle_loss`` (nats per digit).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

from jaxtyping import Int
import numpy as np

from atma_jax.config import POSITIVE, option
from atma_jax.data.needles import draw_needle, induction_needle, needle_length
from atma_jax.errors import UserError
from atma_jax.evaluation.digits import digit_measurements, joined_documents, score_digits
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import figures, markup, plots
from atma_jax.evaluation.report.drawing import BLUE, CHANCE, GRAY, GREEN, ORANGE
from atma_jax.evaluation.report.runs import Run, lengths_of, series_by_heading
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

CONDITIONS = ("needle", "absent")
MEASURES = tuple(f"{condition}_{what}" for condition in CONDITIONS for what in ("accuracy", "exact", "loss"))
_ROW_MULTIPLE = 128  # rows are padded to a multiple of this, so that each distance needs a single program
_TEXT_SEED = 0x6E66
_HEADINGS = {"needle_accuracy": "digits right", "needle_exact": "all five right",
             "absent_accuracy": "needle absent: digits right"}


@dataclasses.dataclass(frozen=True)
class NeedleOptions(CheckedOptions):
  """Options of the suite."""

  trials: int = option(24, "Needles per distance.", POSITIVE)


def needle_cells(inputs: Inputs, options: NeedleOptions) -> list[Cell]:
  """One cell per distance."""
  text = joined_documents(inputs)
  needles = [draw_needle(trial, inputs.seed) for trial in range(options.trials)]
  needed = inputs.lengths[-1] + _overhead(inputs, needles)
  if len(text) < needed:
    raise UserError(f"the held-out documents have {len(text)} tokens in all, fewer than the {needed} of a needle at the "
                    "longest distance: shorten --multiples, or prepare more config.data.heldout_documents")
  return [_cell(inputs, text, needles, distance) for distance in inputs.lengths]


def _overhead(inputs: Inputs, needles: Sequence[tuple[str, str]]) -> int:
  """The most tokens of a row besides the distance."""
  return max(needle_length(inputs.tokenizer, key=key, value=value) for key, value in needles)


def _cell(inputs: Inputs, text: Int[np.ndarray, " n"], needles: list[tuple[str, str]], distance: int) -> Cell:
  length = -(-(distance + _overhead(inputs, needles)) // _ROW_MULTIPLE) * _ROW_MULTIPLE

  def run(progress: Progress) -> list[Measurement]:
    losses, hits = score_digits(inputs, *needle_rows(inputs, text, needles, distance, length), progress)
    halves = zip(CONDITIONS, np.split(losses, 2), np.split(hits, 2))
    return [m for condition, loss, hit in halves for m in digit_measurements(condition, distance, loss, hit)]

  settings = {"trials": len(needles), "seed": inputs.seed, "text": fingerprint(text)}
  expected = tuple((measure, distance) for measure in MEASURES)
  return Cell(f"needle at {distance}", expected, settings, 2 * len(needles) * length, run)


def needle_rows(inputs: Inputs, text: Int[np.ndarray, " n"], needles: list[tuple[str, str]], distance: int,
                length: int) -> tuple[Int[np.ndarray, "N length"], Int[np.ndarray, "N 5"]]:
  """Padded rows and the positions of their digits: all trials with the needle, then all trials without it."""
  rows, positions = np.full((2 * len(needles), length), inputs.tokenizer.eot_id, np.int32), []
  starts = [np.random.default_rng([_TEXT_SEED, inputs.seed, t]).integers(len(text)) for t in range(len(needles))]
  for row, (present, trial) in enumerate((p, t) for p in (True, False) for t in range(len(needles))):
    filler = text[np.arange(starts[trial], starts[trial] + length) % len(text)]
    key, value = needles[trial]
    tokens, at = induction_needle(inputs.tokenizer, filler, distance=distance, key=key, value=value, present=present)
    rows[row, :len(tokens)] = tokens
    positions.append(at)
  return rows, np.stack(positions)


# --- Plots and report -------------------------------------------------------------------------------------------------


def needle_plots(records: Sequence[Record], title: str, training_length: int) -> dict[str, bytes]:
  """Accuracy against distance, with the baseline without a needle and the probability of guessing."""
  accuracy, exact, absent = ([r for r in records if r["measure"] == measure] for measure in _HEADINGS)
  if not accuracy:
    return {}
  figure, axes = plots.new_plot(title, f"Induction needle ({exact[0]['n']} trials a distance)")
  plots.draw_series(axes, accuracy, "needle present: digits right", BLUE, "o", scale=100)
  plots.draw_series(axes, exact, "needle present: all five right", GREEN, "^", scale=100)
  plots.draw_series(axes, absent, "needle absent: digits right", ORANGE, "s", scale=100)
  axes.axhline(100 * CHANCE, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2, label="chance, one digit of ten")
  lengths = [r["length"] for r in accuracy]
  plots.set_length_axis(axes, min(lengths), max(lengths), training_length, "distance (tokens, multiples of training)")
  axes.set_ylim(-3, 110)
  axes.set_yticks(range(0, 101, 20))
  axes.set_ylabel("accuracy (%, 95 % Wilson interval)")
  return {"needle_vs_distance.png": plots.png(figure, axes)}


def needle_section(runs: Sequence[Run]) -> str:
  """Accuracies against distance, and a heat map of the share of correct digits."""
  panels = series_by_heading(runs, _HEADINGS)
  if not panels:
    return ""
  heat = {run.label: {r["length"]: r for r in found} for run in runs if (found := run.select("needle_accuracy"))}
  return (markup.image(figures.accuracy_panels(panels, chance=True), "needle accuracy against distance")
          + "<p>Digits right, in %, by distance. The dashed line is chance, one digit of ten.</p>"
          + markup.heatmap("", heat, lengths_of(runs, ["needle_accuracy"])))


SUITE = Suite(
  help="recall of five digits stated once, over growing distances of real text",
  cells=needle_cells,
  options=NeedleOptions,
  columns=("needle_accuracy", "needle_exact", "needle_loss", "absent_accuracy"),
  plots=needle_plots,
  sections={"Induction needle": needle_section},
  order=30,
)

"""Suite ``needle``: induction over a distance, one synthetic record per trial.

A row is end-of-text, the sentence " The access code for record {key} is" with a seven-digit key and five digits, d tokens of
real text, and the key again. It is scored on the five digits (see `atma_jax.evaluation.digits`). There are two more kinds of
rows: "unseen" has another sentence, which is in no training material, while the one above is in that of ``recall:`` sources;
"absent" has text in place of the record. A trial has the same key, digits and text in all of them and at every distance: the text
of a shorter distance is a prefix of that of a longer one.

Measures, each also as ``unseen_*`` and ``absent_*``: ``needle_exact`` (share of trials with all five digits right),
``needle_accuracy`` (share of digits right; the interval treats digits as independent) and ``needle_loss`` (nats per digit).

It shows that something stated once is found again over a distance. It cannot show that the key was looked up: there is one
record, so a model that copies the only digits of this form is right. The suite ``lookup`` has records to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
import numpy as np

from atma_jax.data.lookup_tasks import WORDINGS
from atma_jax.data.needles import draw_needle, induction_needle, needle_length
from atma_jax.errors import UserError
from atma_jax.evaluation.digits import (
  DIGIT_CHANCE,
  cut_haystack,
  digit_measurements,
  joined_documents,
  padded_width,
  score_trials,
)
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import figures, markup, plots
from atma_jax.evaluation.report.console_tables import shares_text
from atma_jax.evaluation.report.drawing import BLUE, GRAY, GREEN, ORANGE, PALETTE
from atma_jax.evaluation.report.runs import Run, lengths_of, series_by_heading
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

CONDITIONS = {"needle": "seen", "absent": "seen", "unseen": "unseen"}  # and their wordings
_TEXT_SEED = 0x6E66
_HEADINGS = {"needle_exact": "all five digits right, wording seen in training",
             "unseen_exact": "all five digits right, unseen wording",
             "needle_accuracy": "digits right, wording seen in training", "unseen_accuracy": "digits right, unseen wording",
             "absent_accuracy": "needle absent: digits right"}


def needle_cells(inputs: Inputs, options: CheckedOptions) -> list[Cell]:
  """One cell per distance and wording."""
  del options
  text = joined_documents(inputs)
  needed = inputs.lengths[-1] + _overhead(inputs)
  if len(text) < needed:
    raise UserError(f"the held-out documents have {len(text)} tokens in all, fewer than the {needed} of a needle at the "
                    "longest distance: shorten --multiples, or prepare more config.data.heldout_documents")
  return [_cell(inputs, text, distance, wording) for distance in inputs.lengths for wording in WORDINGS]


def _overhead(inputs: Inputs) -> int:
  """The most tokens of a row besides the distance."""
  needles = [draw_needle(trial, inputs.seed) for trial in range(inputs.trials)]
  return max(needle_length(inputs.tokenizer, key=key, value=value, cue=wording.record)
             for key, value in needles for wording in WORDINGS.values())


def _cell(inputs: Inputs, text: Int[np.ndarray, " n"], distance: int, wording: str) -> Cell:
  conditions = [condition for condition, words in CONDITIONS.items() if words == wording]
  tokens = distance + _overhead(inputs)

  def measure(condition: str, progress: Progress) -> list[Measurement]:
    scores = score_trials(inputs, lambda trial: needle_row(inputs, text, trial, distance, condition), inputs.trials, tokens,
                          progress)
    return digit_measurements(condition, distance, *scores)

  def run(progress: Progress) -> list[Measurement]:
    return [measurement for condition in conditions for measurement in measure(condition, progress)]

  settings = {"trials": inputs.trials, "seed": inputs.seed, "text": fingerprint(text), "wording": wording}
  expected = tuple((f"{condition}_{what}", distance) for condition in conditions for what in ("exact", "accuracy", "loss"))
  return Cell(f"needle at {distance}, {wording} wording", expected, settings,
              len(conditions) * inputs.trials * padded_width(tokens), run)


def needle_row(inputs: Inputs, text: Int[np.ndarray, " n"], trial: int, distance: int,
               condition: str) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " 5"]]:
  """The row of a trial under one of `CONDITIONS`, and the positions of its digits."""
  key, value = draw_needle(trial, inputs.seed)
  cue = WORDINGS[CONDITIONS[condition]].record
  needed = distance + needle_length(inputs.tokenizer, key=key, value=value, cue=cue)
  filler = cut_haystack(text, needed, np.random.default_rng([_TEXT_SEED, inputs.seed, trial]))
  return induction_needle(inputs.tokenizer, filler, distance=distance, key=key, value=value, present=condition != "absent",
                          cue=cue)


# --- Plots and report -------------------------------------------------------------------------------------------------


def needle_plots(records: Sequence[Record], title: str, training_length: int) -> dict[str, bytes]:
  """Accuracy against distance, with the baseline without a needle and the probability of guessing."""
  exact, unseen, accuracy, _, absent = ([r for r in records if r["measure"] == measure] for measure in _HEADINGS)
  if not accuracy:
    return {}
  figure, axes = plots.new_plot(title, f"Induction needle ({exact[0]['n']} trials a distance)")
  plots.draw_series(axes, exact, "all five digits right", GREEN, "^", scale=100)
  if unseen:
    plots.draw_series(axes, unseen, "all five digits right, unseen wording", PALETTE[3], "v", scale=100)
  plots.draw_series(axes, accuracy, "digits right", BLUE, "o", scale=100)
  plots.draw_series(axes, absent, "needle absent: digits right", ORANGE, "s", scale=100)
  axes.axhline(100 * DIGIT_CHANCE, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2, label="chance, one digit of ten")
  lengths = [r["length"] for r in accuracy]
  plots.set_length_axis(axes, min(lengths), max(lengths), training_length, "distance (tokens, multiples of training)")
  axes.set_ylim(-3, 110)
  axes.set_yticks(range(0, 101, 20))
  axes.set_ylabel("accuracy (%, 95 % Wilson interval)")
  return {"needle_vs_distance.png": plots.png(figure, axes)}


def needle_table(records: Sequence[Record]) -> str:
  """The shares with their intervals, whole answers first."""
  by_measure = {measure: [r for r in records if r["measure"] == measure] for measure in _HEADINGS}
  return shares_text([r for found in by_measure.values() for r in found], "needle", lambda r: _HEADINGS[r["measure"]])


def needle_section(runs: Sequence[Run]) -> str:
  """Accuracies against distance, and a heat map of the share of trials with all digits right."""
  panels = series_by_heading(runs, _HEADINGS)
  if not panels:
    return ""
  heat = {f"{run.label}, {wording} wording": {r["length"]: r for r in found} for run in runs
          for wording, measure in (("seen", "needle_exact"), ("unseen", "unseen_exact")) if (found := run.select(measure))}
  return (markup.image(figures.accuracy_panels(panels, chance=True), "needle accuracy against distance")
          + "<p>All five digits right, in % of the trials, by distance. The dashed line is chance. The seen wording is that of "
          "<code>recall:</code> sources; the unseen one is in no training material.</p>"
          + markup.heatmap("", heat, lengths_of(runs, ["needle_exact", "unseen_exact"])))


SUITE = Suite(
  help="recall of five digits stated once, over growing distances of real text, in two wordings",
  cells=needle_cells,
  columns=("needle_exact", "unseen_exact", "needle_accuracy", "needle_loss", "absent_accuracy"),
  table=needle_table,
  plots=needle_plots,
  sections={"Induction needle": needle_section},
  order=30,
)

"""Suite ``needle``: is a code that was stated once found again, how many tokens later?

The induction needle of Polar Attention (arXiv 2606.25156): end-of-text, a record of a seven-digit key and five digits,
a gap of d tokens of real text, the key again; scored on the five digits under teacher forcing. The baseline is the same
row with text in place of the record. A trial has the same key, digits and text at every distance: a shorter gap is a
prefix of a longer one.

Measures: ``needle_accuracy`` (share of digits predicted right; the interval treats digits as independent),
``needle_exact`` (share of trials with all five right), ``needle_loss`` (nats a digit), and ``absent_*`` likewise.
"""

from __future__ import annotations

import numpy as np

from atma_jax.data.needles import draw_needle, induction_needle, needle_length
from atma_jax.errors import UserError
from atma_jax.evaluation.cells import Cell, Inputs, Progress, fingerprint
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.statistics import mean_and_error, wilson_interval

CONDITIONS = ("needle", "absent")
MEASURES = tuple(f"{condition}_{what}" for condition in CONDITIONS for what in ("accuracy", "exact", "loss"))
_BUCKET = 128  # rows are padded to a multiple of this, so that a distance is one shape
_TEXT_SEED = 0x6E66


def needle_cells(inputs: Inputs) -> list[Cell]:
  """One cell a distance."""
  text = np.concatenate([part for d in inputs.documents for part in (d, [inputs.tokenizer.eot_id])] or [[]])
  needles = [draw_needle(trial, inputs.seed) for trial in range(inputs.trials)]
  needed = inputs.lengths[-1] + max(needle_length(inputs.tokenizer, key=k, value=v) for k, v in needles)
  if len(text) < needed:
    raise UserError(f"the held-out documents have {len(text)} tokens in all, fewer than the {needed} of a needle at the "
                    "longest distance: shorten --multiples, or prepare more config.data.heldout_documents")
  return [_cell(inputs, text.astype(np.int32), needles, distance) for distance in inputs.lengths]


def _cell(inputs: Inputs, text: np.ndarray, needles: list[tuple[str, str]], distance: int) -> Cell:
  overhead = max(needle_length(inputs.tokenizer, key=key, value=value) for key, value in needles)
  length = -(-(distance + overhead) // _BUCKET) * _BUCKET

  def run(progress: Progress) -> list[Measurement]:
    rows, positions = _rows(inputs, text, needles, distance, length)
    losses, hits = [], []
    for loss, predicted in inputs.scorer.at_positions(rows, positions):
      targets = np.take_along_axis(rows, positions, axis=1)[len(hits):len(hits) + len(loss)]
      losses.extend(loss)
      hits.extend(predicted == targets)
      progress(len(loss) * length)
    parts = zip(CONDITIONS, np.split(np.stack(losses), 2), np.split(np.stack(hits), 2))
    return [m for condition, loss, hit in parts for m in condition_measurements(condition, distance, loss, hit)]

  settings = {"trials": inputs.trials, "seed": inputs.seed, "text": fingerprint(text)}
  expected = tuple((measure, distance) for measure in MEASURES)
  return Cell(f"needle at {distance}", expected, settings, 2 * len(needles) * length, run)


def condition_measurements(condition: str, distance: int, losses: np.ndarray, hits: np.ndarray) -> list[Measurement]:
  """Accuracy, exact accuracy and loss of one condition; losses (trials, 5) in nats, hits (trials, 5) booleans."""
  right, exact = int(hits.sum()), int(hits.all(axis=1).sum())
  loss, error = mean_and_error(losses.mean(axis=1, dtype=np.float64))
  return [
      Measurement(f"{condition}_accuracy", distance, right / hits.size, hits.size, interval=wilson_interval(right, hits.size)),
      Measurement(f"{condition}_exact", distance, exact / len(hits), len(hits), interval=wilson_interval(exact, len(hits))),
      Measurement(f"{condition}_loss", distance, loss, len(losses), error),
  ]


def _rows(inputs: Inputs, text: np.ndarray, needles: list[tuple[str, str]], distance: int,
          length: int) -> tuple[np.ndarray, np.ndarray]:
  """All trials with the needle, then all without: tokens (2 trials, length), padded, and positions (2 trials, 5)."""
  rows, positions = np.full((2 * len(needles), length), inputs.tokenizer.eot_id, np.int32), []
  starts = [np.random.default_rng([_TEXT_SEED, inputs.seed, t]).integers(len(text)) for t in range(len(needles))]
  for row, (present, trial) in enumerate((p, t) for p in (True, False) for t in range(len(needles))):
    filler = text[np.arange(starts[trial], starts[trial] + length) % len(text)]
    key, value = needles[trial]
    tokens, at = induction_needle(inputs.tokenizer, filler, distance=distance, key=key, value=value, present=present)
    rows[row, :len(tokens)] = tokens
    positions.append(at)
  return rows, np.stack(positions)

"""Scoring of trials whose answer is a row of digits: what the needle suites share."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
import numpy as np

from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.statistics import mean_and_error, wilson_interval
from atma_jax.evaluation.suite import Inputs, Progress


def joined_documents(inputs: Inputs) -> Int[np.ndarray, " n"]:
  """All held-out documents, each followed by end-of-text: the text that surrounds a needle."""
  parts = [part for document in inputs.documents for part in (document, [inputs.tokenizer.eot_id])]
  return np.concatenate(parts or [[]]).astype(np.int32)


def score_digits(inputs: Inputs, rows: Int[np.ndarray, "N T"], positions: Int[np.ndarray, "N P"],
                 progress: Progress) -> tuple[Float[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
  """Losses in nats of the tokens at `positions`, and whether each of them was the most likely one."""
  losses, hits = [], []
  for loss, predicted in inputs.scorer.at_positions(rows, positions):
    targets = np.take_along_axis(rows, positions, axis=1)[len(hits):len(hits) + len(loss)]
    losses.extend(loss)
    hits.extend(predicted == targets)
    progress(len(loss) * rows.shape[1])
  return np.stack(losses), np.stack(hits)


def digit_measurements(prefix: str, length: int, losses: Float[np.ndarray, "N P"],
                       hits: Bool[np.ndarray, "N P"]) -> list[Measurement]:
  """Accuracy per digit, exact accuracy per trial, and loss per digit, of N trials with P digits each.

  Args:
    prefix: of the names of the measures.
    length: that the measurements are recorded under.
    losses: in nats.
    hits: whether each digit was predicted.
  """
  right, exact = int(hits.sum()), int(hits.all(axis=1).sum())
  loss, error = mean_and_error(losses.mean(axis=1, dtype=np.float64))
  return [
      Measurement(f"{prefix}_accuracy", length, right / hits.size, hits.size, interval=wilson_interval(right, hits.size)),
      Measurement(f"{prefix}_exact", length, exact / len(hits), len(hits), interval=wilson_interval(exact, len(hits))),
      Measurement(f"{prefix}_loss", length, loss, len(losses), error),
  ]

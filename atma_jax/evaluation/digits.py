"""Scoring of retrieval trials: what the needle suites share.

An answer is scored by teacher forcing: a token counts as right if it is the most likely one after the tokens before it, those of
the answer included. For exact matches this equals greedy decoding, which writes the whole answer if and only if each of its
tokens is the most likely one after the right ones before it. For single digits it does not: greedy decoding goes on from its
own mistakes, while here the first digit of an answer tells which of the values in sight is meant, and the others can be copied.

All trials of one context length run one program, whatever their suite, task, wording and depth: rows are padded to a common
width, answers to a common number of tokens, and batches have a fixed number of rows. No row is shared by trials, so that trials
are independent and a Wilson interval holds; a cell costs trials x row width in tokens, which its records state.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
import numpy as np

from atma_jax.errors import UserError
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.statistics import mean_and_error, wilson_interval
from atma_jax.evaluation.suite import Inputs, Progress

DIGIT_CHANCE = 0.1
VALUE_CHANCE = 1e-5  # five digits that were drawn at random
ANSWER_TOKENS = 32  # scored tokens of a row; shorter answers are padded to it
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HAYSTACKS = ("filler", "text")
_ROW_MULTIPLE = 128
MakeRow = Callable[[int], tuple[Int[np.ndarray, " T"], Int[np.ndarray, " P"]]]  # the tokens of a trial and its scored positions


def joined_documents(inputs: Inputs) -> Int[np.ndarray, " n"]:
  """All held-out documents, each followed by end-of-text: the text that surrounds a needle."""
  parts = [part for document in inputs.documents for part in (document, [inputs.tokenizer.eot_id])]
  return np.concatenate(parts or [[]]).astype(np.int32)


def make_haystack(inputs: Inputs, name: str) -> Int[np.ndarray, " n"]:
  """The tokens that statements are put into: whole sentences of synthetic filler, or held-out documents (text).

  Raises:
    UserError: the held-out documents are shorter than the longest length.
  """
  longest = inputs.lengths[-1]
  if name == "filler":
    return inputs.tokenizer.encode(FILLER * (2 * longest // len(inputs.tokenizer.encode(FILLER)) + 2))
  text = joined_documents(inputs)
  if len(text) < longest:
    raise UserError(f"the held-out documents have {len(text)} tokens in all, fewer than the longest length of {longest}: "
                    "shorten --multiples, or prepare more config.data.heldout_documents")
  return text


def cut_haystack(haystack: Int[np.ndarray, " n"], length: int, rng: np.random.Generator) -> Int[np.ndarray, " length"]:
  """`length` tokens from a random place on; the haystack begins again after its end."""
  start = rng.integers(len(haystack))
  return haystack[np.arange(start, start + length) % len(haystack)]


def padded_width(tokens: int) -> int:
  """The width that a row of so many tokens is padded to: that of a needle at a distance as long as the row, as a rule."""
  return (tokens // _ROW_MULTIPLE + 1) * _ROW_MULTIPLE


def score_trials(inputs: Inputs, make_row: MakeRow, trials: int, tokens: int,
                 progress: Progress) -> tuple[Float[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
  """Scores the answers of trials.

  Args:
    inputs: scorer and tokenizer.
    make_row: the row of a trial by its number, and the positions of its answer: as many in each row, at most `ANSWER_TOKENS`.
    trials: how many, N.
    tokens: the most of a row.
    progress: called with the tokens of every batch.

  Returns:
    losses: in nats, of every scored token.
    hits: whether each of them was the most likely one.
  """
  width = padded_width(tokens)
  size = inputs.scorer.rows_at_once(width)
  losses, hits = [], []
  for start in range(0, trials, size):
    made = [make_row(trial) for trial in range(start, min(start + size, trials))]
    answer = len(made[0][1])
    rows = np.full((len(made), width), inputs.tokenizer.eot_id, np.int32)
    positions = np.zeros((len(made), ANSWER_TOKENS), np.int64)
    for index, (row, at) in enumerate(made):
      rows[index, :len(row)] = row
      positions[index] = np.pad(at, (0, ANSWER_TOKENS - answer), mode="edge")
    ((loss, predicted),) = inputs.scorer.at_positions(rows, positions, batch_size=size)
    losses.append(loss[:, :answer])
    hits.append((predicted == np.take_along_axis(rows, positions, axis=1))[:, :answer])
    progress(rows.size)
  return np.concatenate(losses), np.concatenate(hits)


def digit_measurements(prefix: str, length: int, losses: Float[np.ndarray, "N P"], hits: Bool[np.ndarray, "N P"],
                       chance: float = VALUE_CHANCE, digit_chance: float | None = DIGIT_CHANCE) -> list[Measurement]:
  """Exact accuracy per trial, accuracy per digit and loss per digit, of N trials with P digits each.

  Args:
    prefix: of the names of the measures.
    length: that the measurements are recorded under.
    losses: in nats.
    hits: whether each digit was predicted.
    chance: probability that an answer as a whole is guessed.
    digit_chance: probability that a digit is guessed; None where it cannot be said.
  """
  right, exact = int(hits.sum()), int(hits.all(axis=1).sum())
  loss, error = mean_and_error(losses.mean(axis=1, dtype=np.float64))
  return [
      Measurement(f"{prefix}_exact", length, exact / len(hits), len(hits), interval=wilson_interval(exact, len(hits)),
                  chance=chance),
      Measurement(f"{prefix}_accuracy", length, right / hits.size, hits.size, interval=wilson_interval(right, hits.size),
                  chance=digit_chance),
      Measurement(f"{prefix}_loss", length, loss, len(losses), error),
  ]

"""Suite ``retrieval``: a value stated at a depth of a haystack, asked for at its end, over a grid of lengths.

Passkey (" The access code for record {key} is" and five spaced digits) and NIAH (" The special magic {word} number is"), in
synthetic filler and in real text. A row has exactly the length's tokens, the question included; it is scored on the
five digits under teacher forcing. A trial has the same cue, value and haystack at every length and depth: a shorter
haystack is a prefix of a longer one.

Measures, one cell for each task, haystack, length and depth: ``retrieval_accuracy`` (share of digits predicted right),
``retrieval_exact`` (share of trials with all five right), both with Wilson intervals, and ``retrieval_loss`` (nats a digit).
"""

from __future__ import annotations

import numpy as np

from atma_jax.data.needles import CUE, MAGIC_CUE, draw_needle, draw_word, needle_in_haystack
from atma_jax.errors import UserError
from atma_jax.evaluation.cells import Cell, Inputs, Progress, fingerprint
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.suites.needle import condition_measurements

TASKS = ("passkey", "niah")
HAYSTACKS = ("filler", "text")
MEASURES = ("retrieval_accuracy", "retrieval_exact", "retrieval_loss")
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TEXT_SEED = 0x7265


def retrieval_cells(inputs: Inputs) -> list[Cell]:
  """One cell for each task, haystack, length and depth."""
  haystacks = {"filler": _filler(inputs, inputs.lengths[-1]), "text": _text(inputs)}
  return [_cell(inputs, task, haystack, haystacks[haystack], length, depth)
          for length in inputs.lengths for task in TASKS for haystack in HAYSTACKS for depth in inputs.depths]


def cue_and_value(task: str, trial: int, seed: int) -> tuple[str, str]:
  """What a trial states and asks for: the same at every length and depth."""
  key, value = draw_needle(trial, seed)
  return (CUE.format(key=key) if task == "passkey" else MAGIC_CUE.format(word=draw_word(trial, seed))), value


def rows(inputs: Inputs, task: str, haystack: np.ndarray, length: int, depth: float) -> tuple[np.ndarray, np.ndarray]:
  """All trials of a cell: tokens (trials, length) and positions (trials, 5) of the value."""
  made = []
  for trial in range(inputs.trials):
    start = np.random.default_rng([_TEXT_SEED, inputs.seed, trial]).integers(len(haystack))
    hay = haystack[np.arange(start, start + length) % len(haystack)]
    cue, value = cue_and_value(task, trial, inputs.seed)
    made.append(needle_in_haystack(inputs.tokenizer, hay, length=length, depth=depth, cue=cue, value=value))
  return np.stack([tokens for tokens, _ in made]), np.stack([positions for _, positions in made])


def _filler(inputs: Inputs, length: int) -> np.ndarray:
  """Whole sentences, at least `length` tokens."""
  once = len(inputs.tokenizer.encode(FILLER))
  return inputs.tokenizer.encode(FILLER * (2 * length // once + 2))


def _text(inputs: Inputs) -> np.ndarray:
  text = np.concatenate([part for d in inputs.documents for part in (d, [inputs.tokenizer.eot_id])] or [[]]).astype(np.int32)
  if len(text) < inputs.lengths[-1]:
    raise UserError(f"the held-out documents have {len(text)} tokens in all, fewer than the longest length of "
                    f"{inputs.lengths[-1]}: shorten --multiples, or prepare more config.data.heldout_documents")
  return text


def _cell(inputs: Inputs, task: str, name: str, haystack: np.ndarray, length: int, depth: float) -> Cell:

  def run(progress: Progress) -> list[Measurement]:
    tokens, positions = rows(inputs, task, haystack, length, depth)
    losses, hits = [], []
    for loss, predicted in inputs.scorer.at_positions(tokens, positions):
      targets = np.take_along_axis(tokens, positions, axis=1)[len(hits):len(hits) + len(loss)]
      losses.extend(loss)
      hits.extend(predicted == targets)
      progress(len(loss) * length)
    return condition_measurements("retrieval", length, np.stack(losses), np.stack(hits))

  settings = {"task": task, "haystack": name, "depth": depth, "trials": inputs.trials, "seed": inputs.seed,
              "text": fingerprint(haystack)}
  return Cell(f"{task} in {name} at {length}, depth {100 * depth:g} %", tuple((m, length) for m in MEASURES), settings,
              inputs.trials * length, run)

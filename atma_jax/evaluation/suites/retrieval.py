"""Suite ``retrieval``: a value is stated at some depth of a haystack and asked for at its end.

The tasks are passkey (" The access code for record {key} is" and five digits) and NIAH (" The special magic {word} number
is"), each in synthetic filler and in real text. A row has exactly as many tokens as the length says, the question included,
and is scored on the five digits under teacher forcing. A trial has the same cue, value and haystack at every length and
depth: a shorter haystack is a prefix of a longer one.

Measures, one cell per task, haystack, length and depth: ``retrieval_accuracy`` (share of digits predicted correctly) and
``retrieval_exact`` (share of trials with all five digits correct), both with Wilson intervals, and ``retrieval_loss`` (nats
per digit).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import html

from jaxtyping import Int
import numpy as np

from atma_jax.config import POSITIVE, Rule, option
from atma_jax.data.needles import CUE, MAGIC_CUE, draw_needle, draw_word, needle_in_haystack
from atma_jax.errors import UserError
from atma_jax.evaluation.digits import digit_measurements, joined_documents, score_digits
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import markup
from atma_jax.evaluation.report.runs import Run
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

TASKS = ("passkey", "niah")
HAYSTACKS = ("filler", "text")
MEASURES = ("retrieval_accuracy", "retrieval_exact", "retrieval_loss")
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TEXT_SEED = 0x7265
_HEADINGS = {"retrieval_accuracy": "token accuracy", "retrieval_exact": "all five right"}


@dataclasses.dataclass(frozen=True)
class RetrievalOptions(CheckedOptions):
  """Options of the suite."""

  retrieval_trials: int = option(50, "Trials per cell of the retrieval grid.", POSITIVE)
  depths: tuple[float, ...] = option((10.0, 50.0, 90.0), "Depths of the retrieval grid, in percent.", Rule(
    "percentages from 0 to 100", lambda value: bool(value) and all(0 <= depth <= 100 for depth in value)))


def retrieval_cells(inputs: Inputs, options: RetrievalOptions) -> list[Cell]:
  """One cell per task, haystack, length and depth."""
  haystacks = {"filler": _filler(inputs, inputs.lengths[-1]), "text": _text(inputs)}
  return [_cell(inputs, options.retrieval_trials, task, haystack, haystacks[haystack], length, depth / 100)
          for length in inputs.lengths for task in TASKS for haystack in HAYSTACKS for depth in options.depths]


def cue_and_value(task: str, trial: int, seed: int) -> tuple[str, str]:
  """The cue and the five digits of a trial, the same at every length and depth."""
  key, value = draw_needle(trial, seed)
  return (CUE.format(key=key) if task == "passkey" else MAGIC_CUE.format(word=draw_word(trial, seed))), value


def haystack_rows(inputs: Inputs, trials: int, task: str, haystack: Int[np.ndarray, " n"], length: int,
                  depth: float) -> tuple[Int[np.ndarray, "N length"], Int[np.ndarray, "N 5"]]:
  """The rows of all trials of a cell, and the positions of their digits; `depth` is from 0 to 1."""
  made = []
  for trial in range(trials):
    start = np.random.default_rng([_TEXT_SEED, inputs.seed, trial]).integers(len(haystack))
    hay = haystack[np.arange(start, start + length) % len(haystack)]
    cue, value = cue_and_value(task, trial, inputs.seed)
    made.append(needle_in_haystack(inputs.tokenizer, hay, length=length, depth=depth, cue=cue, value=value))
  return np.stack([tokens for tokens, _ in made]), np.stack([positions for _, positions in made])


def _filler(inputs: Inputs, length: int) -> Int[np.ndarray, " n"]:
  """Whole filler sentences of at least `length` tokens."""
  once = len(inputs.tokenizer.encode(FILLER))
  return inputs.tokenizer.encode(FILLER * (2 * length // once + 2))


def _text(inputs: Inputs) -> Int[np.ndarray, " n"]:
  text = joined_documents(inputs)
  if len(text) < inputs.lengths[-1]:
    raise UserError(f"the held-out documents have {len(text)} tokens in all, fewer than the longest length of "
                    f"{inputs.lengths[-1]}: shorten --multiples, or prepare more config.data.heldout_documents")
  return text


def _cell(inputs: Inputs, trials: int, task: str, name: str, haystack: Int[np.ndarray, " n"], length: int, depth: float) -> Cell:

  def run(progress: Progress) -> list[Measurement]:
    losses, hits = score_digits(inputs, *haystack_rows(inputs, trials, task, haystack, length, depth), progress)
    return digit_measurements("retrieval", length, losses, hits)

  settings = {"task": task, "haystack": name, "depth": depth, "trials": trials, "seed": inputs.seed,
              "text": fingerprint(haystack)}
  return Cell(f"{task} in {name} at {length}, depth {100 * depth:g} %", tuple((m, length) for m in MEASURES), settings,
              trials * length, run)


def grid_section(runs: Sequence[Run]) -> str:
  """For each measure, a heat map of length by depth per task, haystack and run."""
  panes = {}
  for measure, heading in _HEADINGS.items():
    grids = []
    settings = [r["settings"] for run in runs for r in run.select(measure)]
    for task, haystack in sorted({(s["task"], s["haystack"]) for s in settings}):
      cards = []
      for run in runs:
        found = run.select(measure, task=task, haystack=haystack)
        rows: dict[str, dict[int, Record]] = {}
        for record in sorted(found, key=lambda r: r["settings"]["depth"]):
          rows.setdefault(f"{100 * record['settings']['depth']:g} %", {})[record["length"]] = record
        if rows:
          cards.append(markup.heatmap(run.label, rows, sorted({r["length"] for r in found})))
      grids.append(f"<h3>{html.escape(task)} in {html.escape(haystack)}</h3><div class='cards'>{''.join(cards)}</div>")
    if grids:
      panes[heading] = "".join(grids)
  return f"<p>Depth of the statement down, length across; in %.</p>{markup.tabs(panes)}" if panes else ""


SUITE = Suite(
  help="passkey and needle in a haystack, over a grid of lengths and depths",
  cells=retrieval_cells,
  options=RetrievalOptions,
  columns=("retrieval_accuracy", "retrieval_exact"),
  settings={"task": str, "haystack": str, "depth": lambda depth: f"depth {100 * depth:g} %"},
  sections={"Retrieval: length by depth": grid_section},
  order=40,
  schema={"settings": {"task": str, "haystack": str, "depth": float}},
)

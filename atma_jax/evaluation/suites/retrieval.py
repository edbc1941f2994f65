"""Suite ``retrieval``: a value is stated at some depth of a haystack and asked for at its end.

The tasks are passkey (" The access code for record {key} is" and five digits) and NIAH (" The special magic {word} number
is"), each in synthetic filler and in real text, and each in two wordings: these are in the training material of ``recall:``
sources ("seen"), others are in none ("unseen"). A row has exactly as many tokens as the length says, the question included, and
is scored on the five digits (see `atma_jax.evaluation.digits`). A trial has the same cue, value and haystack at every length and
depth: a shorter haystack is a prefix of a longer one.

Measures, one cell per task, haystack, wording, length and depth: ``retrieval_exact`` (share of trials with all five digits right)
and ``retrieval_accuracy`` (share of digits right), both with Wilson intervals, and ``retrieval_loss`` (nats per digit); in the
unseen wording ``retrieval_unseen_exact`` and so on.

It shows whether depth matters. It cannot show that the key was looked up: there is one record, so a model that copies the only
digits of this form is right. The suite ``lookup`` has records to choose from. Depths share their trials, so that their intervals
are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import html

from jaxtyping import Int
import numpy as np

from atma_jax.config import POSITIVE, Rule, option
from atma_jax.data.lookup_tasks import WORDINGS
from atma_jax.data.needles import draw_needle, draw_word, needle_in_haystack
from atma_jax.evaluation.digits import HAYSTACKS, cut_haystack, digit_measurements, make_haystack, padded_width, score_trials
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import markup
from atma_jax.evaluation.report.console_tables import shares_text
from atma_jax.evaluation.report.runs import Run
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

TASKS = ("passkey", "niah")
_TEXT_SEED = 0x7265
_HEADINGS = {"retrieval_exact": "all five right", "retrieval_unseen_exact": "all five right, unseen wording",
             "retrieval_accuracy": "digits right", "retrieval_unseen_accuracy": "digits right, unseen wording"}


@dataclasses.dataclass(frozen=True)
class RetrievalOptions(CheckedOptions):
  """Options of the suite."""

  retrieval_trials: int | None = option(None, "Trials of a cell of the retrieval grid; default is --trials.", POSITIVE)
  depths: tuple[float, ...] = option((10.0, 50.0, 90.0), "Depths of the retrieval grid, in percent.", Rule(
    "percentages from 0 to 100", lambda value: bool(value) and all(0 <= depth <= 100 for depth in value)))


def retrieval_cells(inputs: Inputs, options: RetrievalOptions) -> list[Cell]:
  """One cell per task, haystack, wording, length and depth."""
  haystacks = {name: make_haystack(inputs, name) for name in HAYSTACKS}
  trials = options.retrieval_trials or inputs.trials
  return [_cell(inputs, trials, task, haystack, haystacks[haystack], wording, length, depth / 100)
          for length in inputs.lengths for task in TASKS for haystack in HAYSTACKS for wording in WORDINGS
          for depth in options.depths]


def cue_and_value(task: str, trial: int, seed: int, wording: str = "seen") -> tuple[str, str]:
  """The cue and the five digits of a trial, the same at every length and depth."""
  key, value = draw_needle(trial, seed)
  words = WORDINGS[wording]
  return (words.record.format(key=key) if task == "passkey" else words.word.format(word=draw_word(trial, seed))), value


def haystack_row(inputs: Inputs, trial: int, task: str, haystack: Int[np.ndarray, " n"], wording: str, length: int,
                 depth: float) -> tuple[Int[np.ndarray, " length"], Int[np.ndarray, " 5"]]:
  """The row of a trial, and the positions of its digits; `depth` is from 0 to 1."""
  hay = cut_haystack(haystack, length, np.random.default_rng([_TEXT_SEED, inputs.seed, trial]))
  cue, value = cue_and_value(task, trial, inputs.seed, wording)
  return needle_in_haystack(inputs.tokenizer, hay, length=length, depth=depth, cue=cue, value=value)


def _cell(inputs: Inputs, trials: int, task: str, name: str, haystack: Int[np.ndarray, " n"], wording: str, length: int,
          depth: float) -> Cell:
  prefix = "retrieval" if wording == "seen" else f"retrieval_{wording}"

  def run(progress: Progress) -> list[Measurement]:
    losses, hits = score_trials(inputs, lambda trial: haystack_row(inputs, trial, task, haystack, wording, length, depth), trials,
                                length, progress)
    return digit_measurements(prefix, length, losses, hits)

  settings = {"task": task, "haystack": name, "depth": depth, "trials": trials, "seed": inputs.seed,
              "text": fingerprint(haystack), "wording": wording}
  return Cell(f"{task} in {name} at {length}, {wording} wording, depth {100 * depth:g} %",
              tuple((f"{prefix}_{what}", length) for what in ("exact", "accuracy", "loss")), settings,
              trials * padded_width(length), run)


def retrieval_table(records: Sequence[Record]) -> str:
  """The exact shares with their intervals."""
  exact = [r for r in records if r["measure"].endswith("exact")]
  exact.sort(key=lambda r: [r["settings"].get(name, "") for name in ("task", "haystack", "wording", "depth")])
  return shares_text(exact, "retrieval, all five digits right", lambda r: ", ".join(
    [f"{r['settings']['task']} in {r['settings']['haystack']}", f"{r['settings'].get('wording', 'seen')} wording",
     f"depth {100 * r['settings']['depth']:g} %"]))


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
  return ("<p>Depth of the statement down, length across; in %. The seen wording is that of <code>recall:</code> sources; the "
          f"unseen one is in no training material.</p>{markup.tabs(panes)}") if panes else ""


SUITE = Suite(
  help="passkey and needle in a haystack, over a grid of lengths and depths, in two wordings",
  cells=retrieval_cells,
  options=RetrievalOptions,
  columns=("retrieval_exact", "retrieval_unseen_exact", "retrieval_accuracy"),
  settings={"task": str, "haystack": str, "depth": lambda depth: f"depth {100 * depth:g} %"},
  table=retrieval_table,
  sections={"Retrieval: length by depth": grid_section},
  order=40,
  schema={"settings": {"task": str, "haystack": str, "depth": float}},
)

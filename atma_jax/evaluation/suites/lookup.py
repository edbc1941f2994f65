"""Suite ``lookup``: retrieval among alternatives, so that the answer cannot be had without the key.

Statements are strewn at random over a haystack of synthetic filler or real text, and one question is asked at its end:

* ``multikey-N``: N records, one of which is asked for (8, 64 and 512 by default);
* ``multivalue-N``: one key with N values among N records of other keys; all N values are asked for, in the order of the text;
* ``tracking-N``: 8 registers, each with a value that is copied N times from register to register; the value of the last one.

Each task has a "seen" wording, which is in the training material, and an "unseen" one, which is in none. Records in the seen
wording are in that of ``recall:`` sources, where up to three are asked for at a time; many records at once, several values and
copied registers are only in that of ``recall-tasks:`` sources. A model that was not trained on these has seen no wording of
``multivalue`` and ``tracking``.

A trial has its own keys, values, order and depths, and starts at its own place of the haystack; keys, values, order and depths
are the same at every length, in both haystacks and in both wordings. A row has exactly as many tokens as the length says, the
question included; tasks that do not fit into a length are not asked there. Answers are scored by
`atma_jax.evaluation.digits`. Trials share no rows: asking many questions of one context would be cheaper, but their answers
would depend on each other and on the questions before them.

Measures, one cell per task, haystack, wording and length: ``TASK_exact`` (share of trials with all digits right, with its Wilson
interval; ``bins`` has it by the depth of the statement that the answer depends on first), ``TASK_accuracy`` (share of digits
right) and ``TASK_loss`` (nats per digit); in the unseen wording ``TASK_unseen_exact`` and so on. ``chance`` is what a model
reaches that gives values in sight in the order of the text without looking at keys. The share of digits says little here and has
no such level: given the first digit of an answer, the others can be copied from whichever value begins like it. A small model had
73 % of the digits of ``multikey-8`` right, and 8 % of the answers, where chance is 12.5 %.

It shows whether a key selects its record among many like it. It cannot tell a lookup by key from one by a part of the key: keys
have seven random digits, of which two or three tell a few records apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import html
from typing import Any

from absl import logging
from jaxtyping import Bool, Float, Int
import numpy as np

from atma_jax.config import Rule, option
from atma_jax.data.lookup_tasks import WORDINGS, Task, TrialTokens, encode_trial, evaluation_trial, lookup_row, parse_task
from atma_jax.errors import UserError
from atma_jax.evaluation.digits import HAYSTACKS, cut_haystack, digit_measurements, make_haystack, padded_width, score_trials
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import figures, markup
from atma_jax.evaluation.report.console_tables import shares_text
from atma_jax.evaluation.report.runs import Run
from atma_jax.evaluation.statistics import wilson_interval
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

TASKS = ("multikey-8", "multikey-64", "multikey-512", "multivalue-4", "tracking-2", "tracking-4")
_PLACE_SEED, _TEXT_SEED = 0x6C70, 0x6C74
_DEPTH_BINS = 5


def _are_tasks(names: tuple[str, ...]) -> bool:
  try:
    return bool(names) and all(parse_task(name) for name in names)
  except ValueError:
    return False


def _are_some_of(legal: Sequence[str]) -> Rule:
  return Rule("some of " + ", ".join(legal), lambda names: bool(names) and set(names) <= set(legal))


@dataclasses.dataclass(frozen=True)
class LookupOptions(CheckedOptions):
  """Options of the suite."""

  lookup_tasks: tuple[str, ...] = option(TASKS, "Tasks of the suite lookup.", Rule(
    "multikey-N (N from 2 to 4096), multivalue-N (N from 2 to 6) or tracking-N (N from 1 to 15)", _are_tasks))
  lookup_haystacks: tuple[str, ...] = option(HAYSTACKS, "What surrounds the statements.", _are_some_of(HAYSTACKS))
  lookup_wordings: tuple[str, ...] = option(tuple(WORDINGS), "Wordings of the statements.", _are_some_of(tuple(WORDINGS)))


def lookup_cells(inputs: Inputs, options: LookupOptions) -> list[Cell]:
  """One cell per task, haystack, wording and length that the task fits into."""
  haystacks = {name: make_haystack(inputs, name) for name in options.lookup_haystacks}
  cells: list[Cell] = []
  for task in map(parse_task, options.lookup_tasks):
    encoded = {wording: _encoder(inputs, task, wording) for wording in options.lookup_wordings}
    needed = max(encode(trial).tokens for encode in encoded.values() for trial in range(inputs.trials))
    lengths = [length for length in inputs.lengths if length >= needed]
    if len(lengths) < len(inputs.lengths):
      logging.info("lookup: %s takes up to %d tokens and is not asked at shorter lengths", task.name, needed)
    cells += [_cell(inputs, task, wording, encode, name, haystack, length) for length in lengths
              for name, haystack in haystacks.items() for wording, encode in encoded.items()]
  if not cells:
    raise UserError(f"--lookup_tasks={','.join(options.lookup_tasks)}: none fits into {inputs.lengths[-1]} tokens: choose larger "
                    "--multiples or smaller tasks")
  return cells


def _encoder(inputs: Inputs, task: Task, wording: str) -> Callable[[int], TrialTokens]:
  """Gives a trial as tokens by its number, each encoded once for all lengths and haystacks."""
  return functools.cache(lambda trial: encode_trial(inputs.tokenizer, evaluation_trial(task, wording, trial, inputs.seed)))


def statement_depths(task: Task, statements: int, trial: int, seed: int) -> Float[np.ndarray, " statements"]:
  """Where the statements of a trial are in its haystack, from 0 to 1, ascending."""
  rng = np.random.default_rng([_PLACE_SEED, seed, trial, *task.name.encode()])
  return np.sort(rng.random(statements))


def task_row(inputs: Inputs, task: Task, encoded: TrialTokens, haystack: Int[np.ndarray, " n"], trial: int,
             length: int) -> tuple[Int[np.ndarray, " length"], Int[np.ndarray, " digits"]]:
  """The row of a trial, and the positions of its answer's digits."""
  hay = cut_haystack(haystack, length, np.random.default_rng([_TEXT_SEED, inputs.seed, trial]))
  depths = statement_depths(task, len(encoded.bounds), trial, inputs.seed)
  return lookup_row(inputs.tokenizer, hay, encoded, length=length, depths=depths)


def _cell(inputs: Inputs, task: Task, wording: str, encode: Callable[[int], TrialTokens], name: str,
          haystack: Int[np.ndarray, " n"], length: int) -> Cell:
  prefix = task.name if wording == "seen" else f"{task.name}_{wording}"

  def run(progress: Progress) -> list[Measurement]:
    losses, hits = score_trials(inputs, lambda trial: task_row(inputs, task, encode(trial), haystack, trial, length),
                                inputs.trials, length, progress)
    exact, *others = digit_measurements(prefix, length, losses, hits, task.chance, digit_chance=None)
    about = [statement_depths(task, len(encode(trial).bounds), trial, inputs.seed)[encode(trial).about]
             for trial in range(inputs.trials)]
    return [dataclasses.replace(exact, bins=_by_depth(hits, np.array(about))), *others]

  settings = {"task": task.name, "haystack": name, "wording": wording, "trials": inputs.trials, "seed": inputs.seed,
              "text": fingerprint(haystack)}
  return Cell(f"{task.name} in {name} at {length}, {wording} wording",
              tuple((f"{prefix}_{what}", length) for what in ("exact", "accuracy", "loss")), settings,
              inputs.trials * padded_width(length), run)


def _by_depth(hits: Bool[np.ndarray, "N P"], depths: Float[np.ndarray, " N"]) -> list[dict[str, Any]]:
  """Exact shares by depth, in equal parts of the haystack."""
  right = np.asarray(hits.all(axis=1))
  parts = np.minimum((depths * _DEPTH_BINS).astype(int), _DEPTH_BINS - 1)
  bins = []
  for part in range(_DEPTH_BINS):
    inside = right[parts == part]
    found, n = int(inside.sum()), len(inside)
    bins.append({"start": part / _DEPTH_BINS, "stop": (part + 1) / _DEPTH_BINS, "value": found / n if n else None, "n": n,
                 "interval": wilson_interval(found, n) if n else None})
  return bins


# --- Table and report -------------------------------------------------------------------------------------------------


def lookup_table(records: Sequence[Record]) -> str:
  """The exact shares with their intervals and what guessing gives."""
  return shares_text([r for r in records if r["measure"].endswith("exact")], "lookup, all digits right", lambda r: (
    f"{_name(r)} (chance {100 * r['chance']:.3g})" if r.get("chance") is not None else _name(r)))


def _name(record: Record) -> str:
  settings = record["settings"]
  return f"{settings['task']} in {settings['haystack']}, {settings['wording']} wording"


def _exact(run: Run, task: str, haystack: str, wording: str) -> list[Record]:
  return run.select(f"{task}_exact" if wording == "seen" else f"{task}_{wording}_exact", haystack=haystack)


def lookup_section(runs: Sequence[Run]) -> str:
  """Exact shares against length, one panel per task and haystack, and heat maps of depth by length."""
  groups = dict.fromkeys((r["settings"]["task"], r["settings"]["haystack"]) for run in runs for r in run.records
                         if r["suite"] == "lookup")
  panels, panes = {}, {}
  for task, haystack in groups:
    series = {f"{run.label}, {wording} wording": found for run in runs for wording in WORDINGS
              if (found := _exact(run, task, haystack, wording))}
    panels[f"{task} in {haystack}"] = series
    cards = "".join(_depth_map(label, found) for label, found in series.items())
    panes[task] = panes.get(task, "") + f"<h3>{html.escape(task)} in {html.escape(haystack)}</h3><div class='cards'>{cards}</div>"
  if not panels:
    return ""
  return (markup.image(figures.accuracy_panels(panels, chance=True), "exact answers against length")
          + "<p>All digits right, in % of the trials. The dashed line is a model that gives values in sight without looking at "
          "keys. The seen wording is that of the training material (<code>recall:</code> has multikey's records, "
          "<code>recall-tasks:</code> all tasks); the unseen one is in none. Below: depth of the statement that the answer "
          f"depends on first, down; length across; in %.</p>{markup.tabs(panes)}")


def _depth_map(label: str, records: Sequence[Record]) -> str:
  rows: dict[str, dict[int, Record]] = {}
  for record in records:
    for part in record.get("bins") or ():
      if part["n"]:
        rows.setdefault(f"{100 * part['start']:.0f} to {100 * part['stop']:.0f} %", {})[record["length"]] = part
  return markup.heatmap(label, dict(sorted(rows.items(), key=lambda row: float(row[0].split()[0]))),
                        sorted({r["length"] for r in records}))


SUITE = Suite(
  help="many records, several values or copied registers in a haystack, in two wordings",
  cells=lookup_cells,
  options=LookupOptions,
  settings={"task": str, "haystack": str, "wording": lambda wording: f"{wording} wording"},
  table=lookup_table,
  sections={"Lookup among alternatives": lookup_section},
  order=42,
  schema={"settings": {"task": str, "haystack": str, "wording": str},
          "bins?": ([{"start": float, "stop": float, "value": float | None, "n": int}], None)},
)

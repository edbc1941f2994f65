"""Suite ``mqar``: how many pairs a model keeps apart (multi-query associative recall, Arora et al., arXiv 2312.04927).

A row is end-of-text, N pairs of random words in one block, a haystack of synthetic filler or real text, and at its end up to
eight of the keys, each followed by its value. Keys and values are single tokens of the vocabulary, all different within a row;
which value goes with which key is drawn anew in every row. A row has exactly as many tokens as the length says; numbers of
pairs that do not fit into a length, or need more words than the vocabulary has, are left out.

Pairs are written in two wordings: "key -> value;" is in the training material of ``recall-tasks:`` sources ("seen"), and of no
other source; "key meets value," is in none ("unseen").

Measures, one cell per number of pairs, haystack, wording and length: ``mqar-N_exact`` (share of questions with the right value)
and ``mqar-N_loss`` (nats per value); in the unseen wording ``mqar-N_unseen_exact`` and so on. ``--trials`` is the number of
questions. Those of one row share their pairs, and the Wilson interval is widened by as much as the answers of a row depend on
each other (`atma_jax.evaluation.statistics.clustered_wilson_interval`). ``chance`` is what a model reaches that names a value at
random.

The curve of exact answers over N shows a capacity: where it falls, pairs are lost or confused. It cannot show that this is the
memory's capacity alone, because attention sees the pairs too, nor how full sentences would be kept: keys are single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re

from absl import logging
from jaxtyping import Int
import numpy as np

from atma_jax.config import Rule, option
from atma_jax.data.lookup_tasks import WORDINGS
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.digits import HAYSTACKS, cut_haystack, make_haystack, padded_width, score_trials
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import figures, markup
from atma_jax.evaluation.report.console_tables import shares_text
from atma_jax.evaluation.report.drawing import short_tokens
from atma_jax.evaluation.report.runs import Run
from atma_jax.evaluation.statistics import clustered_wilson_interval, mean_and_error
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

_QUESTIONS = 8  # of a row
_SEED = 0x6D71


@dataclasses.dataclass(frozen=True)
class MqarOptions(CheckedOptions):
  """Options of the suite."""

  mqar_pairs: tuple[int, ...] = option((4, 16, 64, 256, 1024), "Numbers of pairs of the suite mqar.", Rule(
    "whole numbers, each at least 2", lambda value: bool(value) and min(value) >= 2))


def mqar_cells(inputs: Inputs, options: MqarOptions) -> list[Cell]:
  """One cell per length, number of pairs, haystack and wording."""
  words = single_words(inputs.tokenizer)
  fewest = min(options.mqar_pairs)
  if len(words) < 2 * fewest:
    raise UserError(f"--suite=mqar: {fewest} pairs need {2 * fewest} words that are single tokens; the {inputs.tokenizer.kind} "
                    f"tokenizer has {len(words)}")
  cells = []
  for name in HAYSTACKS:
    haystack = make_haystack(inputs, name)
    for length in inputs.lengths:
      for pairs in options.mqar_pairs:
        if 2 * pairs > len(words) or max(_tokens(inputs.tokenizer, pairs, wording) for wording in WORDINGS) > length:
          logging.info("mqar: %d pairs do not fit into %d tokens and %d words: left out", pairs, length, len(words))
          continue
        cells += [_cell(inputs, words, haystack, name, wording, pairs, length) for wording in WORDINGS]
  if not cells:
    raise UserError(f"--mqar_pairs={','.join(map(str, options.mqar_pairs))}: none fits into {inputs.lengths[-1]} tokens: choose "
                    "larger --multiples or fewer pairs")
  return cells


def single_words(tokenizer: Tokenizer) -> Int[np.ndarray, " W"]:
  """The tokens that are a space and at least two letters in running text, ascending."""
  texts = ((token, tokenizer.decode([token]).strip()) for token in range(tokenizer.vocab_size))
  return np.array([token for token, text in texts if re.fullmatch("[A-Za-z]{2,}", text)
                   and tokenizer.encode(f" {text}").tolist() == [token]], np.int32)


def _separators(tokenizer: Tokenizer, wording: str) -> list[Int[np.ndarray, " n"]]:
  return [tokenizer.encode(text) for text in WORDINGS[wording].pair]


def _tokens(tokenizer: Tokenizer, pairs: int, wording: str) -> int:
  """The least tokens of a row."""
  return 1 + (pairs + min(pairs, _QUESTIONS)) * (2 + sum(map(len, _separators(tokenizer, wording))))


def mqar_row(inputs: Inputs, words: Int[np.ndarray, " W"], haystack: Int[np.ndarray, " n"], wording: str, pairs: int, row: int,
             length: int) -> tuple[Int[np.ndarray, " length"], Int[np.ndarray, " questions"]]:
  """The tokens of a row, and the positions of the values that are asked for."""
  rng = np.random.default_rng([_SEED, inputs.seed, pairs, row])
  keys, values = rng.permutation(words)[:2 * pairs].reshape(2, pairs)
  asked = rng.permutation(pairs)[:_QUESTIONS]
  between, after = _separators(inputs.tokenizer, wording)
  block, questions = (np.stack([np.concatenate([[keys[i]], between, [values[i]], after]) for i in which])
                      for which in (range(pairs), asked))
  hay = cut_haystack(haystack, length - 1 - block.size - questions.size, rng)
  tokens = np.concatenate([[inputs.tokenizer.eot_id], block.ravel(), hay, questions.ravel()]).astype(np.int32)
  return tokens, length - questions.size + np.arange(len(asked)) * questions.shape[1] + 1 + len(between)


def _cell(inputs: Inputs, words: Int[np.ndarray, " W"], haystack: Int[np.ndarray, " n"], name: str, wording: str, pairs: int,
          length: int) -> Cell:
  questions = min(pairs, _QUESTIONS)
  rows = -(-inputs.trials // questions)
  prefix = f"mqar-{pairs}" if wording == "seen" else f"mqar-{pairs}_{wording}"

  def run(progress: Progress) -> list[Measurement]:
    losses, hits = score_trials(inputs, lambda row: mqar_row(inputs, words, haystack, wording, pairs, row, length), rows, length,
                                progress)
    loss, error = mean_and_error(losses.mean(axis=1, dtype=np.float64))
    return [Measurement(f"{prefix}_exact", length, float(hits.mean()), hits.size, chance=1 / pairs,
                        interval=clustered_wilson_interval(hits.sum(axis=1), questions)),
            Measurement(f"{prefix}_loss", length, loss, rows, error)]

  settings = {"pairs": pairs, "haystack": name, "wording": wording, "trials": rows * questions, "rows": rows, "seed": inputs.seed,
              "text": fingerprint(haystack)}
  return Cell(f"mqar, {pairs} pairs in {name} at {length}, {wording} wording",
              tuple((f"{prefix}_{what}", length) for what in ("exact", "loss")), settings, rows * padded_width(length), run)


# --- Table and report -------------------------------------------------------------------------------------------------


def mqar_table(records: Sequence[Record]) -> str:
  """The shares with their intervals and what guessing gives."""
  exact = [r for r in records if r["measure"].endswith("exact")]
  exact.sort(key=lambda r: [r["settings"][name] for name in ("haystack", "wording", "pairs")])
  return shares_text(exact, "mqar, right values", lambda r: (
    f"{r['settings']['pairs']} pairs in {r['settings']['haystack']}, {r['settings']['wording']} wording "
    f"(chance {100 / r['settings']['pairs']:.3g})"))


def mqar_section(runs: Sequence[Run]) -> str:
  """Right values against the number of pairs, one panel per haystack and length."""
  panels: dict[str, dict[str, list[Record]]] = {}
  for run in runs:
    for r in run.records:
      if r["suite"] == "mqar" and r["measure"].endswith("exact"):
        panel = panels.setdefault(f"{short_tokens(r['length'])} tokens of {r['settings']['haystack']}", {})
        line = panel.setdefault(f"{run.label}, {r['settings']['wording']} wording", [])
        line.append(r | {"length": r["settings"]["pairs"]})
  if not panels:
    return ""
  return (markup.image(figures.accuracy_panels(panels, chance=False, across="pairs"), "right values against the number of pairs")
          + "<p>Values named right, in %, by the number of pairs N; naming one at random gives 100 / N. The seen wording is that "
          "of <code>recall-tasks:</code> sources; the unseen one is in no training material.</p>")


SUITE = Suite(
  help="associative recall of pairs of words, by their number, in two wordings",
  cells=mqar_cells,
  options=MqarOptions,
  settings={"pairs": lambda pairs: f"{pairs} pairs", "haystack": str, "wording": lambda wording: f"{wording} wording"},
  table=mqar_table,
  sections={"Associative recall": mqar_section},
  order=44,
  schema={"settings": {"pairs": int, "haystack": str, "wording": str}},
)

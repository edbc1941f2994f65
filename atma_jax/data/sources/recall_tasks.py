"""The ``recall-tasks:SOURCE`` source: practice of the tasks that ``recall:SOURCE`` does not have.

``recall:`` asks for single records. This source states many records at once and asks for some of them, states several values
of one record, passes values from register to register, and lists pairs of words, in the "seen" wording of
`atma_jax.data.lookup_tasks`. The suites ``lookup`` and ``mqar`` measure these skills. It shares no key, register or value with
them; its pairs are made of words of the text.
"""

from __future__ import annotations

import re

import numpy as np

from atma_jax.data.lookup_tasks import BETWEEN_VALUES, CHAINS, MOST_VALUES, WORDINGS, Question, Task, Trial
from atma_jax.data.needles import spaced
from atma_jax.data.sources.recall import RecallSource, draw_number, log_uniform, next_space

_KINDS = ("multikey", "multivalue", "tracking", "pairs")
_WORDING = WORDINGS["seen"]
_RECORD_CHARACTERS, _LINK_CHARACTERS = 45, 30  # of a record with its value, and of a copied register, about
_SHARE = 3  # the records of a trial take at most one third of the training length
_MOST_HOPS = 4
_MOST_QUESTIONS = 4  # about one trial; eight times as many about pairs, which are short
_SHORTEST_GAPS = 8  # characters of text in one trial


class RecallTasksSource(RecallSource):
  """Documents of tasks over the text of another source, at most `DataConfig.recall_max_mib` of it."""

  prefix = "recall-tasks"
  syntax = "recall-tasks:SOURCE"
  help = "practice of many records, several values, copied registers and pairs over the documents of SOURCE"

  def compose(self, text: str, digest: bytes, characters: int) -> str:
    return task_document(text, longest_gaps=characters, rng=np.random.default_rng([1, *digest]))


def task_document(filler: str, *, longest_gaps: int, rng: np.random.Generator) -> str:
  """Writes one document: trials of all kinds dropped into real text, one after the other.

  * The kinds are equally frequent. The numbers of records and of pairs are drawn log-uniformly up to what a third of the training
    length holds, and registers are copied up to four times where the training length allows it.
  * The text between the first statement of a trial and its last question is drawn log-uniformly up to `longest_gaps`, and is cut
    at random places.

  Args:
    filler: real text; it is used up in order, cut at white space.
    longest_gaps: in characters; what the training length holds.
    rng: decides everything else.
  """
  words = sorted(set(re.findall(r"[A-Za-z]{3,}", filler)))
  parts, used = [], 0
  while used < len(filler):
    trial = _draw_trial(rng, words, longest_gaps)
    asked = [q.cue + BETWEEN_VALUES.join(map(spaced, q.values)) if q.values[0].isdigit() else q.cue + q.values[0]
             for q in trial.questions]
    pieces = [*trial.statements, *asked]
    gaps = int(log_uniform(rng, _SHORTEST_GAPS, longest_gaps))
    for piece, place in zip(pieces, used + np.sort(rng.integers(gaps, size=len(pieces))), strict=True):
      end = max(used, next_space(filler, int(place)))
      parts += [filler[used:end], piece]
      used = end
    used = _state_text(parts, filler, used, int(log_uniform(rng, _SHORTEST_GAPS, longest_gaps)))
  return "".join(parts)


def _state_text(parts: list[str], filler: str, used: int, characters: int) -> int:
  """Appends about so many characters of text, and returns how much of it is used up."""
  end = max(used, next_space(filler, used + characters))
  parts.append(filler[used:end])
  return end


def _draw_trial(rng: np.random.Generator, words: list[str], characters: int) -> Trial:
  """A trial of any kind, with several questions."""
  kind = str(rng.choice(_KINDS))
  most = max(2, characters // (_SHARE * _RECORD_CHARACTERS))
  if kind == "pairs":
    return _draw_pairs(rng, words, 2 * most)
  hops = min(max(1, characters // (CHAINS * _LINK_CHARACTERS) - 1), _MOST_HOPS)
  size = {"multikey": int(log_uniform(rng, 2, most + 1)), "multivalue": int(rng.integers(2, min(most, MOST_VALUES) + 1)),
          "tracking": int(rng.integers(1, hops + 1))}[kind]
  return Task(kind, size).draw(rng, _WORDING, draw_number, int(rng.integers(1, _MOST_QUESTIONS + 1)))


def _draw_pairs(rng: np.random.Generator, words: list[str], most: int) -> Trial:
  """Pairs of different words, listed in one place, and questions about some of them."""
  count = min(int(log_uniform(rng, 2, most + 1)), len(words) // 2)
  between, after = _WORDING.pair
  chosen = rng.permutation(len(words))[:2 * count]
  pairs = [(words[k], words[v]) for k, v in zip(chosen[:count], chosen[count:], strict=True)]
  asked = rng.permutation(count)[:int(rng.integers(1, 8 * _MOST_QUESTIONS + 1))]
  listed = "".join(f" {key}{between} {value}{after}" for key, value in pairs)
  return Trial((listed,), tuple(Question(f" {pairs[i][0]}{between}", (f" {pairs[i][1]}{after}",), 0) for i in asked))


SOURCE = RecallTasksSource

"""The ``recall:SOURCE`` source: synthetic documents that teach a small model to fetch what it has read once.

Real text of another source is strewn with short records, each of which is asked for again later. The needle evaluation of
`atma_jax.data.needles` measures the same skill; training and evaluation share no key and no value.
"""

from __future__ import annotations

from collections.abc import Sequence
import heapq
import re

import numpy as np

from atma_jax.config import DataConfig
from atma_jax.data.documents import Entry
from atma_jax.data.entries import EntryTable
from atma_jax.data.needles import CUE, KEY_RANGE, MAGIC_CUE, VALUE_DIGITS, VALUE_RANGE, is_evaluation_number, spaced
from atma_jax.data.source import TextSource
from atma_jax.data.sources import parse_source

WORDS = ("amber", "birch", "cedar", "delta", "ember", "falcon", "garnet", "harbor", "indigo", "jasper", "kestrel", "lantern",
         "maple", "nectar", "onyx", "pepper", "quartz", "raven", "saffron", "timber", "umber", "velvet", "willow", "yarrow",
         "zephyr")
# Half of the records are worded like the evaluation's needle; the others keep the skill from clinging to one sentence.
PHRASINGS = ((CUE, 0.5), (MAGIC_CUE, 0.1), (" Locker {key} opens with", 0.1),
              (" # pin of {word} {short}:", 0.1), (" The pass phrase of {word} {short} reads", 0.1),
              (" record[{key}] =", 0.1))
_WORD_VALUES = 0.5  # share of records whose value is five words of the text instead of five digits
_LIVE_RECORDS = (1, 1, 2, 3)  # how many records a document keeps alive at a time, drawn uniformly
_MOST_QUESTIONS = 4  # about one record
_SHORTEST_GAP = 4  # characters
_LONGEST_GAP_AT_LEAST = 8  # characters, in any document
_DOCUMENT_LENGTHS = 8  # training lengths of real text in one recall document


class RecallSource(TextSource):
  """Recall documents over the text of another source, at most `DataConfig.recall_max_mib` of it."""

  prefix = "recall"
  syntax = "recall:SOURCE"
  help = "recall practice over the documents of SOURCE"
  settings = ("recall_max_mib", "sequence_length")  # how much of it, and its longest gap
  needs_training_length = True

  def __post_init__(self) -> None:
    source = parse_source(self.argument)
    if not isinstance(source, TextSource) or source.base is not source or source.masked:
      raise ValueError(f"must name a source of text after {self.prefix}:")

  @property
  def base(self) -> TextSource:
    source = parse_source(self.argument)
    assert isinstance(source, TextSource)  # checked when this source was made
    return source

  def group(self, entries: EntryTable, config: DataConfig, characters: int) -> Sequence[Sequence[Entry]]:
    """Puts consecutive documents together until they hold several training lengths, and thins the groups out evenly."""
    starts: list[int] = []
    least = filled = _DOCUMENT_LENGTHS * characters
    for index, entry in enumerate(entries):
      if filled >= least:
        starts.append(index)
        filled = 0
      filled += entry.size
    groups = list(zip(starts, [*starts[1:], len(entries)]))
    return [list(entries[start:stop]) for start, stop in groups[::-(-entries.total_size // (config.recall_max_mib << 20))]]

  def compose(self, text: str, digest: bytes, characters: int) -> str:
    return recall_document(text, longest_gap=characters, rng=np.random.default_rng(list(digest)))


def recall_document(filler: str, *, longest_gap: int, rng: np.random.Generator) -> str:
  """Writes one recall document: short records dropped into real text, each asked for again one to four times.

  This is practice material, not natural text: it exists so that a small model learns within a few million tokens to fetch a
  value that it has seen once.

  * The gaps of real text between a record and its first question, and between questions, are drawn log-uniformly up to
    `longest_gap`, so most are short and some span the whole training length.
  * One to three records are alive at a time; when one has been asked for often enough, another takes its place.
  * Half of the records are worded like the evaluation's needle, but keys and values are never the evaluation's.
  * Half of the values are five digits, as in the evaluation, and half are five words of the text. A model that merely prefers
    tokens it has seen already gains on words, so it can learn to fetch them by degrees. All ten digits are always in sight and
    offer no such first step.
  * The longest gap of a document is itself drawn log-uniformly, so some documents are dense with records and others are mostly
    filler. Filler makes up about a fifth of the tokens overall.

  Args:
    filler: real text; it is used up in order, cut at white space.
    longest_gap: in characters; what the training length holds.
    rng: decides everything else.
  """
  longest_gap = int(log_uniform(rng, _LONGEST_GAP_AT_LEAST, longest_gap))
  parts, used, words = [], 0, re.findall(r"[A-Za-z]{3,}", filler)
  # A live record is (filler used when it is due, its slot, cue, value, questions left); with none left, a new one is stated.
  due = [(next_space(filler, 0) if slot == 0 else _gap(rng, longest_gap), slot, "", "", 0)
         for slot in range(rng.choice(_LIVE_RECORDS))]
  while used < len(filler):
    when, slot, cue, value, left = heapq.heappop(due)
    if when > used:
      end = next_space(filler, when)
      parts.append(filler[used:end])
      used = end
    if left:
      left -= 1
    else:
      cue, value = _draw_cue(rng), _draw_value(rng, words)
      left = int(rng.integers(1, _MOST_QUESTIONS + 1))
    parts.append(cue + value)
    heapq.heappush(due, (used + _gap(rng, longest_gap), slot, cue, value, left))
  return "".join(parts)


def _gap(rng: np.random.Generator, longest: int) -> int:
  return int(log_uniform(rng, _SHORTEST_GAP, longest))


def log_uniform(rng: np.random.Generator, low: int, high: int) -> float:
  """A number from `low` up to `high`, or up to `low` + 1 if that is more, whose logarithm is uniformly distributed."""
  return np.exp(rng.uniform(np.log(low), np.log(max(high, low + 1))))


def next_space(text: str, position: int, most: int = 40) -> int:
  """The first white space at or after `position`, or `position` itself if the next `most` characters have none."""
  return next((i for i in range(position, min(position + most, len(text))) if text[i].isspace()),
              min(position, len(text)))


def _draw_value(rng: np.random.Generator, words: list[str]) -> str:
  if words and rng.random() < _WORD_VALUES:
    return "".join(f" {words[i]}" for i in rng.integers(len(words), size=VALUE_DIGITS))
  return spaced(f"{draw_number(rng, *VALUE_RANGE):0{VALUE_DIGITS}}")


def _draw_cue(rng: np.random.Generator) -> str:
  phrases, weights = zip(*PHRASINGS)
  return rng.choice(phrases, p=weights).format(key=draw_number(rng, *KEY_RANGE), word=rng.choice(WORDS),
                                               short=rng.integers(100, 1000))


def draw_number(rng: np.random.Generator, low: int, high: int) -> int:
  """A number in [low, high) that evaluation never draws; `high` - 1 must be such a number."""
  number = int(rng.integers(low, high))
  return number + is_evaluation_number(number)


SOURCE = RecallSource

"""Retrieval tasks as text: what is stated, what is asked afterwards, and in which words.

Training material and evaluation draw from the same tasks, but share no key, no register and no value: evaluation draws only
multiples of 7, training only other numbers (see `atma_jax.data.needles`).

Every task has two wordings. "seen" is the one of the training material: of the source ``recall:`` for single records and for
several records of one form, and of the source ``recall-tasks:`` for all tasks. "unseen" is in no training material.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple

from jaxtyping import Int
import numpy as np

from atma_jax.data.needles import CUE, KEY_RANGE, MAGIC_CUE, VALUE_DIGITS, VALUE_RANGE, draw_multiple, spaced, value_tokens
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError

NAME_RANGE = (100, 1000)  # half open: registers have three digits
CHAINS = 8  # of a tracking trial
MOST_VALUES = 6  # that one question may ask for
BETWEEN_VALUES = ";"
_TASK_SEED = 0x6C6B
_SMALLEST = {"multikey": 2, "multivalue": 2, "tracking": 1}

DrawNumber = Callable[[np.random.Generator, int, int], int]  # a number in [low, high)


@dataclasses.dataclass(frozen=True)
class Wording:
  """The words of the tasks. Values follow `record`, `word`, `several` and `holds`.

  Attributes:
    record: of a record with a number as its key.
    word: of a record with a word as its key.
    several: asks for all values of a record.
    holds: of a register and its value.
    copies: gives a register the value of another.
    pair: what stands between a key and its value, and after the value.
  """

  record: str
  word: str
  several: str
  holds: str
  copies: str
  pair: tuple[str, str]

  @property
  def cues(self) -> tuple[str, ...]:
    """All templates that name a key."""
    return self.record, self.word, self.several, self.holds, self.copies


def _hidden(template: str) -> str:
  """Undoes the underscores of a template that must not stand in this file: ``python-source`` may read it as training text."""
  return template.replace("_", " ")


WORDINGS = {
  "seen": Wording(CUE, MAGIC_CUE, " All access codes for record {key} are", " Register {name} holds",
                  " Register {name} copies register {other}.", (" ->", ";")),
  "unseen": Wording(_hidden("_Parcel_{key}_waits_on_shelf"), _hidden("_Our_{word}_train_leaves_from_gate"),
                    _hidden("_Every_shelf_with_parcel_{key}_is"), _hidden("_Courier_{name}_carries"),
                    _hidden("_Courier_{name}_follows_courier_{other}."), (" meets", ",")),
}


class Question(NamedTuple):
  """A question and its answer.

  Attributes:
    cue: the words of the question; the answer follows directly.
    values: of five digits each, all to be given, in this order.
    about: index of the first statement that the answer depends on.
  """

  cue: str
  values: tuple[str, ...]
  about: int


class Trial(NamedTuple):
  """What is stated, in this order, and what is asked after all of it."""

  statements: tuple[str, ...]
  questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of trial and its size.

  * ``multikey-N``: N records are stated, one is asked for.
  * ``multivalue-N``: a record is stated N times with another value each time, among N records of other keys; all of its values
    are asked for, in the order in which they were stated.
  * ``tracking-N``: 8 registers get a value each, and each value is copied N times, always from the last register to a new one;
    the value of one last register is asked for.

  Attributes:
    kind: what comes before the dash.
    size: N.
  """

  kind: str
  size: int

  @property
  def name(self) -> str:
    """As flags spell it."""
    return f"{self.kind}-{self.size}"

  @property
  def chance(self) -> float:
    """The probability that an answer is right if it is drawn from the values in sight, in the order in which they are stated."""
    return {"multikey": 1 / self.size, "multivalue": 1 / math.comb(2 * self.size, self.size), "tracking": 1 / CHAINS}[self.kind]

  def draw(self, rng: np.random.Generator, wording: Wording, number: DrawNumber, questions: int = 1) -> Trial:
    """Draws a trial with at most `questions` different questions.

    Args:
      rng: decides everything.
      wording: in which words.
      number: draws keys, registers and values.
      questions: the most to ask.
    """
    draw = {"multikey": _records, "multivalue": _values, "tracking": _chains}[self.kind]
    return draw(rng, wording, number, self.size, questions)


def parse_task(name: str) -> Task:
  """The task of this name, such as "multikey-64".

  Raises:
    ValueError: there is no such task; the message says which there are.
  """
  kind, _, size = name.partition("-")
  most = {"multikey": 4096, "multivalue": MOST_VALUES, "tracking": (NAME_RANGE[1] - NAME_RANGE[0]) // 7 // CHAINS - 1}
  if kind not in _SMALLEST or not (size.isascii() and size.isdecimal()) or not _SMALLEST[kind] <= int(size) <= most[kind]:
    legal = ", ".join(f"{kind}-N with N from {least} to {most[kind]}" for kind, least in _SMALLEST.items())
    raise ValueError(f"{name!r} is not a task: must be {legal}")
  return Task(kind, int(size))


def evaluation_trial(task: Task, wording: str, trial: int, seed: int) -> Trial:
  """Draws a trial of the evaluation: the same for every length and haystack, and the same keys and values in both wordings."""
  rng = np.random.default_rng([_TASK_SEED, seed, trial, *task.name.encode()])
  return task.draw(rng, WORDINGS[wording], draw_multiple)


def _distinct(rng: np.random.Generator, number: DrawNumber, bounds: tuple[int, int], count: int) -> list[int]:
  """`count` different numbers within bounds."""
  found: dict[int, None] = {}
  while len(found) < count:
    found[number(rng, *bounds)] = None
  return list(found)


def _draw_values(rng: np.random.Generator, number: DrawNumber, count: int) -> list[str]:
  return [f"{value:0{VALUE_DIGITS}}" for value in _distinct(rng, number, VALUE_RANGE, count)]


def _records(rng: np.random.Generator, wording: Wording, number: DrawNumber, size: int, questions: int) -> Trial:
  keys, values = _distinct(rng, number, KEY_RANGE, size), _draw_values(rng, number, size)
  cues = [wording.record.format(key=key) for key in keys]
  asked = rng.permutation(size)[:questions]
  return Trial(tuple(cue + spaced(value) for cue, value in zip(cues, values, strict=True)),
               tuple(Question(cues[i], (values[i],), int(i)) for i in asked))


def _values(rng: np.random.Generator, wording: Wording, number: DrawNumber, size: int, questions: int) -> Trial:
  del questions  # there is one
  key, *others = _distinct(rng, number, KEY_RANGE, size + 1)
  values = _draw_values(rng, number, 2 * size)
  order = rng.permutation(2 * size)
  mine = np.sort(np.flatnonzero(order < size))
  keys = np.where(order < size, key, np.array(others)[order % size])
  statements = tuple(wording.record.format(key=k) + spaced(value) for k, value in zip(keys, values, strict=True))
  return Trial(statements, (Question(wording.several.format(key=key), tuple(values[i] for i in mine), int(mine[0])),))


def _chains(rng: np.random.Generator, wording: Wording, number: DrawNumber, size: int, questions: int) -> Trial:
  names = np.array(_distinct(rng, number, NAME_RANGE, CHAINS * (size + 1))).reshape(CHAINS, size + 1)
  values = _draw_values(rng, number, CHAINS)
  order = rng.permutation(np.repeat(np.arange(CHAINS), size + 1))  # whose turn it is to state its next link
  done, first, statements = [0] * CHAINS, [0] * CHAINS, []
  for place, chain in enumerate(order):
    link = done[chain]
    done[chain] += 1
    if link == 0:
      first[chain] = place
      statements.append(wording.holds.format(name=names[chain, 0]) + spaced(values[chain]))
    else:
      statements.append(wording.copies.format(name=names[chain, link], other=names[chain, link - 1]))
  asked = rng.permutation(CHAINS)[:questions]
  return Trial(tuple(statements), tuple(Question(wording.holds.format(name=names[c, -1]), (values[c],), first[c]) for c in asked))


# --- As tokens ----------------------------------------------------------------------------------------------------------


class TrialTokens(NamedTuple):
  """A trial with one question as tokens.

  Attributes:
    stated: all statements one after the other, (n,).
    bounds: where each statement ends in `stated`.
    asked: the question and its answer, (m,).
    offsets: of the answer's digits in `asked`, (5 x values,).
    about: see `Question`.
  """

  stated: Int[np.ndarray, " n"]
  bounds: Int[np.ndarray, " statements"]
  asked: Int[np.ndarray, " m"]
  offsets: Int[np.ndarray, " digits"]
  about: int

  @property
  def tokens(self) -> int:
    """The least length of a row with this trial, its end-of-text included."""
    return 1 + len(self.stated) + len(self.asked)


def encode_trial(tokenizer: Tokenizer, trial: Trial) -> TrialTokens:
  """The tokens of a trial and its first question.

  Raises:
    UserError: the tokenizer joins digits.
  """
  statements = [tokenizer.encode(statement) for statement in trial.statements]
  question = trial.questions[0]
  parts, offsets = [tokenizer.encode(question.cue)], []
  for index, value in enumerate(question.values):
    if index:
      parts.append(tokenizer.encode(BETWEEN_VALUES))
    digits, at = value_tokens(tokenizer, value)
    offsets.append(sum(map(len, parts)) + at)
    parts.append(digits)
  return TrialTokens(np.concatenate(statements), np.cumsum([len(s) for s in statements]), np.concatenate(parts),
                     np.concatenate(offsets), question.about)


def lookup_row(tokenizer: Tokenizer, haystack: Int[np.ndarray, " S"], trial: TrialTokens, *, length: int,
               depths: np.ndarray) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " digits"]]:
  """Builds a row of `length` tokens: end-of-text, a haystack strewn with the statements, and the question at the end.

  Args:
    tokenizer: of the tokens.
    haystack: (S,) tokens, at least `length` of them.
    trial: what is stated and asked.
    length: of the row, T.
    depths: share of the haystack before each statement, (statements,), from 0 to 1, ascending.

  Returns:
    tokens: (T,) int32.
    positions: (digits,) of the answer's digits; the prediction made at p - 1 is compared with ``tokens[p]``.

  Raises:
    UserError: `length` is too short for the trial.
  """
  hay = length - trial.tokens
  if hay < 0:
    raise UserError(f"a trial of {trial.tokens} tokens does not fit into {length}: choose other --multiples")
  cuts = np.rint(np.asarray(depths) * hay).astype(int)
  statements = np.split(trial.stated, trial.bounds[:-1])
  parts = [[tokenizer.eot_id]]
  for piece, statement in zip(np.split(haystack[:hay], cuts), [*statements, trial.asked], strict=True):
    parts += [piece, statement]
  return np.concatenate(parts).astype(np.int32), length - len(trial.asked) + trial.offsets

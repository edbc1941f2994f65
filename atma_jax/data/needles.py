"""Recall: the induction needle that measures it, and synthetic documents that teach it.

Evaluation and training share no key and no value: of the seven-digit record keys and the five-digit values evaluation
draws multiples of 7, training the others.
"""

from __future__ import annotations

import heapq
import re

import numpy as np

from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError

CUE = " The access code for record {key} is"
MAGIC_CUE = " The special magic {word} number is"
VALUE_DIGITS = 5
_KEYS = (1_000_000, 10_000_000)
_VALUES = (0, 10**VALUE_DIGITS)
_EVALUATION_DIVISOR = 7
_EVALUATION_SEED = 0x6E65
_EVALUATION_WORDS = ("anchor", "basil", "copper", "dahlia", "elm", "fennel", "granite", "heron", "iris", "juniper", "kelp",
                     "lilac", "marble", "nutmeg", "olive", "poplar", "quail", "rosemary", "sage", "thistle", "urchin", "violet",
                     "walnut", "yew", "zinnia", "bramble", "clover", "dune", "estuary", "flint", "gorse", "hazel")

# --- Evaluation -------------------------------------------------------------------------------------------------------


def draw_needle(trial: int, seed: int = 0) -> tuple[str, str]:
  """Key (7 digits) and value (5 digits) of an evaluation trial: the same for every length, distance and depth."""
  rng = np.random.default_rng([_EVALUATION_SEED, seed, trial])
  key, value = (_EVALUATION_DIVISOR * rng.integers(*(-(-bound // _EVALUATION_DIVISOR) for bound in bounds))
                for bounds in (_KEYS, _VALUES))
  return str(key), f"{value:0{VALUE_DIGITS}}"


def draw_word(trial: int, seed: int = 0) -> str:
  """The word of an evaluation trial whose cue names a word; training has others."""
  return str(np.random.default_rng([_EVALUATION_SEED, seed, trial, 1]).choice(_EVALUATION_WORDS))


def needle_length(tokenizer: Tokenizer, *, key: str, value: str) -> int:
  """Tokens that `induction_needle` adds to its gap: end-of-text, the statement, the cue and the value again."""
  statement = len(tokenizer.encode(CUE.format(key=key))) + len(tokenizer.encode(_spaced(value)))
  return 1 + 2 * statement


def induction_needle(tokenizer: Tokenizer, filler_tokens: np.ndarray, *, distance: int, key: str, value: str,
                     present: bool = True) -> tuple[np.ndarray, np.ndarray]:
  """The induction needle (Polar Attention, arXiv 2606.25156): state a code, wait, ask for it.

  End-of-text, the cue " The access code for record {key} is" with the five spaced digits, a gap of `distance` filler
  tokens, the cue again and the digits again, to be predicted under teacher forcing.

  Args:
    tokenizer: gives each digit a token of its own (a separate token for the space before it is fine).
    filler_tokens: real text, at least `distance` tokens and the length of the statement more.
    distance: tokens between the statement and the second cue.
    key: seven digits, see `draw_needle`.
    value: five digits.
    present: False makes the baseline: the statement gives way to as many tokens of filler; the gap stays the same.

  Returns:
    tokens (n,) int32 and positions (5,) of the value's digits: the prediction made at position p - 1 is compared with
    ``tokens[p]``. n is ``distance + needle_length(...)`` with or without the statement.
  """
  cue = tokenizer.encode(CUE.format(key=key))
  digits, offsets = _value_tokens(tokenizer, value)
  statement = np.concatenate([cue, digits])
  needed = len(statement) + distance
  if len(filler_tokens) < needed:
    raise UserError(f"a needle at distance {distance} needs {needed} filler tokens, got {len(filler_tokens)}: take a "
                    "longer held-out document or a shorter distance")
  filler = np.asarray(filler_tokens[:needed], np.int32)
  first = statement if present else filler[:len(statement)]
  tokens = np.concatenate([[tokenizer.eot_id], first, filler[len(statement):], cue, digits]).astype(np.int32)
  return tokens, len(tokens) - len(digits) + offsets


def needle_in_haystack(tokenizer: Tokenizer, haystack: np.ndarray, *, length: int, depth: float, cue: str,
                       value: str) -> tuple[np.ndarray, np.ndarray]:
  """A row of `length` tokens: end-of-text, haystack with a statement at a depth, and at the end the question.

  Args:
    tokenizer: gives each digit a token of its own (a separate token for the space before it is fine).
    haystack: tokens, at least `length` of them.
    length: of the whole row.
    depth: share of the haystack before the statement, from 0 to 1.
    cue: what statement and question both begin with.
    value: five digits, spaced, that end both.

  Returns:
    tokens (length,) int32 and positions (5,) of the value's digits, as `induction_needle` does.
  """
  digits, offsets = _value_tokens(tokenizer, value)
  statement = np.concatenate([tokenizer.encode(cue), digits])
  hay = length - 1 - 2 * len(statement)
  if hay < 0 or len(haystack) < hay:
    raise UserError(f"a needle in a haystack of {length} tokens needs at least {1 + 2 * len(statement)}, and {max(hay, 0)} of "
                    f" haystack where there are {len(haystack)}: choose other --multiples")
  before = round(depth * hay)
  parts = [[tokenizer.eot_id], haystack[:before], statement, haystack[before:hay], statement]
  return np.concatenate(parts).astype(np.int32), length - len(digits) + offsets


def _value_tokens(tokenizer: Tokenizer, value: str) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of the spaced digits, and which of them are the five digits."""
  digits = tokenizer.encode(_spaced(value))
  offsets = [i for i, token in enumerate(digits) if tokenizer.decode([token]).strip() in set("0123456789")]
  if "".join(tokenizer.decode([digits[i]]).strip() for i in offsets) != value or len(value) != VALUE_DIGITS:
    raise UserError(f"the {tokenizer.kind} tokenizer does not give each digit of {_spaced(value)!r} its own token: "
                    "the needle needs five value tokens")
  return digits, np.asarray(offsets)


def _spaced(value: str) -> str:
  return "".join(f" {digit}" for digit in value)


# --- Training ---------------------------------------------------------------------------------------------------------

_WORDS = ("amber", "birch", "cedar", "delta", "ember", "falcon", "garnet", "harbor", "indigo", "jasper", "kestrel",
          "lantern", "maple", "nectar", "onyx", "pepper", "quartz", "raven", "saffron", "timber", "umber", "velvet",
          "willow", "yarrow", "zephyr")
# Half of the records are worded like the evaluation's needle; the others keep the skill from clinging to one sentence.
_PHRASINGS = ((CUE, 0.5), (MAGIC_CUE, 0.1), (" Locker {key} opens with", 0.1),
              (" # pin of {word} {short}:", 0.1), (" The pass phrase of {word} {short} reads", 0.1),
              (" record[{key}] =", 0.1))
_WORD_VALUES = 0.5  # share of records whose value is five words of the text instead of five digits
_LIVE_RECORDS = (1, 1, 2, 3)  # how many records a document keeps alive at a time, drawn uniformly
_MOST_QUESTIONS = 4
_SHORTEST_GAP, _SHORTEST_REACH = 4, 8  # characters


def recall_document(filler: str, *, reach: int, rng: np.random.Generator) -> str:
  """One recall document: short records dropped into real text, each asked for again one to four times.

  This is practice material, not natural text: it exists so that a small model learns within a few million tokens to
  fetch a value it has seen once. Gaps of real text between a record and its question, and between questions, are drawn
  log-uniformly up to `reach`, so most are short and some span the whole training length. One to three records are
  alive at a time; when one has been asked for often enough another takes its place. Half of them are worded like the
  evaluation's needle; keys and values are never the evaluation's. Half of the values are digits, as there, half words of
  the text: to prefer tokens it has seen already pays for words, so fetching them is learnt by degrees, while ten digits
  are always all in sight and give no such first step. A document's longest gap is itself drawn log-uniformly, so some are
  dense with records and others mostly filler: over all, about a fifth of the tokens are filler.

  Args:
    filler: real text; it is used up in order, cut at white space.
    reach: longest gap, in characters (what the training length holds).
    rng: decides everything else.
  """
  reach = int(_log_uniform(rng, _SHORTEST_REACH, reach))
  parts, used, words = [], 0, re.findall(r"[A-Za-z]{3,}", filler)
  # A live record: (filler used when it is due, its slot, cue, value, questions left). None left: state a new one.
  due = [(_next_space(filler, 0) if slot == 0 else _gap(rng, reach), slot, "", "", 0)
         for slot in range(rng.choice(_LIVE_RECORDS))]
  while used < len(filler):
    when, slot, cue, value, left = heapq.heappop(due)
    if when > used:
      end = _next_space(filler, when)
      parts.append(filler[used:end])
      used = end
    if left:
      left -= 1
    else:
      cue, value = _draw_cue(rng), _draw_value(rng, words)
      left = rng.integers(1, _MOST_QUESTIONS + 1)
    parts.append(cue + value)
    heapq.heappush(due, (used + _gap(rng, reach), slot, cue, value, left))
  return "".join(parts)


def _gap(rng: np.random.Generator, reach: int) -> int:
  return int(_log_uniform(rng, _SHORTEST_GAP, reach))


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> float:
  return np.exp(rng.uniform(np.log(low), np.log(max(high, low + 1))))


def _next_space(text: str, position: int, most: int = 40) -> int:
  """First white space at or after `position`; `position` itself where the next `most` characters have none."""
  return next((i for i in range(position, min(position + most, len(text))) if text[i].isspace()),
              min(position, len(text)))


def _draw_value(rng: np.random.Generator, words: list[str]) -> str:
  if words and rng.random() < _WORD_VALUES:
    return "".join(f" {words[i]}" for i in rng.integers(len(words), size=VALUE_DIGITS))
  return _spaced(f"{_draw(rng, *_VALUES):0{VALUE_DIGITS}}")


def _draw_cue(rng: np.random.Generator) -> str:
  phrases, weights = zip(*_PHRASINGS)
  return rng.choice(phrases, p=weights).format(key=_draw(rng, *_KEYS), word=rng.choice(_WORDS),
                                               short=rng.integers(100, 1000))


def _draw(rng: np.random.Generator, low: int, high: int) -> int:
  """A number in [low, high) that evaluation does not draw; `high` - 1 must be such a number."""
  number = int(rng.integers(low, high))
  return number + (number % _EVALUATION_DIVISOR == 0)

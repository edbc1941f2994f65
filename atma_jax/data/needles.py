"""The needle of the evaluation: a record stated once in a long text, and asked for at its end.

Evaluation and the training documents of the ``recall:`` source share no key and no value: evaluation draws only multiples of 7
among the seven-digit keys and the five-digit values, training only the other numbers.
"""

from __future__ import annotations

from jaxtyping import Int
import numpy as np

from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError

CUE = " The access code for record {key} is"
MAGIC_CUE = " The special magic {word} number is"
VALUE_DIGITS = 5
KEY_RANGE = (1_000_000, 10_000_000)  # half open: seven digits
VALUE_RANGE = (0, 10**VALUE_DIGITS)  # half open: five digits, with zeros in front
_EVALUATION_DIVISOR = 7
_EVALUATION_SEED = 0x6E65
EVALUATION_WORDS = ("anchor", "basil", "copper", "dahlia", "elm", "fennel", "granite", "heron", "iris", "juniper", "kelp",
                    "lilac", "marble", "nutmeg", "olive", "poplar", "quail", "rosemary", "sage", "thistle", "urchin", "violet",
                    "walnut", "yew", "zinnia", "bramble", "clover", "dune", "estuary", "flint", "gorse", "hazel")


def is_evaluation_number(number: int) -> bool:
  """Whether evaluation may draw this key or value, so that training must not."""
  return number % _EVALUATION_DIVISOR == 0


def spaced(value: str) -> str:
  """Writes a value as records do, with a space before every digit."""
  return "".join(f" {digit}" for digit in value)


def draw_needle(trial: int, seed: int = 0) -> tuple[str, str]:
  """Draws the key (7 digits) and the value (5 digits) of a trial: the same for every length, distance and depth."""
  rng = np.random.default_rng([_EVALUATION_SEED, seed, trial])
  key, value = (draw_multiple(rng, *bounds) for bounds in (KEY_RANGE, VALUE_RANGE))
  return str(key), f"{value:0{VALUE_DIGITS}}"


def draw_word(trial: int, seed: int = 0) -> str:
  """Draws the word of a trial whose cue names one. Training uses other words."""
  return str(np.random.default_rng([_EVALUATION_SEED, seed, trial, 1]).choice(EVALUATION_WORDS))


def draw_multiple(rng: np.random.Generator, low: int, high: int) -> int:
  """Draws a number in [low, high) that evaluation may use; see `is_evaluation_number`."""
  return _EVALUATION_DIVISOR * int(rng.integers(-(-low // _EVALUATION_DIVISOR), -(-high // _EVALUATION_DIVISOR)))


def needle_length(tokenizer: Tokenizer, *, key: str, value: str, cue: str = CUE) -> int:
  """Counts the tokens that `induction_needle` adds to its gap: end-of-text, the statement, and cue and value again."""
  statement = len(tokenizer.encode(cue.format(key=key))) + len(tokenizer.encode(spaced(value)))
  return 1 + 2 * statement


def induction_needle(tokenizer: Tokenizer, filler_tokens: Int[np.ndarray, " S"], *, distance: int, key: str, value: str,
                     present: bool = True, cue: str = CUE) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " 5"]]:
  """Builds the induction needle (Polar Attention, arXiv 2606.25156): state a code, wait, ask for it.

  The sequence is end-of-text, the cue " The access code for record {key} is" with the five spaced digits, a gap of `distance`
  filler tokens, and the cue and the digits again, which are to be predicted under teacher forcing.

  Args:
    tokenizer: must give each digit a token of its own; the space before it may be another.
    filler_tokens: real text, (S,): at least `distance` tokens plus the length of the statement.
    distance: tokens between the statement and the second cue.
    key: seven digits, see `draw_needle`.
    value: five digits.
    present: False builds the baseline, in which filler takes the place of the statement and the gap stays the same.
    cue: another wording of the cue, with ``{key}`` in it.

  Returns:
    tokens: (T,) int32, ``distance + needle_length(...)`` of them with or without the statement.
    positions: (5,) int of the value's digits; the prediction made at position p - 1 is compared with ``tokens[p]``.

  Raises:
    UserError: the filler is too short, or the tokenizer joins digits.
  """
  asked = tokenizer.encode(cue.format(key=key))
  digits, offsets = value_tokens(tokenizer, value)
  statement = np.concatenate([asked, digits])
  needed = len(statement) + distance
  if len(filler_tokens) < needed:
    raise UserError(f"a needle at distance {distance} needs {needed} filler tokens, got {len(filler_tokens)}: take a "
                    "longer held-out document or a shorter distance")
  filler = np.asarray(filler_tokens[:needed], np.int32)
  first = statement if present else filler[:len(statement)]
  tokens = np.concatenate([[tokenizer.eot_id], first, filler[len(statement):], asked, digits]).astype(np.int32)
  return tokens, len(tokens) - len(digits) + offsets


def needle_in_haystack(tokenizer: Tokenizer, haystack: Int[np.ndarray, " S"], *, length: int, depth: float, cue: str,
                       value: str) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " 5"]]:
  """Builds a sequence of `length` tokens: end-of-text, a haystack with a statement in it, and the question at the end.

  Args:
    tokenizer: must give each digit a token of its own; the space before it may be another.
    haystack: (S,) tokens, at least `length` of them.
    length: of the whole sequence, T.
    depth: share of the haystack that comes before the statement, from 0 to 1.
    cue: the words that both the statement and the question begin with.
    value: the five digits that end both, written with spaces.

  Returns:
    tokens: (T,) int32.
    positions: (5,) int of the value's digits in the question, as `induction_needle` returns them.

  Raises:
    UserError: `length` is too short for the needle, the haystack is shorter than that, or the tokenizer joins digits.
  """
  digits, offsets = value_tokens(tokenizer, value)
  statement = np.concatenate([tokenizer.encode(cue), digits])
  hay = length - 1 - 2 * len(statement)
  if hay < 0 or len(haystack) < hay:
    raise UserError(f"a needle in a haystack of {length} tokens needs at least {1 + 2 * len(statement)} tokens and {max(hay, 0)} "
                    f"of haystack, of which there are {len(haystack)}: choose other --multiples")
  before = round(depth * hay)
  parts = [[tokenizer.eot_id], haystack[:before], statement, haystack[before:hay], statement]
  return np.concatenate(parts).astype(np.int32), length - len(digits) + offsets


def value_tokens(tokenizer: Tokenizer, value: str) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of the spaced digits, and the offsets (5,) of the digits among them.

  Raises:
    UserError: the tokenizer joins digits.
  """
  digits = tokenizer.encode(spaced(value))
  offsets = [i for i, token in enumerate(digits) if tokenizer.decode([token]).strip() in set("0123456789")]
  if "".join(tokenizer.decode([digits[i]]).strip() for i in offsets) != value or len(value) != VALUE_DIGITS:
    raise UserError(f"the {tokenizer.kind} tokenizer does not give each digit of {spaced(value)!r} its own token: "
                    "the needle needs five value tokens")
  return digits, np.asarray(offsets)

"""Needles: five value tokens exactly where they are said to be, a fair baseline, and learnable recall text."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tokenizers as huggingface

from atma_jax.data.needles import draw_needle, induction_needle, needle_length
from atma_jax.data.sources.recall import recall_document
from atma_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, train_sentencepiece
from atma_jax.errors import UserError
from tests.data.conftest import make_text

TEXT = make_text(0, 2000)
KEY, VALUE = "1234569", "40719"
SENTENCE = re.compile(r" The access code for record (\d{7}) is((?: \d){5})")


def byte_level(*, vocabulary: str = TEXT) -> HuggingFaceTokenizer:
  """Like GPT-2's: a space and a digit can be one token."""
  model = huggingface.Tokenizer(huggingface.models.BPE())
  model.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = huggingface.decoders.ByteLevel()
  model.train_from_iterator([vocabulary], huggingface.trainers.BpeTrainer(
      vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False,
      initial_alphabet=huggingface.pre_tokenizers.ByteLevel.alphabet()))
  return HuggingFaceTokenizer(model.to_str())


TOKENIZERS = {"bytes": ByteTokenizer(), "sentencepiece": train_sentencepiece([TEXT], 400),
              "huggingface": byte_level(vocabulary=TEXT + " 1 2 3 4 5 6 7 8 9 0" * 50)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("distance", [0, 1, 100])
@pytest.mark.parametrize("present", [True, False])
def test_induction_needle(kind, distance, present):
  tokenizer = TOKENIZERS[kind]
  filler = tokenizer.encode(TEXT)
  tokens, positions = induction_needle(tokenizer, filler, distance=distance, key=KEY, value=VALUE, present=present)
  assert tokens.dtype == np.int32 and tokens[0] == tokenizer.eot_id
  assert len(tokens) == distance + needle_length(tokenizer, key=KEY, value=VALUE)
  assert "".join(tokenizer.decode([token]).strip() for token in tokens[positions]) == VALUE
  assert positions.shape == (5,) and positions[-1] == len(tokens) - 1
  statements = SENTENCE.findall(tokenizer.decode(tokens))
  assert statements == [(KEY, " 4 0 7 1 9")] * (2 if present else 1)
  statement = (len(tokens) - 1 - distance) // 2
  np.testing.assert_array_equal(tokens[1 + statement:1 + statement + distance], filler[statement:statement + distance])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_baseline_differs_only_where_the_statement_was(kind):
  tokenizer = TOKENIZERS[kind]
  arguments = dict(distance=50, key=KEY, value=VALUE)
  with_needle, positions = induction_needle(tokenizer, tokenizer.encode(TEXT), **arguments)
  without, same_positions = induction_needle(tokenizer, tokenizer.encode(TEXT), present=False, **arguments)
  np.testing.assert_array_equal(positions, same_positions)
  statement = (len(without) - 1 - 50) // 2
  assert (with_needle[1:1 + statement] != without[1:1 + statement]).any()
  np.testing.assert_array_equal(with_needle[1 + statement:], without[1 + statement:])


def test_the_value_has_one_token_a_digit_even_where_spaces_have_their_own():
  lengths = {kind: len(tokenizer.encode(" 4 0 7 1 9")) for kind, tokenizer in TOKENIZERS.items()}
  assert lengths == {"bytes": 10, "sentencepiece": 10, "huggingface": 5}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_text_spells_a_record_with_the_tokens_of_the_needle(kind):
  tokenizer = TOKENIZERS[kind]
  cue, digits = " The access code for record 1234569 is", " 4 0 7 1 9"
  together = tokenizer.encode(f"the quick brown fox{cue}{digits}\n")
  apart = np.concatenate([tokenizer.encode(cue), tokenizer.encode(digits)])
  start = len(tokenizer.encode("the quick brown fox"))
  np.testing.assert_array_equal(together[start:start + len(apart)], apart)


def test_too_little_filler():
  with pytest.raises(UserError, match=r"a needle at distance 100 needs .* filler tokens, got 99"):
    induction_needle(ByteTokenizer(), np.zeros(99, np.int32), distance=100, key=KEY, value=VALUE)


def test_a_tokenizer_that_joins_digits():
  joined = huggingface.Tokenizer(huggingface.models.WordLevel(
      {"<|endoftext|>": 0, "?": 1, " 4 0 7 1 9": 2}, unk_token="?"))
  with pytest.raises(UserError, match="does not give each digit of ' 4 0 7 1 9' its own token"):
    induction_needle(HuggingFaceTokenizer(joined.to_str()), np.zeros(99, np.int32), distance=1, key=KEY, value=VALUE)


def test_draws_are_fixed_and_spread():
  draws = [draw_needle(trial) for trial in range(200)]
  assert draws == [draw_needle(trial) for trial in range(200)]
  assert len({key for key, _ in draws}) == 200
  assert all(len(key) == 7 and len(value) == 5 and int(key) % 7 == int(value) % 7 == 0 for key, value in draws)
  digits = np.array([list(map(int, value)) for _, value in draws])
  assert all((np.bincount(place, minlength=10) > 5).all() for place in digits.T)  # chance is a tenth in every place
  assert draws[0] != draw_needle(0, seed=1)


def recall(seed, longest_gap=600, words=3000):
  return recall_document(make_text(seed, words), longest_gap=longest_gap, rng=np.random.default_rng(seed))


def test_recall_documents_are_deterministic_and_keep_the_text():
  assert recall(3) == recall(3) != recall(4)
  bare = re.sub(r" (?:The access code for record \d+ is|The special magic \w+ number is|Locker \d+ opens with|"
                r"# pin of \w+ \d+:|The pass phrase of \w+ \d+ reads|record\[\d+\] =)"
                r"(?:(?: \d){5}|(?: [A-Za-z]{3,}){5})", "", recall(3))
  assert make_text(3, 3000).startswith(bare) and len(bare) > 0.95 * len(make_text(3, 3000))


def test_recall_documents_ask_for_what_they_stated():
  gaps, keys, values, questions = [], set(), set(), 0
  for seed in range(20):
    stated = {}
    for match in SENTENCE.finditer(recall(seed)):
      key, value = match.groups()
      if key in stated:
        assert stated[key][0] == value
        gaps.append(match.start() - stated[key][1])
        questions += 1
      stated[key] = (value, match.end())
    keys |= stated.keys()
    values |= {value.replace(" ", "") for value in re.findall(r"(?: \d){5}", recall(seed))}
  assert questions > 1.5 * len(keys) and len(values) > len(keys)
  assert not any(int(number) % 7 == 0 for number in keys | values)  # those are evaluation's
  gaps = np.array(gaps)
  assert np.median(gaps) < 150 and gaps.max() > 500  # most are short, some nearly the longest
  assert (gaps > 300).mean() > 0.03


def test_recall_documents_are_dense():
  text = "".join(recall(seed) for seed in range(20))
  digits, words = (len(re.findall(rf"(?:is|with|:|reads|=)(?: {value}){{5}}", text)) for value in (r"\d", "[A-Za-z]{3,}"))
  assert 0.8 < digits / words < 1.25  # half of the values each, and both many
  assert digits * 5 / len(text) > 0.02

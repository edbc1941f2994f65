"""Tokenizers keep text exactly, travel as JSON, and refuse what they cannot read in one line."""

from __future__ import annotations

import functools
import json
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers as huggingface

from atma_jax.config import ModelConfig
from atma_jax.data.tokenizers import (
  ByteTokenizer,
  HuggingFaceTokenizer,
  check_vocabulary,
  load_tokenizer,
  tokenizer_from_dict,
  train_sentencepiece,
)
from atma_jax.errors import UserError

SAMPLE = "def f(x):\n    return x + 12345  # a comment\n\n\tif x:\n\t\tpass\n" * 20
HARD_TEXTS = ("", " ", "\n", "\t \n  x", "a  b   c ", "\r\n", "\x00", "▁", " ▁a▁ ", "é🎉漢字", "<|endoftext|>",
              "<s></s>", "<0x41>", " The access code for record 1234567 is 4 0 7 1 9", "\u2028\u0301e\u0301")


@functools.cache
def make(kind):
  if kind == "bytes":
    return ByteTokenizer()
  if kind == "sentencepiece":
    return train_sentencepiece([SAMPLE], 300)
  return HuggingFaceTokenizer(byte_level_json())


def byte_level_json() -> str:
  model = huggingface.Tokenizer(huggingface.models.BPE())
  model.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = huggingface.decoders.ByteLevel()
  trainer = huggingface.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                            initial_alphabet=huggingface.pre_tokenizers.ByteLevel.alphabet())
  model.train_from_iterator([SAMPLE], trainer)
  return model.to_str()


KINDS = ("bytes", "sentencepiece", "huggingface")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet=" \t\n\r▁ab1<>|")))
def test_decoding_gives_the_text_back(kind, text):
  tokenizer = make(kind)
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.eot_id not in ids
  assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
  assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts(kind, text):
  tokenizer = make(kind)
  assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eot_id]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_travels_as_json_and_pickle(kind):
  tokenizer = make(kind)
  for copy in (tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))), pickle.loads(pickle.dumps(tokenizer))):
    assert copy.fingerprint == tokenizer.fingerprint
    assert (copy.vocab_size, copy.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    np.testing.assert_array_equal(copy.encode(SAMPLE), tokenizer.encode(SAMPLE))
  assert len({make(kind).fingerprint for kind in KINDS}) == len(KINDS)


def test_sentencepiece_training_is_deterministic_and_splits_digits():
  tokenizer = make("sentencepiece")
  assert train_sentencepiece([SAMPLE], 300).to_bytes() == tokenizer.to_bytes()
  pieces = [tokenizer.decode([i]) for i in tokenizer.encode("x12345")]
  assert pieces[-5:] == list("12345")
  assert len(tokenizer.encode(SAMPLE)) < 0.75 * len(SAMPLE)


def test_a_trained_vocabulary_too_small_for_the_bytes_is_refused():
  with pytest.raises(UserError, match=r"config\.data\.tokenizer_vocab_size=100: .*smaller than required"):
    train_sentencepiece([SAMPLE], 100)


def test_loading_by_path(tmp_path):
  (tmp_path / "a.model").write_bytes(make("sentencepiece").to_bytes())
  (tmp_path / "tokenizer.json").write_text(byte_level_json())
  (tmp_path / "stored.json").write_text(json.dumps(make("sentencepiece").to_dict()))
  assert load_tokenizer("bytes").kind == "bytes"
  assert load_tokenizer(str(tmp_path / "a.model")).fingerprint == make("sentencepiece").fingerprint
  assert load_tokenizer(str(tmp_path / "tokenizer.json")).kind == "huggingface"
  assert load_tokenizer(str(tmp_path / "stored.json")).fingerprint == make("sentencepiece").fingerprint


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", b'{"tokenizer_name": "gpt2"}', "only names the tokenizer 'gpt2' and holds no vocabulary"),
    ("tokenizer.json", b"{", "not valid JSON"),
    ("tokenizer.json", b"{}", "not a Hugging Face tokenizer"),
    ("tokenizer.json", b'{"kind": "words", "base64": ""}', "legal: bytes, huggingface, named, sentencepiece"),
    ("x.model", b"junk", "not a SentencePiece model"),
])
def test_bad_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    load_tokenizer(str(tmp_path / name))
  assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_the_published_checkpoints_name_a_tokenizer_without_its_vocabulary(golden):
  with pytest.raises(UserError, match="holds no vocabulary"):
    load_tokenizer(str(golden.folder / "checkpoint_polar_mem1_win0" / "tokenizer.json"))


def test_a_missing_file():
  with pytest.raises(UserError, match=r"config\.data\.tokenizer='no/such\.model': No such file"):
    load_tokenizer("no/such.model")


def test_without_end_of_text(tmp_path):
  bare = huggingface.Tokenizer(huggingface.models.BPE(vocab={"a": 0}, merges=[]))
  (tmp_path / "tokenizer.json").write_text(bare.to_str())
  with pytest.raises(UserError, match="has no end-of-text token"):
    load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_vocabulary_check():
  check_vocabulary(ByteTokenizer(), ModelConfig(vocab_size=257))
  with pytest.raises(UserError, match=r"config\.model\.vocab_size=256: must be at least 257, .*bytes tokenizer"):
    check_vocabulary(ByteTokenizer(), ModelConfig(vocab_size=256))

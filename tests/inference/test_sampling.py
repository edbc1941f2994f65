"""Sampling against plain NumPy, and incremental text against decoding everything at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.sampling import RowSampling, Sampling, sample
from atma_jax.inference.text_stream import TextStream

LOGITS = np.array([2.0, 1.5, -0.5, 0.3, -3.0, 1.4, 0.0, -1.0], np.float32)
SAMPLE = jax.jit(sample)
DRAWS = 4096


def distribution(logits: np.ndarray, options: Sampling, seen: np.ndarray) -> np.ndarray:
  """Probabilities of the next token, written out in float64."""
  logits, penalty = logits.astype(np.float64), options.repetition_penalty
  logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
  probabilities = np.exp(logits / options.temperature)
  order = np.argsort(-logits)
  if options.top_k:
    probabilities[order[options.top_k :]] = 0
  probabilities /= probabilities.sum()
  needed = np.searchsorted(np.cumsum(probabilities[order]), options.top_p) + 1
  probabilities[order[needed:]] = 0
  probabilities[probabilities < options.min_p * probabilities.max()] = 0
  return probabilities / probabilities.sum()


@pytest.mark.parametrize("options", [
  {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.01}, {"min_p": 0.3}, {"repetition_penalty": 1.7},
  {"top_k": 5, "top_p": 0.8, "temperature": 2.0}, {"top_k": 6, "min_p": 0.1, "repetition_penalty": 0.8}, {"top_k": 99}])
def test_frequencies(options):
  """The frequencies of many seeds follow the definition to five standard deviations, and excluded tokens are never drawn."""
  options = Sampling(**options)
  seen = np.isin(np.arange(8), [0, 2, 5])
  rows = RowSampling.stack(options)._replace(seed=jnp.arange(DRAWS, dtype=jnp.uint32))
  rows = RowSampling(*(jnp.broadcast_to(x, DRAWS) for x in rows))
  logits, many_seen = (jnp.broadcast_to(x, (DRAWS, 8)) for x in (LOGITS, seen))
  drawn = SAMPLE(logits, rows, many_seen, jnp.zeros(DRAWS, jnp.int32))
  expected = distribution(LOGITS, options, seen)
  counts = np.bincount(np.asarray(drawn), minlength=8)
  assert np.all(counts[expected == 0] == 0)
  assert np.all(np.abs(counts / DRAWS - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS))


def test_rows_are_independent_and_reproducible():
  """A row draws the same token with any neighbours, anywhere in the batch; greedy is the largest penalised logit."""
  rng = np.random.default_rng(0)
  logits, seen = rng.normal(size=(6, 50)).astype(np.float32), rng.random((6, 50)) < 0.3
  options = [Sampling(temperature=0), Sampling(seed=5), Sampling(top_k=4, seed=6), Sampling(temperature=0, top_p=0.1),
             Sampling(temperature=0, repetition_penalty=3.0), Sampling(min_p=0.2, top_p=0.7, seed=7)]
  index = np.arange(6, dtype=np.int32)
  together = SAMPLE(logits, RowSampling.stack(*options), seen, index)
  order = np.array([3, 1, 5, 0, 2, 4])
  moved = SAMPLE(logits[order], RowSampling.stack(*(options[i] for i in order)), seen[order], index[order])
  np.testing.assert_array_equal(together[order], moved)
  for i, own in enumerate(options):
    assert SAMPLE(logits[i : i + 1], RowSampling.stack(own), seen[i : i + 1], index[i : i + 1])[0] == together[i]
  assert together[0] == logits[0].argmax() and together[3] == logits[3].argmax()
  penalised = np.where(seen[4], np.where(logits[4] > 0, logits[4] / 3, logits[4] * 3), logits[4])
  assert together[4] == penalised.argmax()


def test_excluded_tokens_never_come():
  """Tokens at -inf are excluded under every filter, even if top-k has nothing else to add."""
  logits = jnp.full((64, 8), -jnp.inf).at[:, 3:5].set(jnp.array([0.0, -20.0]))
  for options in (Sampling(), Sampling(top_k=5), Sampling(top_p=0.999999), Sampling(temperature=100.0)):
    rows = RowSampling.stack(*(dataclasses.replace(options, seed=i) for i in range(64)))
    assert set(np.asarray(SAMPLE(logits, rows, jnp.zeros((64, 8), bool), jnp.zeros(64, jnp.int32))).tolist()) <= {3, 4}


@pytest.mark.parametrize(("field", "value"), [
  ("max_tokens", 0), ("max_tokens", 2**31), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
  ("top_p", 1.1), ("min_p", 2.0), ("repetition_penalty", 0.0), ("seed", -1), ("stop", ("",))])
def test_illegal_options(field, value):
  with pytest.raises(UserError, match=f"^{field}=.*must be"):
    Sampling(**{field: value})


def streamed(ids, stop=()) -> tuple[str, TextStream]:
  stream, text = TextStream(ByteTokenizer(), stop), ""
  for token in ids:
    text += stream.push(int(token))
    if stream.stopped:
      break
  return text + stream.finish(), stream


def test_pieces_add_up():
  """The pieces of characters of one to four bytes, and of bytes that are no text at all, add up to the whole text."""
  tokenizer, rng = ByteTokenizer(), np.random.default_rng(1)
  for text in ("plain", "né€ü 漢字 🎉🎉", "\ufffd x \ufffd", ""):
    assert streamed(tokenizer.encode(text))[0] == text
  for _ in range(200):
    ids = rng.choice([65, 0xC3, 0xA9, 0xF0, 0x9F, 0x8E, 0x89, 256], size=rng.integers(1, 30))
    assert streamed(ids)[0] == tokenizer.decode(ids)


def test_a_character_is_emitted_whole():
  stream = TextStream(ByteTokenizer())
  assert [stream.push(b) for b in "a🎉b".encode()] == ["a", "", "", "", "🎉", "b"]


def test_stop_strings():
  """The text ends before the first stop string; what may become one is held back, and emitted if it does not."""
  rng, encode = np.random.default_rng(2), ByteTokenizer().encode
  for _ in range(500):
    text = "".join(rng.choice(list("ab"), size=rng.integers(0, 12)))
    stop = tuple("".join(rng.choice(list("ab"), size=rng.integers(1, 5))) for _ in range(rng.integers(1, 3)))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    result, stream = streamed(encode(text), stop)
    assert stream.stopped == bool(ends)
    seen = text[: min(ends)] if ends else text  # what had arrived when the first stop string was complete
    assert result == (seen[: min(seen.find(s) for s in stop if s in seen)] if ends else text)
  stream = TextStream(ByteTokenizer(), ("END",))
  assert [stream.push(int(b)) for b in encode("xEENx")] == ["x", "", "E", "", "ENx"]

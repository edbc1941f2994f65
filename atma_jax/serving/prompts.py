"""Prompts of requests: from text or token ids to tokens, without work for what a model's context cannot hold.

A text of C characters has at least C / L tokens, where L is the length of the tokenizer's longest token. So most texts that
are too long are refused by their length alone. Some tokenizers drop characters or join unknown ones; the limit leaves room
for that, but it is one.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxtyping import Int
import numpy as np

from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.serving.refusal import ProtocolError

SLACK = 2  # times what the longest tokens could spell
FEW_CHARACTERS = 1024  # that are always read

_LEGAL = "prompt: must be a string, a list of strings, a list of token ids or a list of lists of token ids"


def raw_prompts(value: Any) -> list[str | list[Any]]:
  """Returns the prompts of a request, each a text or a list, as they were sent. A missing one stands for the start of a document.

  Raises:
    ProtocolError: it is nothing of what the protocol allows.
  """
  if value is None or isinstance(value, str):
    return [value or ""]
  if not isinstance(value, list) or not value:
    raise ProtocolError(400, f"{_LEGAL}, and not empty", param="prompt")
  prompts: list[Any] = [value] if all(map(is_token, value)) else value
  if not all(isinstance(prompt, str | list) for prompt in prompts):
    raise ProtocolError(400, _LEGAL, param="prompt")
  return prompts


def tokenise(prompt: str | list[Any], tokenizer: Tokenizer, vocab_size: int, longest: int) -> Int[np.ndarray, " T"]:
  """Returns the tokens of one prompt, (T,) int32; an empty one stands for the start of a document, which is end-of-text.

  Args:
    prompt: one of `raw_prompts`.
    tokenizer: of the model.
    vocab_size: number of ids that the model has.
    longest: tokens that the context holds.

  Raises:
    ProtocolError: it is neither text nor token ids of the model, or far too long.
  """
  if isinstance(prompt, str):
    if not is_text(prompt):
      raise ProtocolError(400, "prompt: holds half of a surrogate pair, which is no text", param="prompt")
    if len(prompt) > (most := most_characters(tokenizer, longest)):
      raise ProtocolError(400, f"prompt: {len(prompt)} characters; at most {most} are read for this model's context of {longest} "
                          "tokens", param="prompt", code="context_length_exceeded")
    ids = tokenizer.encode(prompt)
  else:
    if not all(map(is_token, prompt)):
      raise ProtocolError(400, _LEGAL, param="prompt")
    if not all(0 <= i < vocab_size for i in prompt):
      raise ProtocolError(400, f"prompt: token ids must be from 0 to {vocab_size - 1}", param="prompt")
    ids = prompt
  return np.asarray(ids if len(ids) else [tokenizer.eot_id], np.int32)


def most_characters(tokenizer: Tokenizer, longest: int) -> int:
  """Returns the most characters of a prompt that are looked at, for a context of so many tokens.

  Raises:
    UserError: the tokenizer is only a name, or it cannot decode one of its own tokens.
  """
  return SLACK * longest * _longest_token(tokenizer) + FEW_CHARACTERS


def is_token(value: Any) -> bool:
  """Whether a JSON value is a whole number, which true and false are not."""
  return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: str) -> bool:
  """Whether a string can be written in UTF-8."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


@functools.lru_cache(maxsize=4)
def _longest_token(tokenizer: Tokenizer) -> int:
  """The most characters that one token of a tokenizer stands for, found by decoding every one of them."""
  tokenizer.encode("")  # of a tokenizer that is only a name this says so
  longest = 1
  for token in range(tokenizer.vocab_size):
    try:
      longest = max(longest, len(tokenizer.decode([token])))
    except Exception as error:
      raise UserError(f"the tokenizer cannot decode its token {token}: {error}") from error
  return longest

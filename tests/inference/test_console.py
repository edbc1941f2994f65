"""The conversation on the terminal: every line is answered with all that was said before it."""

from __future__ import annotations

import pytest

from atma_jax.data.chat_template import ChatTemplate, Message
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.api import engine_for
from atma_jax.inference.console import converse
from atma_jax.inference.sampling import Sampling


def test_a_conversation(lively, capsys):
  model, tokenizer = lively(), ByteTokenizer()
  sampling = Sampling(max_tokens=4, temperature=0, ignore_end=True)
  with pytest.raises(UserError, match="this checkpoint has no chat template"):
    converse(model, tokenizer, sampling, [])
  tokenizer.chat_template = ChatTemplate()
  converse(model, tokenizer, sampling, ["Hello\n", "\n", "Why?\n"], chunk=64)
  engine, messages, answers = engine_for(model, tokenizer, 200, 1, chunk=64), [], []
  for line in ("Hello", "Why?"):
    messages.append(Message("user", line))
    [completion] = engine.generate([tokenizer.chat_template.prompt(messages, tokenizer)], sampling)
    messages.append(Message("assistant", completion.text))
    answers.append(completion.text)
  assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)

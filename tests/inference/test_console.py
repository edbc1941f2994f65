"""The conversation on the terminal: every line is answered with all that was said before it."""

from __future__ import annotations

import pytest

from atma_jax.data.chat_template import ChatTemplate, Message
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference import console
from atma_jax.inference.requests import TokenOutput
from atma_jax.inference.sampling import Sampling


class Recording:
  """An engine that answers "So?" and keeps what it was asked."""

  def __init__(self):
    self.asked = []

  def check(self, prompt, sampling):
    return prompt

  def stream(self, prompts, sampling):
    self.asked.append((prompts[0].tolist(), sampling.seed))
    yield from (TokenOutput(0, text) for text in ("So", "?"))


def test_a_conversation(monkeypatch, capsys):
  """Prompts are those of the template, with the answers that were given; empty lines say nothing."""
  engine, tokenizer, template = Recording(), ByteTokenizer(), ChatTemplate()
  with pytest.raises(UserError, match="this checkpoint has no chat template"):
    console.converse(None, tokenizer, Sampling(), [])
  tokenizer.chat_template = template
  monkeypatch.setattr(console, "engine_for", lambda *arguments, **options: engine)
  console.converse(None, tokenizer, Sampling(seed=5), ["Hello\n", "\n", "Why?\n"])
  messages = [Message("user", "Hello"), Message("assistant", "So?"), Message("user", "Why?")]
  prompts = [template.prompt(messages[:count], tokenizer).tolist() for count in (1, 3)]
  assert engine.asked == [(prompts[0], 5), (prompts[1], 6)]
  assert capsys.readouterr().out == "So?\nSo?\n"

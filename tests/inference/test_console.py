"""What `generate` shows on the terminal: a conversation, and what stands beside the text."""

from __future__ import annotations

import logging

import pytest

from atma_jax.data.chat_template import ChatTemplate, Message
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference import console
from atma_jax.inference.requests import TokenOutput
from atma_jax.inference.sampling import Sampling
from atma_jax.ops.core import dispatch


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


def test_compiling_is_announced_and_choices_of_kernels_are_not_shown(capsys, caplog):
  """The lines stay out of the text of a terminal; a training run, which does not call this, logs them."""
  logger = logging.getLogger(dispatch.LOGGER)
  before = logger.level
  try:
    with caplog.at_level(logging.INFO):
      logger.info("an op: 'xla' chosen before")
      console.announce_compiling()
      logger.info("an op: 'xla' chosen after")
  finally:
    logger.setLevel(before)
  shown = capsys.readouterr()
  assert shown.out == "" and shown.err.startswith("compiling the programs that read prompts")
  assert [record.getMessage() for record in caplog.records] == ["an op: 'xla' chosen before"]

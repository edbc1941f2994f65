"""What every source of conversations does: a document is its messages as one line of JSON, and only answers are predicted."""

from __future__ import annotations

from collections.abc import Sequence
import json

from jaxtyping import Int
import numpy as np

from atma_jax.data.chat_template import LEGAL_MESSAGES, ChatTemplate, Message, parse_messages, to_training
from atma_jax.data.documents import Document
from atma_jax.data.source import TextSource
from atma_jax.data.tokenizers import Tokenizer


class ConversationSource(TextSource):
  """A source whose documents are conversations, written by `document_of`."""

  masked = True
  legal = f'.jsonl or .parquet rows of {{"messages": {LEGAL_MESSAGES}}} with at least one answer'

  def plain(self, text: str) -> str:
    return "\n".join(message["content"] for message in json.loads(text))

  def encode(self, text: str, tokenizer: Tokenizer) -> Int[np.ndarray, " T"]:
    messages = [Message(**message) for message in json.loads(text)]
    return (tokenizer.chat_template or ChatTemplate()).encode(messages, tokenizer)


def document_of(name: str, row: int, messages: Sequence[Message]) -> Document:
  """The document of a conversation."""
  return Document(name, row, json.dumps([message._asdict() for message in messages], ensure_ascii=False))


def parse_conversation(name: str, row: int, value: object, column: str) -> Document:
  """The document of a row's messages as a file holds them, or what is wrong with them."""
  del column
  try:
    return document_of(name, row, to_training(parse_messages(value)))
  except ValueError as error:
    return Document(name, row, None, str(error))

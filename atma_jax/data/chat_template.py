"""Conversations: what a list of messages may hold, and the tokens it becomes, the same in training and in serving.

A message is written as the header of its role, its content, and end-of-text. No text encodes to end-of-text, so whatever a
content holds, it can neither end its own turn nor begin another one. An answer ends with the same token, and there generation
stops by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Int
import numpy as np

from atma_jax.data.shards import MASKED
from atma_jax.errors import UserError
from atma_jax.json_input import mismatch

if TYPE_CHECKING:
  from atma_jax.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
LEGAL_MESSAGES = '[{"role": "user", "content": "TEXT"}, {"role": "assistant", "content": "TEXT"}, ...], roles ' + ", ".join(ROLES)


class Message(NamedTuple):
  """One turn of a conversation; `role` is one of `ROLES`."""

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """How a conversation is written, kept with the tokenizer in prepared directories and checkpoints.

  Attributes:
    system, user, assistant: the header in front of a message of that role.
  """

  system: str = "<|system|>\n"
  user: str = "<|user|>\n"
  assistant: str = "<|assistant|>\n"

  @classmethod
  def from_dict(cls, values: Any, name: str) -> ChatTemplate:
    """Reads what `dataclasses.asdict` made of one; `name` is where it was stored. Raises `UserError` if it is damaged."""
    problem = mismatch(values, dict.fromkeys(ROLES, str), "chat_template")
    if problem or values.keys() != set(ROLES) or not all(values.values()):
      raise UserError(f"{name}: {problem or 'chat_template must be an object of three headers: ' + ', '.join(ROLES)}")
    return cls(**values)

  def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Int[np.ndarray, " T"]:
    """The tokens of messages, (T,) int64; `MASKED` marks those that no assistant wrote.

    Raises:
      UserError: a content encodes to end-of-text, which only a faulty tokenizer does.
    """
    parts = []
    for message in messages:
      header, content = tokenizer.encode(getattr(self, message.role)), tokenizer.encode(message.content)
      if tokenizer.eot_id in content:
        raise UserError(f"a message of role {message.role} encodes to the token {tokenizer.eot_id}, which ends a turn, so this "
                        "tokenizer can write no conversations")
      turn = np.append(content, tokenizer.eot_id).astype(np.int64)
      parts += [header.astype(np.int64) | MASKED, turn if message.role == "assistant" else turn | MASKED]
    return np.concatenate(parts)

  def prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Int[np.ndarray, " T"]:
    """The tokens that an answer to `messages` follows, (T,) int32. They begin with end-of-text, as conversations do in training.

    Raises:
      UserError: see `encode`.
    """
    turns = self.encode(messages, tokenizer) & ~MASKED
    return np.concatenate([[tokenizer.eot_id], turns, tokenizer.encode(self.assistant)]).astype(np.int32)

  def to_jinja(self) -> str:
    """The same template as Hugging Face's ``chat_template`` spells it, for a tokenizer whose ``eos_token`` is end-of-text.

    There, a whole conversation is encoded at once, so a tokenizer that merges a header's newline with what follows it may choose
    other tokens than `prompt` does.
    """
    headers = "".join(f"{{% if message['role'] == '{role}' %}}{{{{ {json.dumps(getattr(self, role))} }}}}{{% endif %}}"
                      for role in ROLES)
    turns = f"{{% for message in messages %}}{headers}{{{{ message['content'] + eos_token }}}}{{% endfor %}}"
    asked = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(self.assistant)} }}}}{{% endif %}}"
    return "{{ eos_token }}" + turns + asked


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
  """The chat template of a tokenizer. Raises `UserError` if it has none."""
  if tokenizer.chat_template is None:
    raise UserError("this checkpoint has no chat template, because it was not trained on conversations: fine-tune it with "
                    "config.data.sources=chat:FILE.jsonl")
  return tokenizer.chat_template


def parse_messages(value: Any) -> list[Message]:
  """Checks a list of messages as JSON gives it; a content may be a string or a list of text parts.

  Raises:
    ValueError: the first thing that is wrong, in one line.
  """
  if not isinstance(value, list) or not value:
    raise ValueError("messages must be a list of at least one message")
  return [_parse_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _parse_message(value: Any, name: str) -> Message:
  if not isinstance(value, dict):
    raise ValueError(f"{name} is not an object with role and content")
  if value.get("role") not in ROLES:
    raise ValueError(f"{name}.role is {json.dumps(value.get('role'))[:40]}, not one of {', '.join(ROLES)}")
  for field, other in value.items():
    if field not in ("role", "content") and other not in (None, "", [], {}):
      raise ValueError(f"{name} has {json.dumps(field)[:40]}, and only role and content are read")
  content = value.get("content")
  if isinstance(content, list):
    if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
      raise ValueError(f'{name}.content has a part that is not {{"type": "text", "text": "..."}}')
    content = "".join(part["text"] for part in content)
  if not isinstance(content, str):
    raise ValueError(f"{name}.content is not a string, nor a list of text parts")
  try:
    content.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{name}.content has half of a surrogate pair at character {error.start}") from error
  return Message(value["role"], content)


def to_training(messages: Sequence[Message]) -> list[Message]:
  """The messages up to the last answer; what follows it teaches nothing. Raises `ValueError` if no assistant says anything."""
  answers = [index for index, message in enumerate(messages) if message.role == "assistant" and message.content]
  if not answers:
    raise ValueError("messages has no message of role assistant with any text, so there is nothing to learn")
  return list(messages[:answers[-1] + 1])

"""The OpenAI chat protocol: a conversation, written with the checkpoint's template, is the prompt, and a choice is a message.

Everything else is that of the completions protocol (`atma_jax.serving.protocol`): options, limits and refusals.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

from atma_jax.data.chat_template import Message, parse_messages, template_of
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError, unknown_name
from atma_jax.inference.engine import Engine
from atma_jax.serving.prompts import most_characters
from atma_jax.serving.protocol import FIELDS, Call, parse_call, read_flag, read_integer
from atma_jax.serving.refusal import ProtocolError

_ONLY_COMPLETIONS = {"prompt", "echo", "suffix", "best_of"}
CHAT_FIELDS = FIELDS - _ONLY_COMPLETIONS | {"messages", "max_completion_tokens", "top_logprobs", "response_format"}
_MOST_TOKENS = 2**31 - 1


def parse_chat(values: dict[str, Any], engine: Engine, model: str, most_choices: int, longest: int,
               admit: Callable[[int], None] | None = None) -> Call:
  """Checks a chat request; the arguments are those of `parse_call`.

  Without ``max_tokens`` or ``max_completion_tokens`` an answer may fill the context.

  Raises:
    ProtocolError: names the first wrong field and what is legal; or the checkpoint has no chat template.
  """
  for name in values:
    if name not in CHAT_FIELDS:
      raise ProtocolError(400, unknown_name("field", name[:60], CHAT_FIELDS), param=name[:60])
  messages = _messages(values, engine.tokenizer, longest)
  if values.get("response_format") not in (None, {"type": "text"}):
    raise ProtocolError(400, 'response_format: must be {"type": "text"}', param="response_format")
  limits = {name: read_integer(values, name, None, 1, _MOST_TOKENS) for name in ("max_tokens", "max_completion_tokens")}
  given = {limit for limit in limits.values() if limit is not None}
  if len(given) > 1:
    raise ProtocolError(400, "max_tokens and max_completion_tokens: must be equal, or only one of them", param="max_tokens")
  top = read_integer(values, "top_logprobs", None, 0, engine.alternatives)
  scored = read_flag(values, "logprobs")
  if top is not None and not scored:
    raise ProtocolError(400, "top_logprobs: only with logprobs=true", param="top_logprobs")
  if admit is not None:
    admit(read_integer(values, "n", 1, 1, most_choices))
  try:
    prompt = template_of(engine.tokenizer).prompt(messages, engine.tokenizer).tolist()
  except UserError as error:
    raise ProtocolError(400, str(error), param="messages") from error
  rest = {name: value for name, value in values.items() if name in FIELDS}
  rest |= {"prompt": prompt, "max_tokens": given.pop() if given else max(longest - len(prompt), 1),
           "logprobs": (top or 0) if scored else None}
  return parse_call(rest, engine, model, most_choices, longest, chat=True)


def _messages(values: dict[str, Any], tokenizer: Tokenizer, longest: int) -> list[Message]:
  """The messages of a request, of which no more are tokenised than a context could hold."""
  try:
    template = template_of(tokenizer)
  except UserError as error:
    raise ProtocolError(400, f"{error}; /v1/completions continues plain text", code="no_chat_template") from error
  sent = values.get("messages")
  if isinstance(sent, list):  # the protocol's newer name of the same role
    sent = [message | {"role": "system"} if isinstance(message, dict) and message.get("role") == "developer" else message
            for message in sent]
  try:
    messages = parse_messages(sent)
  except ValueError as error:
    raise ProtocolError(400, str(error), param="messages") from error
  length = sum(len(getattr(template, message.role)) + len(message.content) for message in messages)
  if length > (most := most_characters(tokenizer, longest)):
    raise ProtocolError(400, f"messages: {length} characters with their headers; at most {most} are read for this model's "
                        f"context of {longest} tokens", param="messages", code="context_length_exceeded")
  return messages


class ChatForm:
  """Turns the choices of a call into those of the chat protocol; one for each answer.

  Args:
    call: the request.
  """

  prefix, whole_object, part_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

  def __init__(self, call: Call):
    self._logprobs = functools.partial(_logprobs, count=call.logprobs or 0)
    self._begun: set[int] = set()

  def whole(self, choice: dict[str, Any]) -> dict[str, Any]:
    """The choice with its whole text."""
    return {"index": choice["index"], "message": {"role": "assistant", "content": choice["text"], "refusal": None},
            "logprobs": self._logprobs(choice["logprobs"]), "finish_reason": choice["finish_reason"]}

  def parts(self, choice: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream says of an addition to a choice: first the role, then text, at last why it ended."""
    parts, index = [], choice["index"]
    if index not in self._begun:
      self._begun.add(index)
      parts.append({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})
    logprobs = self._logprobs(choice["logprobs"])
    if choice["text"] or (logprobs and logprobs["content"]):
      parts.append({"index": index, "delta": {"content": choice["text"]}, "logprobs": logprobs, "finish_reason": None})
    if choice["finish_reason"]:
      parts.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]})
    return parts


def _logprobs(logprobs: dict[str, list[Any]] | None, count: int) -> dict[str, Any] | None:
  """The chat protocol's logprobs object of that of completions, with `count` likeliest tokens each."""
  if logprobs is None:
    return None

  def entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": None}

  content = []
  for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
    content.append(entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in list(top.items())[:count]]})
  return {"content": content, "refusal": None}

"""The chat protocol through the official client: conversations become the prompts of training, and answers are messages."""

from __future__ import annotations

import json

import numpy as np
import openai
import pytest

from atma_jax.data.chat_template import ChatTemplate, parse_messages
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.serving.http import CompletionServer
from tests.serving.test_server import Serving

CAPACITY = 160
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Say "},
                                                                                       {"type": "text", "text": "aé"}]}]
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_end": True}}


@pytest.fixture(scope="module")
def engine(lively):
  tokenizer = ByteTokenizer()
  tokenizer.chat_template = ChatTemplate()
  return Engine(lively(), tokenizer, rows=2, capacity=CAPACITY, chunk=32, decode_steps=4, alternatives=2)


@pytest.fixture(scope="module")
def expected(engine):
  """The greedy answer to `MESSAGES`, generated before the server starts."""
  prompt = engine.tokenizer.chat_template.prompt(parse_messages(MESSAGES), engine.tokenizer)
  [completion] = engine.generate([prompt], Sampling(max_tokens=12, temperature=0, ignore_end=True))
  return prompt, completion


@pytest.fixture(scope="module")
def serving(engine, expected):
  serving = Serving(CompletionServer(engine, "lively"))
  yield serving
  serving.close()


def ask(serving, **options):
  return serving.client.chat.completions.create(**{"model": "lively", "messages": MESSAGES} | options)


def post(serving, **values) -> tuple[int, dict]:
  status, body = serving.request("POST", "/v1/chat/completions", json.dumps(values).encode())
  return status, json.loads(body)


def test_an_answer(serving, expected):
  """Its prompt is that of the template, its text what the engine generates, and it counts tokens as completions do."""
  prompt, completion = expected
  answer = ask(serving, **GREEDY, n=2, logprobs=True, top_logprobs=2)
  assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "lively", "chatcmpl-")
  assert [choice.message.content for choice in answer.choices] == [completion.text] * 2
  assert [(choice.index, choice.message.role, choice.finish_reason) for choice in answer.choices] == [
    (0, "assistant", "length"), (1, "assistant", "length")]
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 24)
  scores = answer.choices[0].logprobs.content
  np.testing.assert_allclose([score.logprob for score in scores], completion.logprobs, atol=1e-5)
  assert all(len(score.top_logprobs) <= 2 for score in scores)


def test_a_stream(serving, expected):
  """It says the role, the same text in pieces, why it ended, and what was used."""
  chunks = list(ask(serving, **GREEDY, stream=True, stream_options={"include_usage": True}))
  assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
  deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
  assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
  assert "".join(delta.content or "" for delta in deltas) == expected[1].text
  assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
  assert chunks[-1].usage.completion_tokens == 12


def test_what_ends_an_answer(serving, expected):
  """A stop string, or the context where no limit is given."""
  text = expected[1].text
  stop = next(text[i] for i in range(1, len(text)) if text[i] not in text[:i])
  assert ask(serving, **GREEDY, stop=stop).choices[0].message.content == text.partition(stop)[0]
  full = ask(serving, temperature=0, extra_body={"ignore_end": True})
  assert (full.usage.total_tokens, full.choices[0].finish_reason) == (CAPACITY, "length")
  assert ask(serving, temperature=0, max_completion_tokens=3, extra_body={"ignore_end": True}).usage.completion_tokens == 3


@pytest.mark.parametrize(("values", "message", "param"), [
  ({"messages": []}, "messages must be a list of at least one message", "messages"),
  ({"messages": [{"role": "tool", "content": ""}]}, 'messages[0].role is "tool", not one of system, user, assistant', "messages"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content has a part that", "messages"),
  ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair", "messages"),
  ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, 'has "tool_calls"', "messages"),
  ({"messages": [{"role": "user", "content": "a" * 200}]}, "more than this model's context of 160 tokens", "max_tokens"),
  ({"messages": [{"role": "user", "content": "a" * 9999}]}, "are read for this model's context of 160", "messages"),
  ({"prompt": "a"}, "field 'prompt' does not exist", "prompt"), ({"tools": []}, "field 'tools' does not exist", "tools"),
  ({"logprobs": 1}, "logprobs=1: must be true or false", "logprobs"),
  ({"top_logprobs": 1}, "only with logprobs=true", "top_logprobs"),
  ({"max_tokens": 0}, "max_tokens=0: must be a whole number from 1", "max_tokens"), ({"n": 999}, "n=999: must be", "n"),
  ({"max_tokens": 1, "max_completion_tokens": 2}, "must be equal, or only one of them", "max_tokens"),
  ({"temperature": -1}, "temperature=-1", "temperature"),
  ({"response_format": {"type": "json_object"}}, "must be", "response_format")])
def test_refusals(serving, values, message, param):
  """One line that names the field and what is legal."""
  status, body = post(serving, **{"model": "lively", "messages": MESSAGES} | values)
  assert status == 400 and message in body["error"]["message"] and body["error"]["param"] == param
  assert "\n" not in body["error"]["message"]


def test_a_checkpoint_without_a_template(serving, engine):
  """It says in one line how to get one; plain completions go on."""
  template, engine.tokenizer.chat_template = engine.tokenizer.chat_template, None
  try:
    with pytest.raises(openai.BadRequestError, match="this checkpoint has no chat template") as error:
      ask(serving)
    assert error.value.code == "no_chat_template"
    assert serving.client.completions.create(model="lively", prompt="a", max_tokens=1).usage.completion_tokens <= 1
  finally:
    engine.tokenizer.chat_template = template

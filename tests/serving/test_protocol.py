"""The protocol without a server: every option of sampling is a field of a request, and choices are built from token outputs."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.inference.requests import TokenOutput
from atma_jax.inference.sampling import Sampling
from atma_jax.serving.protocol import FIELDS, Choice, ProtocolError, dumps, parse_call, parse_json, usage

ENGINE = types.SimpleNamespace(tokenizer=ByteTokenizer(), alternatives=2, config=types.SimpleNamespace(vocab_size=272))


def parse(**values):
  return parse_call({"prompt": "ab", **values}, ENGINE, "model", most_choices=8, longest=200)


def test_options_of_sampling_are_fields():
  """Each is read with the type of its default, and keeps that default where a request does not mention it."""
  given = {"temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 2.0, "seed": 3, "max_tokens": 9,
           "stop": "x", "ignore_end": True}
  assert given.keys() == {field.name for field in dataclasses.fields(Sampling)} < FIELDS
  [sampling] = parse(**given).samplings
  assert dataclasses.asdict(sampling) == given | {"stop": ("x",)}
  [default] = parse(max_tokens=Sampling.max_tokens, seed=0).samplings
  assert default == Sampling()
  assert parse(seed=-1).samplings[0].seed == 2**32 - 1
  assert [sampling.seed for sampling in parse(prompt=["a", "b"], n=2, seed=5).samplings] == [5, 6, 5, 6]


@pytest.mark.parametrize(("values", "message"), [
  ({"top_k": -1}, "top_k=-1: must be a whole number from 0 to 2147483647"), ({"top_k": True}, "top_k=true: must be"),
  ({"min_p": "x"}, "min_p=\"x\": must be a finite number"), ({"min_p": 2}, "min_p=2.0: must be between 0 and 1"),
  ({"ignore_end": 1}, "ignore_end=1: must be true or false"), ({"top_q": 1}, "field 'top_q' does not exist"),
  ({"max_tokens": 199}, "more than this model's context of 200 tokens"), ({"n": 9}, "n=9: must be a whole number from 1 to 8")])
def test_refusals(values, message):
  """The error names the field and what is legal."""
  with pytest.raises(ProtocolError) as error:
    parse(**values)
  assert message in str(error.value) and error.value.status == 400
  assert error.value.to_dict()["error"]["param"] == next(iter(values))


def test_bodies():
  """A body is a JSON object without numbers that JSON does not have."""
  assert parse_json(b'{"a": 1}') == {"a": 1}
  for body in (b"", b"[1]", b'{"a": NaN}', b"\xff", b"[" * 100_000):
    with pytest.raises(ProtocolError, match="JSON"):
      parse_json(body)
  assert dumps({"a": "\ud800"}) == b'{"a":"\\ud800"}'


def outputs(tokens, reason="length"):
  text = [TokenOutput(1, chr(token), token, -0.5, ((token, -0.5), (300, -np.inf), (65, -2.0))) for token in tokens]
  return [*text, TokenOutput(1, "", finish_reason=reason)]


def test_choices_add_up():
  """Log-probabilities stand beside the tokens, an echoed prompt comes first, and a token that is no text is named by its id."""
  call = parse(prompt=[97, 255], logprobs=2, echo=True, max_tokens=2)
  choice = Choice(call, 0, ENGINE.tokenizer)
  scored = TokenOutput(1, "", prompt_logprobs=((-1.0, ((98, -0.1),)),))
  first, rest = choice.add([scored]), choice.add(outputs([99, 100]))
  assert (first["text"], first["finish_reason"], rest["text"], rest["finish_reason"]) == ("", None, "a\ufffdcd", "length")
  logprobs = rest["logprobs"]
  assert logprobs["tokens"] == ["a", "token_id:255", "c", "d"] and logprobs["token_logprobs"] == [None, -1.0, -0.5, -0.5]
  top = logprobs["top_logprobs"]
  assert top == [None, {"b": -0.1, "token_id:255": -1.0}, *({t: -0.5, "token_id:300": -9999.0} for t in "cd")]
  assert logprobs["text_offset"] == [0, 1, 1, 3]
  assert usage(call, [choice]) == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_only_the_prompt():
  """With max_tokens=0 nothing is generated, whatever the engine returns."""
  call = parse(max_tokens=0, echo=True)
  choice = Choice(call, 0, ENGINE.tokenizer).add(outputs([99], "stop"))
  assert call.silent and (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("ab", "length", None)

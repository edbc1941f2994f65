"""The OpenAI completions protocol: from a JSON body to prompts and samplings, and from token outputs to choices.

Beside the protocol's own fields a body may have every field of `Sampling`, such as `top_k`. What the protocol has and this server
does not do (`suffix`, penalties, `logit_bias`, `best_of` above `n`) is refused if it is asked for, never ignored. Choice i of a
prompt is drawn with seed + i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import json
import math
import secrets
from typing import Any, NoReturn, TypeVar

from jaxtyping import Int
import numpy as np

from atma_jax.data.tokenizers import END_OF_TEXT, Tokenizer
from atma_jax.errors import UserError, unknown_name
from atma_jax.inference.engine import Engine
from atma_jax.inference.requests import Alternatives, TokenOutput, TokenScore
from atma_jax.inference.sampling import Sampling
from atma_jax.inference.text_stream import TextStream, decode_ids
from atma_jax.serving.prompts import is_text, is_token, raw_prompts, tokenise
from atma_jax.serving.refusal import ProtocolError

DEFAULT_MAX_TOKENS = 16
MOST_STOPS = 16
LONGEST_STOP = 256  # characters
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
SAMPLING_FIELDS = {field.name: field for field in dataclasses.fields(Sampling)}
_Default = TypeVar("_Default", int, None)
FIELDS = {"model", "prompt", "n", "stream", "stream_options", "logprobs", "echo", "user", "suffix", "presence_penalty",
          "frequency_penalty", "best_of", "logit_bias", *SAMPLING_FIELDS}


@dataclasses.dataclass(frozen=True)
class Call:
  """A checked request. Choice i belongs to prompt i // n.

  Attributes:
    prompts: token ids of each prompt, (T,) int32.
    samplings: one for each choice.
    n: choices for each prompt.
    echo: whether the text begins with the prompt.
    logprobs: number of likeliest tokens reported with each token; None reports no log-probabilities.
    stream: whether the answer is a stream of events.
    include_usage: whether the stream ends with the token counts.
    silent: max_tokens=0, so only the prompt is wanted.
    chat: whether choices are messages.
  """

  prompts: list[Int[np.ndarray, " T"]]
  samplings: list[Sampling]
  n: int
  echo: bool
  logprobs: int | None
  stream: bool
  include_usage: bool
  silent: bool
  chat: bool = False

  @property
  def scored(self) -> bool:
    """Whether log-probabilities of the prompt are wanted."""
    return self.echo and self.logprobs is not None


def dumps(value: Any) -> bytes:
  """Writes JSON in UTF-8. What is not text, such as half a surrogate pair in an error message, is escaped."""
  return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def parse_json(body: bytes) -> dict[str, Any]:
  """Reads a JSON object. Raises a `ProtocolError` of status 400 for anything else."""
  def constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

  try:
    values = json.loads(body.decode(), parse_constant=constant)
  except (ValueError, RecursionError) as error:
    raise ProtocolError(400, f"the body is not valid JSON: {error or type(error).__name__}") from error
  if not isinstance(values, dict):
    raise ProtocolError(400, "the body must be a JSON object")
  return values


def parse_call(values: dict[str, Any], engine: Engine, model: str, most_choices: int, longest: int,
               admit: Callable[[int], None] | None = None, chat: bool = False) -> Call:
  """Checks every field of a request, and then, one after the other, turns its prompts into tokens.

  Args:
    values: the body.
    engine: what will serve the call.
    model: the name that the model is served under.
    most_choices: legal number of choices of all prompts together.
    longest: legal number of tokens of a prompt and its text.
    admit: called with the number of choices before anything is tokenised; it raises what keeps them out.
    chat: whether choices are messages.

  Raises:
    ProtocolError: names the first wrong field and what is legal.
  """
  for name in values:
    if name not in FIELDS:
      raise ProtocolError(400, unknown_name("field", name[:60], FIELDS), param=name[:60])
  named = _typed(values, "model", str, model, "a string")
  if named != model:
    raise ProtocolError(404, f"model {named[:60]!r} does not exist; legal: {model!r}", param="model", code="model_not_found")
  _refuse_unserved(values)
  n = read_integer(values, "n", 1, 1, most_choices)
  raw = raw_prompts(values.get("prompt"))
  if len(raw) * n > most_choices:
    raise ProtocolError(400, f"{len(raw)} prompts of n={n} choices: at most {most_choices} choices at a time", param="prompt")
  echo = read_flag(values, "echo")
  logprobs = None
  if values.get("logprobs") is not None:
    logprobs = read_integer(values, "logprobs", 0, 0, engine.alternatives)
  max_tokens = read_integer(values, "max_tokens", DEFAULT_MAX_TOKENS, 0, 2**31 - 1)
  sampling = _sampling(values, max(max_tokens, 1))
  stream = read_flag(values, "stream")
  options = _typed(values, "stream_options", dict, {}, "an object")
  if options and not stream:
    raise ProtocolError(400, "stream_options: only with stream=true", param="stream_options")
  for name in options:
    if name not in ("include_usage", "include_obfuscation"):
      raise ProtocolError(400, unknown_name("stream_options field", name[:60], ("include_usage",)), param="stream_options")
  if admit is not None:
    admit(len(raw) * n)
  prompts = [_fitting(prompt, engine, sampling.max_tokens, longest) for prompt in raw]
  samplings = [own for _ in prompts for own in sampling.spread(n)]
  return Call(prompts, samplings, n, echo, logprobs, stream, read_flag(options, "include_usage"), max_tokens == 0, chat)


def _refuse_unserved(values: dict[str, Any]) -> None:
  """Refuses fields of the protocol that this server does not serve, unless they ask for nothing."""
  _typed(values, "user", str, "", "a string")
  for name, nothing in (("suffix", ("",)), ("presence_penalty", (0,)), ("frequency_penalty", (0,)), ("logit_bias", ({},)),
                        ("best_of", (1, values.get("n")))):
    value = values.get(name)
    if value is not None and value not in nothing:
      hint = "; repetition_penalty is served" if name.endswith("penalty") else ""
      raise ProtocolError(400, f"{name} is not served{hint}", param=name)


def _sampling(values: dict[str, Any], max_tokens: int) -> Sampling:
  """Reads every field of `Sampling`: three as the protocol defines them, the others as their types say."""
  stop = values.get("stop")
  stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
  if not isinstance(stop, list | tuple) or len(stop) > MOST_STOPS or not all(
      isinstance(s, str) and 0 < len(s) <= LONGEST_STOP and is_text(s) for s in stop):
    raise ProtocolError(400, f"stop: must be a string of 1 to {LONGEST_STOP} characters, or up to {MOST_STOPS} of them",
                        param="stop")
  seed = secrets.randbits(32) if values.get("seed") is None else read_integer(values, "seed", 0, -2**63, 2**63 - 1) % 2**32
  options: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "stop": tuple(stop)}
  options |= {name: _option(values, field) for name, field in SAMPLING_FIELDS.items() if name not in options}
  try:
    return Sampling(**options)
  except UserError as error:
    raise ProtocolError(400, str(error), param=str(error).partition("=")[0]) from error


def _option(values: dict[str, Any], field: dataclasses.Field[Any]) -> Any:
  """Reads one field of `Sampling`, whose type is that of its default."""
  if isinstance(field.default, bool):
    return _typed(values, field.name, bool, field.default, "true or false")
  if isinstance(field.default, int):
    return read_integer(values, field.name, field.default, field.metadata["low"], field.metadata["high"])
  assert isinstance(field.default, float), f"{field.name}: how a request spells it has to be said in _sampling"
  return _number(values, field.name, field.default)


def _fitting(prompt: str | list[Any], engine: Engine, max_tokens: int, longest: int) -> Int[np.ndarray, " T"]:
  """The tokens of a prompt that leave room for its text, (T,) int32; what cannot fit is refused before it is looked at."""
  def refuse_beyond(count: int) -> None:
    if count + max_tokens > longest:
      raise ProtocolError(400, f"max_tokens={max_tokens}: with a prompt of {count} tokens more than this model's context "
                          f"of {longest} tokens", param="max_tokens", code="context_length_exceeded")

  refuse_beyond(1 if isinstance(prompt, str) else len(prompt))
  tokens = tokenise(prompt, engine.tokenizer, engine.config.vocab_size, longest)
  refuse_beyond(len(tokens))
  return tokens


def read_flag(values: dict[str, Any], name: str) -> bool:
  """A boolean of a body, False if it is missing or null. Raises `ProtocolError` for anything else."""
  return _typed(values, name, bool, False, "true or false")


def _typed(values: dict[str, Any], name: str, kind: type, default: Any, legal: str) -> Any:
  value = values.get(name)
  if value is None:
    return default
  if not isinstance(value, kind):
    raise ProtocolError(400, f"{name}={_short(value)}: must be {legal}", param=name)
  return value


def read_integer(values: dict[str, Any], name: str, default: _Default, low: int, high: int) -> int | _Default:
  """A whole number of a body.

  Args:
    values: the body.
    name: of the field.
    default: what is returned if the field is missing or null.
    low, high: the least and the greatest legal number.

  Raises:
    ProtocolError: the field is no whole number from `low` to `high`.
  """
  value = values.get(name)
  if value is None:
    return default
  if not is_token(value) or not low <= value <= high:
    raise ProtocolError(400, f"{name}={_short(value)}: must be a whole number from {low} to {high}", param=name)
  return value


def _number(values: dict[str, Any], name: str, default: float) -> float:
  value = values.get(name)
  if value is None:
    return default
  try:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
      return float(value)
  except OverflowError:  # a whole number too large for a float
    pass
  raise ProtocolError(400, f"{name}={_short(value)}: must be a finite number", param=name)


def _short(value: Any) -> str:
  try:
    text = json.dumps(value)
  except RecursionError:
    text = "a value nested too deeply"
  return text if len(text) <= 60 else text[:57] + "..."


class TextForm:
  """Shows the choices of a call as the completions protocol does: as they are.

  Args:
    call: the request.
  """

  prefix, whole_object, part_object = "cmpl-", "text_completion", "text_completion"

  def __init__(self, call: Call):
    del call

  def whole(self, choice: dict[str, Any]) -> dict[str, Any]:
    """The choice with its whole text."""
    return choice

  def parts(self, choice: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream says of an addition to a choice, if it says anything."""
    return [choice] if choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"]) else []


class Choice:
  """One choice of an answer, built from its token outputs as they arrive.

  Args:
    call: the request.
    index: of the choice.
    tokenizer: of the model.

  Attributes:
    completion_tokens: tokens generated so far.
    finish_reason: why the choice has ended, or None.
  """

  def __init__(self, call: Call, index: int, tokenizer: Tokenizer):
    self._call, self._index, self._tokenizer = call, index, tokenizer
    self._prompt = call.prompts[index // call.n]
    self._offsets = TextStream(tokenizer)  # the whole text, regardless of stop strings
    self._offset = 0
    self._started = False
    self._scores: Iterable[TokenScore] = ()
    self.completion_tokens = 0
    self.finish_reason: str | None = None

  def add(self, outputs: Sequence[TokenOutput]) -> dict[str, Any]:
    """Takes the next outputs and returns the protocol's choice object for them alone."""
    text, logprobs = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for output in outputs:
      if output.prompt_logprobs is not None:
        self._scores = output.prompt_logprobs
      if not self._started and (output.token is not None or output.finish_reason is not None):
        self._started = True
        text += self._begin(logprobs)
      if output.token is not None and not self._call.silent:
        self.completion_tokens += 1
        self._add_token(logprobs, output.token, output.logprob, output.alternatives)
      text += "" if self._call.silent else output.text
      self.finish_reason = output.finish_reason
    if self._call.silent and self.finish_reason is not None:
      self.finish_reason = "length"
    return {"index": self._index, "text": text, "logprobs": None if self._call.logprobs is None else logprobs,
            "finish_reason": self.finish_reason}

  def _begin(self, logprobs: dict[str, list[Any]]) -> str:
    """Returns the text in front of the first token: the prompt if it is to be echoed."""
    if not self._call.echo:
      return ""
    scores: list[tuple[float | None, Alternatives]] = [(None, ()), *self._scores]
    for token, (logprob, alternatives) in zip(self._prompt.tolist(), scores):
      self._add_token(logprobs, token, logprob, alternatives)
    return decode_ids(self._tokenizer, self._prompt.tolist())

  def _add_token(self, logprobs: dict[str, list[Any]], token: int, logprob: float | None, alternatives: Alternatives) -> None:
    """Appends a token to the four lists of the protocol's logprobs object, if log-probabilities are wanted."""
    count = self._call.logprobs
    if count is None:
      return
    own, top = token_text(self._tokenizer, token), None
    if logprob is not None:
      logprob = _finite(logprob)
      top = {token_text(self._tokenizer, t): _finite(p) for t, p in alternatives[:count]}
      top.setdefault(own, logprob)
    for name, value in (("tokens", own), ("token_logprobs", logprob), ("top_logprobs", top), ("text_offset", self._offset)):
      logprobs[name].append(value)
    self._offset += len(self._offsets.push(token))


def _finite(logprob: float) -> float:
  return max(logprob, LEAST_LOGPROB) if logprob == logprob else LEAST_LOGPROB


def token_text(tokenizer: Tokenizer, token: int) -> str:
  """Returns a token as the protocol shows it: its text, or ``token_id:ID`` if it is not text by itself."""
  if token == tokenizer.eot_id:
    return END_OF_TEXT
  text = decode_ids(tokenizer, [token])
  return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"token_id:{token}"


def usage(call: Call, choices: Sequence[Choice]) -> dict[str, int]:
  """Returns the protocol's usage object: the tokens of the prompts, each counted once, and of all choices."""
  prompt, completion = sum(map(len, call.prompts)), sum(choice.completion_tokens for choice in choices)
  return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

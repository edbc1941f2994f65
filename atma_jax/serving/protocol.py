"""The OpenAI completions protocol: from a JSON body to prompts and samplings, and from pieces to choices.

Beside the protocol's own fields a body may have `top_k`, `min_p`, `repetition_penalty` and `ignore_end`, as in `Sampling`.
What the protocol has and this server does not do (`suffix`, penalties, `logit_bias`, `best_of` above `n`) is refused where it
is asked for, never ignored. Choice i of a prompt is drawn with seed + i.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import json
import math
import secrets
from typing import Any, NoReturn

import numpy as np

from atma_jax.data.tokenizers import END_OF_TEXT, Tokenizer
from atma_jax.errors import UserError, unknown_name
from atma_jax.inference.engine import Engine, Likeliest, Piece
from atma_jax.inference.sampling import Sampling
from atma_jax.inference.text import TextStream

DEFAULT_MAX_TOKENS = 16
MOST_STOPS = 16
LONGEST_STOP = 256  # characters
LEAST_LOGPROB = -9999.0  # what stands for minus infinity, which JSON has not
FIELDS = ("model", "prompt", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "logprobs", "echo", "stop",
          "seed", "user", "suffix", "presence_penalty", "frequency_penalty", "best_of", "logit_bias", "top_k", "min_p",
          "repetition_penalty", "ignore_end")


class ProtocolError(Exception):
  """A refusal: HTTP status and the fields of the protocol's error object."""

  def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code

  def to_dict(self) -> dict[str, Any]:
    """The body of the answer."""
    kinds = {429: "rate_limit_error", 404: "invalid_request_error"}
    kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _limit(default: Any, least: float, description: str) -> Any:
  return dataclasses.field(default=default, metadata={"least": least, "help": description})


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a server takes on."""

  queue: int = _limit(64, 0, "Sequences that may wait beside those that decode; more are refused with 429.")
  request_timeout_s: float = _limit(600.0, 1e-3, "Time from a request's arrival to the end of its answer, then 504.")
  body_mib: float = _limit(8.0, 1e-3, "Size of a request's body; larger ones are refused with 413.")
  grace_s: float = _limit(30.0, 0, "Time that what runs has to finish after SIGTERM.")

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), field.metadata["least"]
      if not least <= value < float("inf"):
        raise UserError(f"{field.name}={value}: must be finite and at least {least:g}")


@dataclasses.dataclass(frozen=True)
class Call:
  """A checked request; choice i belongs to prompt i // n."""

  prompts: list[np.ndarray]
  samplings: list[Sampling]  # one a choice
  n: int
  echo: bool
  logprobs: int | None
  stream: bool
  include_usage: bool
  silent: bool  # max_tokens=0: the prompt is all that is wanted

  @property
  def scored(self) -> bool:
    """Whether the prompt's own log-probabilities are wanted."""
    return self.echo and self.logprobs is not None


def dumps(value: Any) -> bytes:
  """JSON in UTF-8; what is no text (half a surrogate pair in an error message) is escaped."""
  return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def parse_json(body: bytes) -> dict[str, Any]:
  """A JSON object; anything else is refused with 400."""
  def constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

  try:
    values = json.loads(body.decode(), parse_constant=constant)
  except (ValueError, RecursionError) as error:
    raise ProtocolError(400, f"the body is not valid JSON: {error or type(error).__name__}") from error
  if not isinstance(values, dict):
    raise ProtocolError(400, "the body must be a JSON object")
  return values


def parse_call(values: dict[str, Any], engine: Engine, model: str, most_choices: int, longest: int) -> Call:
  """Checks every field.

  Args:
    values: the body.
    engine: what will serve the call.
    model: its name.
    most_choices: of all prompts together.
    longest: tokens of a prompt and its text.

  Raises:
    ProtocolError: naming the first wrong field and what is legal.
  """
  for name in values:
    if name not in FIELDS:
      raise ProtocolError(400, unknown_name("field", name[:60], FIELDS), param=name[:60])
  named = _typed(values, "model", str, model, "a string")
  if named != model:
    raise ProtocolError(404, f"model {named[:60]!r} does not exist; legal: {model!r}", param="model", code="model_not_found")
  _refuse_unserved(values)
  n = _integer(values, "n", 1, 1, most_choices)
  prompts = _prompts(values.get("prompt"), engine)
  if len(prompts) * n > most_choices:
    raise ProtocolError(400, f"{len(prompts)} prompts of n={n} choices: at most {most_choices} choices at a time", param="prompt")
  echo = _typed(values, "echo", bool, False, "true or false")
  logprobs = None
  if values.get("logprobs") is not None:
    logprobs = _integer(values, "logprobs", 0, 0, engine.alternatives)
  max_tokens = _integer(values, "max_tokens", DEFAULT_MAX_TOKENS, 0, 2**31 - 1)
  sampling = _sampling(values, max(max_tokens, 1))
  for prompt in prompts:
    if len(prompt) + sampling.max_tokens > longest:
      raise ProtocolError(400, f"max_tokens={max_tokens}: with a prompt of {len(prompt)} tokens more than this model's context "
                          f"of {longest} tokens", param="max_tokens", code="context_length_exceeded")
  stream = _typed(values, "stream", bool, False, "true or false")
  options = _typed(values, "stream_options", dict, {}, "an object")
  if options and not stream:
    raise ProtocolError(400, "stream_options: only with stream=true", param="stream_options")
  for name in options:
    if name not in ("include_usage", "include_obfuscation"):
      raise ProtocolError(400, unknown_name("stream_options field", name[:60], ("include_usage",)), param="stream_options")
  samplings = [dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**32) for _ in prompts for i in range(n)]
  return Call(prompts, samplings, n, echo, logprobs, stream, _typed(options, "include_usage", bool, False, "true or false"),
              max_tokens == 0)


def _refuse_unserved(values: dict[str, Any]) -> None:
  """Fields of the protocol that this server has no use for, unless they ask for nothing."""
  _typed(values, "user", str, "", "a string")
  for name, nothing in (("suffix", ("",)), ("presence_penalty", (0,)), ("frequency_penalty", (0,)), ("logit_bias", ({},)),
                        ("best_of", (1, values.get("n")))):
    value = values.get(name)
    if value is not None and value not in nothing:
      hint = "; repetition_penalty is served" if name.endswith("penalty") else ""
      raise ProtocolError(400, f"{name} is not served{hint}", param=name)


def _sampling(values: dict[str, Any], max_tokens: int) -> Sampling:
  stop = values.get("stop")
  stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
  if not isinstance(stop, list | tuple) or len(stop) > MOST_STOPS or not all(
      isinstance(s, str) and 0 < len(s) <= LONGEST_STOP and _is_text(s) for s in stop):
    raise ProtocolError(400, f"stop: must be a string of 1 to {LONGEST_STOP} characters, or up to {MOST_STOPS} of them",
                        param="stop")
  seed = secrets.randbits(32) if values.get("seed") is None else _integer(values, "seed", 0, -2**63, 2**63 - 1) % 2**32
  numbers = {name: _number(values, name, default) for name, default in (
    ("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0))}
  try:
    return Sampling(max_tokens=max_tokens, seed=seed, stop=tuple(stop), top_k=_integer(values, "top_k", 0, 0, 2**31 - 1),
                    ignore_end=_typed(values, "ignore_end", bool, False, "true or false"), **numbers)
  except UserError as error:
    raise ProtocolError(400, str(error), param=str(error).partition("=")[0]) from error


def _prompts(value: Any, engine: Engine) -> list[np.ndarray]:
  """Token ids of every prompt; none at all stands for the start of a document."""
  legal = "prompt: must be a string, a list of strings, a list of token ids or a list of lists of token ids"
  if value is None or isinstance(value, str):
    value = [value or ""]
  if not isinstance(value, list) or not value:
    raise ProtocolError(400, f"{legal}, and not empty", param="prompt")
  if all(map(_is_token, value)):
    value = [value]
  prompts = []
  for prompt in value:
    ids = isinstance(prompt, list) and all(map(_is_token, prompt))
    if not ids and not isinstance(prompt, str):
      raise ProtocolError(400, legal, param="prompt")
    if not ids and not _is_text(prompt):
      raise ProtocolError(400, "prompt: holds half of a surrogate pair, which is no text", param="prompt")
    if ids and not all(0 <= i < engine.config.vocab_size for i in prompt):
      raise ProtocolError(400, f"prompt: token ids must be from 0 to {engine.config.vocab_size - 1}", param="prompt")
    tokens = np.asarray(engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int32)
    prompts.append(tokens if len(tokens) else np.array([engine.tokenizer.eot_id], np.int32))
  return prompts


def _is_token(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: str) -> bool:
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _typed(values: dict[str, Any], name: str, kind: type, default: Any, legal: str) -> Any:
  value = values.get(name)
  if value is None:
    return default
  if not isinstance(value, kind):
    raise ProtocolError(400, f"{name}={_short(value)}: must be {legal}", param=name)
  return value


def _integer(values: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
  value = values.get(name)
  if value is None:
    return default
  if not _is_token(value) or not low <= value <= high:
    raise ProtocolError(400, f"{name}={_short(value)}: must be a whole number from {low} to {high}", param=name)
  return value


def _number(values: dict[str, Any], name: str, default: float) -> float:
  value = values.get(name)
  if value is None:
    return default
  try:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
      return float(value)
  except OverflowError:  # a whole number that no float holds
    pass
  raise ProtocolError(400, f"{name}={_short(value)}: must be a finite number", param=name)


def _short(value: Any) -> str:
  try:
    text = json.dumps(value)
  except RecursionError:
    text = "a value nested too deeply"
  return text if len(text) <= 60 else text[:57] + "..."


class Choice:
  """One choice of an answer: takes its pieces as they come and gives what to add to the answer."""

  def __init__(self, call: Call, index: int, tokenizer: Tokenizer):
    self._call, self._index, self._tokenizer = call, index, tokenizer
    self._prompt = call.prompts[index // call.n]
    self._offsets = TextStream(tokenizer)  # the text without regard to stop strings
    self._offset = 0
    self._started = False
    self._scores: Iterable[tuple[float, Likeliest]] = ()
    self.completion_tokens = 0
    self.finish_reason: str | None = None

  def take(self, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The choice object that these pieces, the next ones, amount to."""
    text, logprobs = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for piece in pieces:
      if piece.prompt_logprobs is not None:
        self._scores = piece.prompt_logprobs
      if not self._started and (piece.token is not None or piece.finish_reason is not None):
        self._started = True
        text += self._begin(logprobs)
      if piece.token is not None and not self._call.silent:
        self.completion_tokens += 1
        self._add(logprobs, piece.token, piece.logprob, piece.alternatives)
      text += "" if self._call.silent else piece.text
      self.finish_reason = piece.finish_reason
    if self._call.silent and self.finish_reason is not None:
      self.finish_reason = "length"
    return {"index": self._index, "text": text, "logprobs": None if self._call.logprobs is None else logprobs,
            "finish_reason": self.finish_reason}

  def _begin(self, logprobs: dict[str, list]) -> str:
    """The prompt, where it is to be part of the text."""
    if not self._call.echo:
      return ""
    scores = [(None, ()), *self._scores]
    for token, (logprob, alternatives) in zip(self._prompt.tolist(), scores):
      self._add(logprobs, token, logprob, alternatives)
    return self._tokenizer.decode(self._prompt)

  def _add(self, logprobs: dict[str, list], token: int, logprob: float | None, alternatives: Likeliest) -> None:
    count = self._call.logprobs
    if count is None:
      return
    top = None if logprob is None else {token_text(self._tokenizer, t): _finite(p) for t, p in alternatives[:count]}
    own = token_text(self._tokenizer, token)
    if top is not None:
      top.setdefault(own, _finite(logprob))
    for name, value in (("tokens", own), ("token_logprobs", None if logprob is None else _finite(logprob)),
                        ("top_logprobs", top), ("text_offset", self._offset)):
      logprobs[name].append(value)
    self._offset += len(self._offsets.push(token))


def _finite(logprob: float) -> float:
  return max(logprob, LEAST_LOGPROB) if logprob == logprob else LEAST_LOGPROB


def token_text(tokenizer: Tokenizer, token: int) -> str:
  """A token as the protocol shows it; one that is no text by itself is shown as ``token_id:ID``."""
  if token == tokenizer.eot_id:
    return END_OF_TEXT
  text = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
  return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"token_id:{token}"


def usage(call: Call, choices: Sequence[Choice]) -> dict[str, int]:
  """Tokens of the prompts, each once, and of all choices."""
  prompt, completion = sum(map(len, call.prompts)), sum(choice.completion_tokens for choice in choices)
  return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

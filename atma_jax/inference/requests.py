"""What goes into an engine and what comes out: requests on their way, their tokens, and finished completions."""

from __future__ import annotations

import dataclasses

from jaxtyping import Int
import numpy as np

from atma_jax.inference.sampling import Sampling
from atma_jax.inference.text_stream import TextStream
from atma_jax.models.cache import Cache

Alternatives = tuple[tuple[int, float], ...]  # the likeliest tokens with their log-probabilities
TokenScore = tuple[float, Alternatives]  # log-probability of a token of the prompt, and what was likeliest in its place


@dataclasses.dataclass(frozen=True)
class TokenOutput:
  """News of a request: one more token or, with a `finish_reason`, its end.

  Attributes:
    request: what `Engine.submit` returned.
    text: new text. Text and tokens advance separately, because a character may take several tokens.
    token: the new token; None in the last output.
    logprob: log-probability of the token under the model, before temperature and filters.
    alternatives: as many of the likeliest tokens as the engine was made to report.
    finish_reason: "stop" (end-of-text or a stop string), "length" or "cancelled"; None before the end.
    prompt_logprobs: for a scored request, in its first output: the scores of all tokens of the prompt except the first.
  """

  request: int
  text: str
  token: int | None = None
  logprob: float | None = None
  alternatives: Alternatives = ()
  finish_reason: str | None = None
  prompt_logprobs: tuple[TokenScore, ...] | None = None


@dataclasses.dataclass
class Completion:
  """Everything that an engine generated for one prompt.

  Attributes:
    prompt_tokens: number of tokens of the prompt.
    text: without end-of-text and without the stop string that ended it.
    tokens: with the end-of-text that ended them, if any.
    logprobs: of each token, before temperature and filters.
    alternatives: for each token, the likeliest tokens.
    finish_reason: "stop", "length" or "cancelled".
  """

  prompt_tokens: int
  text: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  alternatives: list[Alternatives] = dataclasses.field(default_factory=list)
  finish_reason: str | None = None

  def add(self, output: TokenOutput) -> None:
    """Appends the next output of the request."""
    self.text += output.text
    if output.token is not None and output.logprob is not None:
      self.tokens.append(output.token)
      self.logprobs.append(output.logprob)
      self.alternatives.append(output.alternatives)
    self.finish_reason = output.finish_reason


@dataclasses.dataclass(eq=False)
class Request:
  """A request inside the engine.

  Attributes:
    name: what `Engine.submit` returned.
    prompt: (T,) int32.
    sampling: its options.
    text: its text so far.
    scored: whether log-probabilities of the prompt are wanted.
    received: tokens of the text that the host has seen.
    started: tokens that the device has been told to decode; the text may end before.
    cache: its state while the prompt is being prefilled.
    position: tokens of the prompt in that cache.
    pages: (N,) int32, the pages it holds, if the engine has pages.
    scores: of the prompt, as far as it is prefilled.
  """

  name: int
  prompt: Int[np.ndarray, " T"]
  sampling: Sampling
  text: TextStream
  scored: bool
  received: int = 0
  started: int = 0
  cache: Cache | None = None
  position: int = 0
  pages: Int[np.ndarray, " N"] | None = None
  scores: list[TokenScore] = dataclasses.field(default_factory=list)

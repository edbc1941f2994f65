"""Decodes many requests together: rows of one cache that are filled, stepped and freed independently.

A prompt is prefilled by itself in chunks whose lengths are powers of two, and its state then put into a free row. All
rows decode `stride` tokens in one program on the device, with donated buffers and no word from the host in between.
Shapes never depend on a request, so a program is compiled once: one for decoding and one for each chunk length.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from atma_jax.config import ModelConfig, UserError
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.inference.sampling import Knobs, Sampling, sample
from atma_jax.inference.text import TextStream
from atma_jax.models import Atma
from atma_jax.models.cache import Cache

SMALLEST_CHUNK = 16


class Rows(NamedTuple):
  """What decoding changes, on the device; B rows."""

  cache: Cache
  token: jax.Array  # (B,) int32 the last token, not yet in the cache
  remaining: jax.Array  # (B,) int32 tokens that may still come; 0 is a row at rest
  drawn: jax.Array  # (B,) int32 tokens drawn so far
  seen: jax.Array  # (B, V) bool tokens of the prompt and the text
  ends: jax.Array  # (B,) bool end-of-text ends the row
  knobs: Knobs


class Drawn(NamedTuple):
  """What a decoding program gives the host, `stride` steps of B rows; of a row only its first `count` steps count."""

  tokens: jax.Array  # (stride, B) int32
  logprobs: jax.Array  # (stride, B) float32
  top_tokens: jax.Array  # (stride, B, alternatives) int32
  top_logprobs: jax.Array  # (stride, B, alternatives) float32
  counts: jax.Array  # (B,) int32


@dataclasses.dataclass(frozen=True)
class Piece:
  """News of a request: one more token, or, with a `finish_reason`, its end.

  Attributes:
    request: what `Engine.submit` returned.
    text: new text; text and tokens advance on their own, since a character may need several tokens.
    token: the new token, None in the last piece.
    logprob: its log-probability under the model, before temperature and filters.
    alternatives: the likeliest tokens and their log-probabilities, as many as the engine was made for.
    finish_reason: "stop" (end-of-text or a stop string), "length" or "cancelled".
  """

  request: int
  text: str
  token: int | None = None
  logprob: float | None = None
  alternatives: tuple[tuple[int, float], ...] = ()
  finish_reason: str | None = None


@dataclasses.dataclass
class Completion:
  """The whole of what came of a prompt."""

  prompt_tokens: int
  text: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  alternatives: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)
  finish_reason: str | None = None


@dataclasses.dataclass(eq=False)
class _Request:
  name: int
  prompt: np.ndarray
  sampling: Sampling
  text: TextStream
  count: int = 0


class Engine:
  """Continuous batching over a fixed number of rows.

  Args:
    model: an `Atma`.
    tokenizer: of the model; its end-of-text ends a text, and ids beyond its vocabulary never come.
    rows: requests decoded at once.
    capacity: most tokens of a request, prompt and text together. A model with a window takes any length at one size.
    chunk: prompt tokens in one forward pass at most, a power of two.
    stride: tokens decoded between two looks of the host: more is faster, fewer stops and streams sooner.
    alternatives: likeliest tokens reported with every token.
    prefixes: prompts whose state is kept, the latest used, so that a prompt that goes on from one starts there.
    cache_dtype: of keys and values; None is the model's activation dtype.
  """

  def __init__(self, model: Atma, tokenizer: Tokenizer, *, rows: int = 8, capacity: int = 2048, chunk: int = 512,
               stride: int = 8, alternatives: int = 0, prefixes: int = 0, cache_dtype: str | None = None):
    if chunk < SMALLEST_CHUNK or chunk & (chunk - 1):
      raise UserError(f"chunk={chunk}: must be a power of two of at least {SMALLEST_CHUNK}")
    for name, value, least in (("rows", rows, 1), ("capacity", capacity, 2), ("stride", stride, 1)):
      if value < least:
        raise UserError(f"{name}={value}: must be at least {least}")
    self.tokenizer, self.capacity, self.chunk, self.stride = tokenizer, capacity, chunk, stride
    self.config: ModelConfig = model.config
    self._graphdef, self._state = nnx.split(model)
    self._create = functools.partial(Cache.create, self.config, capacity=capacity, dtype=cache_dtype)
    self._compile(alternatives)
    self._prefixes, self._kept = prefixes, OrderedDict[bytes, Cache]()  # by the bytes of their int32 tokens
    self.prefilled = 0  # prompt tokens that went through the model
    self._names, self._waiting = 0, deque[_Request]()
    self._active: list[_Request | None] = [None] * rows
    self._rows = Rows(self._create(rows), *(jnp.zeros(rows, jnp.int32) for _ in range(3)),
                      jnp.zeros((rows, self.config.vocab_size), bool), jnp.zeros(rows, bool),
                      Knobs.of(*[Sampling()] * rows))

  def submit(self, prompt: str | Sequence[int], sampling: Sampling) -> int:
    """Queues a request and returns its name; an empty prompt stands for the start of a document.

    Raises:
      UserError: prompt and text would not fit, or the prompt holds ids that the model has not.
    """
    tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = np.asarray(tokens, np.int32) if len(tokens) else np.array([self.tokenizer.eot_id], np.int32)
    if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
      raise UserError(f"prompt: token ids must be from 0 to {self.config.vocab_size - 1}")
    if len(tokens) + sampling.max_tokens > self.capacity and self.config.window is None:
      raise UserError(f"max_tokens={sampling.max_tokens}: with a prompt of {len(tokens)} tokens more than the "
                      f"{self.capacity} that fit; legal: at most {self.capacity - len(tokens)}")
    self._names += 1
    self._waiting.append(_Request(self._names, tokens, sampling, TextStream(self.tokenizer, sampling.stop)))
    return self._names

  def cancel(self, request: int) -> Piece | None:
    """Ends a request now and frees its row; None where it has already ended."""
    for waiting in self._waiting:
      if waiting.name == request:
        self._waiting.remove(waiting)
        return Piece(request, "", finish_reason="cancelled")
    for row, active in enumerate(self._active):
      if active is not None and active.name == request:
        return self._finish(row, "cancelled")
    return None

  @property
  def busy(self) -> bool:
    """Whether any request waits or decodes."""
    return bool(self._waiting) or any(self._active)

  def step(self) -> list[Piece]:
    """Fills free rows from the queue, decodes up to `stride` tokens of every row and returns what is new."""
    for row in range(len(self._active)):
      if self._active[row] is None and self._waiting:
        self._admit(row, self._waiting.popleft())
    if not any(self._active):
      return []
    self._rows, drawn = self._decode(self._state, self._rows)
    drawn = jax.device_get(drawn)
    pieces = []
    for row in range(len(self._active)):
      pieces += self._collect(row, drawn)
    return pieces

  def stream(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> Iterator[Piece]:
    """Pieces of all prompts as they come, `Piece.request` being the index of the prompt. The engine is used alone."""
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    index = {self.submit(prompt, own): i for i, (prompt, own) in enumerate(zip(prompts, samplings, strict=True))}
    try:
      while self.busy:
        for piece in self.step():
          if piece.request in index:
            yield dataclasses.replace(piece, request=index[piece.request])
    finally:
      for name in index:
        self.cancel(name)

  def generate(self, prompts: Sequence[str | Sequence[int]],
               sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
    """The completions of all prompts, in order."""
    lengths = [len(self.tokenizer.encode(p)) if isinstance(p, str) else len(p) for p in prompts]
    completions = [Completion(length) for length in lengths]
    for piece in self.stream(prompts, sampling):
      completion = completions[piece.request]
      completion.text += piece.text
      if piece.token is not None:
        completion.tokens.append(piece.token)
        completion.logprobs.append(piece.logprob)
        completion.alternatives.append(piece.alternatives)
      completion.finish_reason = piece.finish_reason
    return completions

  def prefill(self, tokens: np.ndarray) -> Cache:
    """The state of one row after these tokens (n,), n of any size, from the longest prefix that is kept."""
    tokens = np.asarray(tokens, np.int32)
    content = tokens.tobytes()
    prefix = max((key for key in self._kept if content.startswith(key)), key=len, default=b"")
    position = len(prefix) // tokens.itemsize
    if position:
      self._kept.move_to_end(prefix)
      cache = jax.tree.map(jnp.copy, self._kept[prefix])  # what is kept must survive donation
    else:
      cache = self._create(1)
    self.prefilled += len(tokens) - position
    while position < len(tokens):
      part = tokens[position : position + self.chunk]
      width = max(SMALLEST_CHUNK, 1 << (len(part) - 1).bit_length())
      padded = np.zeros((1, width), np.int32)
      padded[0, : len(part)] = part
      cache = self._prefill(self._state, cache, padded, np.array([len(part)], np.int32))
      position += len(part)
    if self._prefixes and content and content not in self._kept:
      self._kept[content] = jax.tree.map(jnp.copy, cache)
      while len(self._kept) > self._prefixes:
        self._kept.popitem(last=False)
    return cache

  def _admit(self, row: int, request: _Request) -> None:
    prompt, sampling = request.prompt, request.sampling
    seen = np.zeros(self.config.vocab_size, bool)
    seen[prompt] = True
    self._rows = self._place(self._rows, np.int32(row), self.prefill(prompt[:-1]), prompt[-1],
                             np.int32(sampling.max_tokens), seen, np.bool_(not sampling.ignore_end), Knobs.of(sampling))
    self._active[row] = request

  def _collect(self, row: int, drawn: Drawn) -> list[Piece]:
    request, pieces = self._active[row], []
    if request is None:
      return pieces
    for step in range(drawn.counts[row]):
      token = int(drawn.tokens[step, row])
      request.count += 1
      ended = token == self.tokenizer.eot_id and not request.sampling.ignore_end
      text = "" if ended else request.text.push(token)
      likeliest = tuple(zip(drawn.top_tokens[step, row].tolist(), drawn.top_logprobs[step, row].tolist()))
      pieces.append(Piece(request.name, text, token, float(drawn.logprobs[step, row]), likeliest))
      if ended or request.text.stopped:
        return [*pieces, self._finish(row, "stop")]
    if request.count == request.sampling.max_tokens:
      pieces.append(self._finish(row, "length"))
    return pieces

  def _finish(self, row: int, reason: str) -> Piece:
    request, self._active[row] = self._active[row], None
    self._rows = self._rows._replace(remaining=self._rest(self._rows.remaining, np.int32(row)))
    text = request.text.finish()
    stopped = request.text.stopped and reason == "length"  # by text that was held back to the end
    return Piece(request.name, text, finish_reason="stop" if stopped else reason)

  def _compile(self, alternatives: int) -> None:
    graphdef, stride, config = self._graphdef, self.stride, self.config
    eot, legal = self.tokenizer.eot_id, np.arange(config.vocab_size) < self.tokenizer.vocab_size

    @functools.partial(jax.jit, donate_argnums=1)
    def prefill(state: Any, cache: Cache, tokens: jax.Array, counts: jax.Array) -> Cache:
      return nnx.merge(graphdef, state).extend(tokens, cache, counts)[1]

    @functools.partial(jax.jit, donate_argnums=0)
    def place(rows: Rows, row: jax.Array, cache: Cache, *values: Any) -> Rows:
      token, remaining, seen, ends, knobs = values

      def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[row].set(new)

      return Rows(rows.cache.put(row[None], cache), put(rows.token, token), put(rows.remaining, remaining),
                  put(rows.drawn, 0), put(rows.seen, seen), put(rows.ends, ends),
                  jax.tree.map(lambda old, new: put(old, new[0]), rows.knobs, knobs))

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(state: Any, rows: Rows) -> tuple[Rows, Drawn]:
      model = nnx.merge(graphdef, state)
      B = rows.token.shape[0]
      drawn = Drawn(jnp.zeros((stride, B), jnp.int32), jnp.zeros((stride, B), jnp.float32),
                    jnp.zeros((stride, B, alternatives), jnp.int32), jnp.zeros((stride, B, alternatives), jnp.float32),
                    jnp.zeros(B, jnp.int32))

      def step(carry: tuple[jax.Array, Rows, Drawn]) -> tuple[jax.Array, Rows, Drawn]:
        i, rows, drawn = carry
        active = rows.remaining > 0
        hidden, cache = model.extend(rows.token[:, None], rows.cache, active.astype(jnp.int32))
        logits = model.head(hidden)[:, 0].astype(jnp.float32)
        token = sample(jnp.where(legal, logits, -jnp.inf), rows.knobs, rows.seen, rows.drawn)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        top = jax.lax.top_k(logprobs, alternatives) if alternatives else (drawn.top_logprobs[i], drawn.top_tokens[i])
        ended = rows.ends & (token == eot)
        remaining = jnp.where(active, jnp.where(ended, 0, rows.remaining - 1), 0)
        rows = Rows(cache, jnp.where(active, token, rows.token), remaining, rows.drawn + active,
                    rows.seen.at[jnp.arange(B), token].max(active), rows.ends, rows.knobs)
        own = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
        new = (token, own, top[1], top[0])
        drawn = Drawn(*(old.at[i].set(value) for old, value in zip(drawn, new)), drawn.counts + active)
        return i + 1, rows, drawn

      def go_on(carry: tuple[jax.Array, Rows, Drawn]) -> jax.Array:
        return (carry[0] < stride) & jnp.any(carry[1].remaining > 0)

      _, rows, drawn = jax.lax.while_loop(go_on, step, (jnp.int32(0), rows, drawn))
      return rows, drawn

    self._prefill, self._place, self._decode = prefill, place, decode
    self._rest = jax.jit(lambda remaining, row: remaining.at[row].set(0))

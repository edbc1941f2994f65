"""Decodes many requests together: rows of one cache that are filled, stepped and freed independently.

A prompt is prefilled by itself in passes whose lengths are powers of two, between the strides of the rows that decode,
and its state then put into a free row. All rows decode `stride` tokens in one program on the device, with donated
buffers and no word from the host in between; it reads keys and values up to the smallest of a few fixed reaches that the
longest row keeps within, or, with a kernel, up to every row's own length. The device decodes a stride while the host
looks at the one before. Keys and values may lie in pages that the rows share. Shapes never depend on a request:
`Engine.warm_up` compiles every program there is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import itertools
import math
import os

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.inference.footprint import Pages, check_page
from atma_jax.inference.programs import Drawn, cast, empty_rows, programs, rows_sharding
from atma_jax.inference.sampling import Knobs, Sampling, narrows
from atma_jax.inference.saved_state import load_state, save_state
from atma_jax.inference.text import TextStream
from atma_jax.models import Atma
from atma_jax.models.cache import PAGE_LIMIT, Cache
from atma_jax.ops.core import dispatch
from atma_jax.ops.polar_attention.cached.api import BLOCK, slots_for
from atma_jax.sharding import LOGICAL_AXES

SMALLEST_CHUNK = 16
Likeliest = tuple[tuple[int, float], ...]  # tokens and their log-probabilities


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
    prompt_logprobs: in the first piece of a scored request, log-probability and likeliest tokens at each of the
      prompt's tokens but the first.
  """

  request: int
  text: str
  token: int | None = None
  logprob: float | None = None
  alternatives: Likeliest = ()
  finish_reason: str | None = None
  prompt_logprobs: tuple[tuple[float, Likeliest], ...] | None = None


@dataclasses.dataclass
class Completion:
  """The whole of what came of a prompt."""

  prompt_tokens: int
  text: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  alternatives: list[Likeliest] = dataclasses.field(default_factory=list)
  finish_reason: str | None = None


@dataclasses.dataclass(eq=False)
class _Request:
  name: int
  prompt: np.ndarray
  sampling: Sampling
  text: TextStream
  scored: bool
  count: int = 0  # tokens of the text that the host has seen
  started: int = 0  # that the device has been told to decode, or more
  cache: Cache | None = None  # while its prompt is on its way
  pages: np.ndarray | None = None  # that it holds, from then on
  position: int = 0  # prompt tokens in the cache
  scores: list[tuple[float, Likeliest]] = dataclasses.field(default_factory=list)


class Engine:
  """Continuous batching over a fixed number of rows.

  Args:
    model: an `Atma`.
    tokenizer: of the model; its end-of-text ends a text, and ids beyond its vocabulary never come.
    rows: requests decoded at once.
    capacity: most tokens of a request, prompt and text together. A model with a window takes any length at one size.
    chunk: prompt tokens in one forward pass at most, a power of two. While rows decode, prompts get as many tokens
      between two strides for every free row.
    first_chunk: the same for a pass over an empty cache, which the ops of the full forward pass serve: larger is faster
      for long prompts and takes more memory. None is `chunk`.
    stride: tokens decoded between two looks of the host: more is faster, fewer stops and streams sooner.
    alternatives: likeliest tokens reported with every token.
    prefixes: prompts whose state is kept, the latest used, so that a prompt that goes on from one starts there.
    cache_dtype: of keys and values, one of `cache.CACHE_DTYPES`; None is the model's activation dtype.
    reaches: decoding programs at most, each for twice the cached tokens of the one before it; one where decoding reads every
      row up to its own length.
    prompt_logprobs: whether `submit` takes scored requests.
    pages: of keys and values, which all rows share: a request holds those it needs at most and waits where too few are free.
      None gives every row room for `capacity`.
    page: tokens of a page, a power of two.

  The model's mesh, if it has more than one device, splits the rows over its ``data`` and ``fsdp`` axes.
  """

  def __init__(self, model: Atma, tokenizer: Tokenizer, *, rows: int = 8, capacity: int = 2048, chunk: int = 512,
               first_chunk: int | None = None, stride: int = 8, alternatives: int = 0, prefixes: int = 0,
               cache_dtype: str | None = None, reaches: int = 8, prompt_logprobs: bool = False,
               pages: int | None = None, page: int = PAGE_LIMIT):
    first_chunk = chunk if first_chunk is None else first_chunk
    for name, value, least in (("chunk", chunk, SMALLEST_CHUNK), ("first_chunk", first_chunk, chunk)):
      if value < least or value & (value - 1):
        raise UserError(f"{name}={value}: must be a power of two of at least {least}")
    mesh = _mesh_of(model)
    one = mesh is None or mesh.size == 1
    parts = math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"]) if mesh is not None else 1
    for name, value, least in (("rows", rows, 1), ("capacity", capacity, 2), ("stride", stride, 1), ("reaches", reaches, 1),
                               ("prefixes", prefixes, 0), ("alternatives", alternatives, 0)):
      if value < least:
        raise UserError(f"{name}={value}: must be at least {least}")
    if pages is None:
      page = 1  # no rounding
    elif not one:
      raise UserError(f"pages={pages}: pages are of one device, and the model is spread over {mesh.size}")
    else:
      check_page(page)
    if rows % parts:
      raise UserError(f"rows={rows}: must be a multiple of the {parts} parts that the devices split them into")
    self.tokenizer, self.capacity, self.chunk, self.stride = tokenizer, capacity, chunk, stride
    self.first_chunk, self.alternatives, self.scores_prompts = first_chunk, alternatives, prompt_logprobs
    self.config: ModelConfig = model.config
    self._mesh, self._cache_dtype = mesh, cache_dtype
    self._asks_host = dispatch.platform() == "gpu"  # where a program that branches waits for the host
    self._create = functools.partial(Cache.create, self.config, capacity=capacity, dtype=cache_dtype, page=page)
    self._prefixes, self._kept = prefixes, OrderedDict[bytes, Cache]()  # by the bytes of their int32 tokens
    self.prefilled = 0  # prompt tokens that went through the model
    self._names, self._waiting = 0, deque[_Request]()
    self._filling: dict[int, _Request] = {}  # by the row that waits for it
    self._pending: tuple[list[_Request | None], Drawn] | None = None  # the stride that the host has not looked at
    self._active: list[_Request | None] = [None] * rows
    rows_of = functools.partial(empty_rows, functools.partial(self._create, pages=pages), rows, self.config.vocab_size)
    row = jax.eval_shape(lambda: self._create(1)).keys
    slots = 0 if row is None else row.shape[-2]
    self._slots, self.pages = slots, None
    if pages is not None and slots:
      self.pages = Pages(pages, page, slots // page)
      if pages < self.pages.row:
        raise UserError(f"pages={pages}: must be at least {self.pages.row}, which a request of {capacity} tokens needs")
    cache = jax.eval_shape(rows_of).cache
    with self._on_mesh():
      in_turn = model.decodes_in_turn(cache)
      reaches = 1 if model.skips_unused_slots(cache) else reaches
    self.reaches = sorted({slots_for(max(slots >> i, min(BLOCK, slots))) for i in range(reaches)}) if slots else [0]
    self._graphdef, self._state = nnx.split(model.apart(join=one) if in_turn else model)
    self._state = cast(self._state, self.config)
    shardings = None if mesh is None else rows_sharding(mesh, jax.eval_shape(rows_of))
    (self._prefill, self._score, self._place, self._decode, self._rest, self._copy, self._new) = programs(
      self._graphdef, self.config, tokenizer, self._create, stride=stride, alternatives=alternatives, mesh=mesh,
      shardings=shardings)
    with self._on_mesh():
      self._rows = jax.jit(rows_of, out_shardings=shardings)()

  @property
  def rows(self) -> int:
    """Requests decoded at once."""
    return len(self._active)

  @property
  def counts(self) -> dict[str, int]:
    """Requests that wait, that are prefilled and that decode, by those names."""
    return {"waiting": len(self._waiting), "prefilling": len(self._filling), "decoding": sum(map(bool, self._active))}

  def check(self, prompt: str | Sequence[int], sampling: Sampling) -> np.ndarray:
    """The prompt's tokens (n,), of which there is at least one.

    Raises:
      UserError: prompt and text would not fit, or the prompt holds ids that the model has not.
    """
    tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = np.asarray(tokens, np.int64) if len(tokens) else np.array([self.tokenizer.eot_id])
    if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
      raise UserError(f"prompt: token ids must be from 0 to {self.config.vocab_size - 1}")
    if len(tokens) + sampling.max_tokens > self.capacity and self.config.window is None:
      raise UserError(f"max_tokens={sampling.max_tokens}: with a prompt of {len(tokens)} tokens more than the "
                      f"{self.capacity} that fit; legal: at most {max(self.capacity - len(tokens), 0)}")
    return tokens.astype(np.int32)

  def submit(self, prompt: str | Sequence[int], sampling: Sampling, *, scored: bool = False) -> int:
    """Queues a request and returns its name; an empty prompt stands for the start of a document.

    Args:
      prompt: text or token ids.
      sampling: how it goes on.
      scored: whether to report `Piece.prompt_logprobs`; the engine must have been made for it.

    Raises:
      UserError: as `check` says.
    """
    if scored and not self.scores_prompts:
      raise ValueError("a scored request needs Engine(prompt_logprobs=True)")
    tokens = self.check(prompt, sampling)
    self._names += 1
    self._waiting.append(_Request(self._names, tokens, sampling, TextStream(self.tokenizer, sampling.stop), scored))
    return self._names

  def warm_up(self) -> None:
    """Compiles every program that serving may need, so that none is compiled later. The engine must be idle."""
    if self.busy:
      raise ValueError("warm_up: requests are running")
    kept, self._kept, prefilled = self._kept, OrderedDict(), self.prefilled
    for width, first in [*((w, False) for w in _widths(SMALLEST_CHUNK, self.chunk)),
                         *((w, True) for w in _widths(2 * self.chunk, self.first_chunk))]:
      cache = self._pass(self._new(), np.zeros(1, np.int32), width, first)
    if self.scores_prompts:
      cache = self._score_pass(self._new(), np.zeros(2, np.int32))[0]
    self._kept, self.prefilled = kept, prefilled
    self._put(0, self._copy(cache), self.pages and self.pages.take(0), np.zeros(1, np.int32), Sampling(), 0)
    for reach, narrow in itertools.product(self.reaches, (False, True) if self._asks_host else (None,)):
      with self._on_mesh():
        self._rows, drawn = self._decode(self._state, self._rows, reach=reach, narrow=narrow)
    jax.device_get(drawn)
    self._stop_row(0)

  def cancel(self, request: int) -> Piece | None:
    """Ends a request now and frees its row; None where it has already ended."""
    for waiting in self._waiting:
      if waiting.name == request:
        self._waiting.remove(waiting)
        return Piece(request, "", finish_reason="cancelled")
    for row, filling in self._filling.items():
      if filling.name == request:
        del self._filling[row]
        self._free_pages(filling)
        return Piece(request, "", finish_reason="cancelled")
    for row, active in enumerate(self._active):
      if active is not None and active.name == request:
        return self._finish(row, "cancelled")
    return None

  @property
  def busy(self) -> bool:
    """Whether any request waits, is prefilled or decodes."""
    return bool(self._waiting) or bool(self._filling) or any(self._active)

  def step(self) -> list[Piece]:
    """Prefills for free rows, starts decoding `stride` tokens of every row and returns what the stride before has given."""
    pieces, before = self._fill(), self._pending
    self._pending = None
    if any(self._active):
      with self._on_mesh():
        self._rows, drawn = self._decode(self._state, self._rows, reach=self._reach(), narrow=self._narrow())
      self._pending = list(self._active), drawn
      for request in filter(None, self._active):
        request.started += self.stride
    if before is not None:
      requests, drawn = before
      drawn = Drawn(*(x.tolist() for x in jax.device_get(drawn)))
      for row, request in enumerate(requests):
        if request is not None and request is self._active[row]:  # or it has ended since
          pieces += self._collect(row, request, drawn)
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
    cache, position = self._start(tokens)
    while position < len(tokens):
      cache, position = self._advance(tokens, cache, position)
    self.keep(tokens, cache)
    return cache

  def keep(self, tokens: np.ndarray, cache: Cache) -> None:
    """Keeps a copy of the state of one row after these tokens, for prompts that go on from them."""
    content = np.asarray(tokens, np.int32).tobytes()
    if self._prefixes and content and content not in self._kept:
      self._kept[content] = self._copy(cache)
      while len(self._kept) > self._prefixes:
        self._kept.popitem(last=False)

  def save(self, path: str | os.PathLike, prompt: str | Sequence[int]) -> None:
    """Writes the state after a prompt to a file that `load` of any engine of this model and cache dtype takes."""
    tokens = self.check(prompt, Sampling(max_tokens=1))
    save_state(path, tokens, self.prefill(tokens), self.config)

  def load(self, path: str | os.PathLike) -> np.ndarray:
    """Keeps the state in a file, for prompts that go on from its tokens (n,), which are returned."""
    if not self._prefixes:
      raise UserError("prefixes=0: must be at least 1 to keep a loaded state")
    tokens, cache = load_state(path, self.config, self.capacity, self._cache_dtype)
    self.keep(tokens, cache if self._mesh is None else jax.device_put(cache, NamedSharding(self._mesh, PartitionSpec())))
    return tokens

  def _start(self, tokens: np.ndarray) -> tuple[Cache, int]:
    """A state to go on from, and how many of the tokens it has seen."""
    content = tokens.tobytes()
    prefix = max((key for key in self._kept if content.startswith(key)), key=len, default=b"")
    if not prefix:
      return self._new(), 0
    self._kept.move_to_end(prefix)
    return self._copy(self._kept[prefix]), len(prefix) // tokens.itemsize  # what is kept must survive donation

  def _advance(self, tokens: np.ndarray, cache: Cache, position: int) -> tuple[Cache, int]:
    """One forward pass further."""
    first = position == 0 and len(tokens) > self.chunk and self.first_chunk > self.chunk
    part = tokens[position : position + (self.first_chunk if first else self.chunk)]
    width = max(SMALLEST_CHUNK, 1 << (len(part) - 1).bit_length())
    return self._pass(cache, part, width, first), position + len(part)

  def _pass(self, cache: Cache, part: np.ndarray, width: int, first: bool) -> Cache:
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(part)] = part
    self.prefilled += len(part)
    with self._on_mesh():
      return self._prefill(self._state, cache, padded, np.array([len(part)], np.int32), reach=0 if first else None)

  def _score_pass(self, cache: Cache, part: np.ndarray) -> tuple[Cache, list[tuple[float, Likeliest]]]:
    """All but the last of these tokens, and what the model gives for all but the first."""
    padded, count = np.zeros((2, 1, self.chunk), np.int32), len(part) - 1
    padded[:, 0, :count] = part[:-1], part[1:]
    self.prefilled += count
    with self._on_mesh():
      cache, scores = self._score(self._state, cache, *padded, np.array([count], np.int32))
    own, top_logprobs, top_tokens = (x[:count].tolist() for x in jax.device_get(scores))
    return cache, [(own[i], tuple(zip(top_tokens[i], top_logprobs[i]))) for i in range(count)]

  def _fill(self) -> list[Piece]:
    """Gives free rows to waiting requests and takes their prompts further, by `chunk` tokens a free row."""
    free = [row for row, request in enumerate(self._active) if request is None]
    budget, pieces = self.chunk * len(free), []
    for row in free:
      if row not in self._filling and self._waiting and budget > 0 and self._take_pages(self._waiting[0]):
        self._filling[row] = self._waiting.popleft()
      while row in self._filling and budget > 0:
        before = self.prefilled
        pieces += self._take_further(row, self._filling[row])
        budget -= max(self.prefilled - before, 1)
    return pieces

  def _take_further(self, row: int, request: _Request) -> list[Piece]:
    """One pass of a request's prompt; once all of it has been seen, the request decodes in `row`."""
    tokens = request.prompt[:-1]
    if request.cache is None:
      request.cache, request.position = (self._new(), 0) if request.scored else self._start(tokens)
    if request.position < len(tokens):
      if request.scored:
        part = request.prompt[request.position : request.position + self.chunk + 1]
        request.cache, scores = self._score_pass(request.cache, part)
        request.scores += scores
        request.position += len(part) - 1
      else:
        request.cache, request.position = self._advance(tokens, request.cache, request.position)
    if request.position < len(tokens):
      return []
    self.keep(tokens, request.cache)
    cache, request.cache = request.cache, None
    self._put(row, cache, request.pages, request.prompt, request.sampling, request.sampling.max_tokens)
    del self._filling[row]
    self._active[row] = request
    return [Piece(request.name, "", prompt_logprobs=tuple(request.scores))] if request.scored else []

  def _take_pages(self, request: _Request) -> bool:
    """Whether a request has the pages it will need; the last of its tokens is never cached."""
    if self.pages is not None:
      request.pages = self.pages.take(self.pages.needed(len(request.prompt) + request.sampling.max_tokens - 1))
    return self.pages is None or request.pages is not None

  def _free_pages(self, request: _Request) -> None:
    if request.pages is not None:
      self.pages.give_back(request.pages)
      request.pages = None

  def _put(self, row: int, cache: Cache, pages: np.ndarray | None, prompt: np.ndarray, sampling: Sampling,
           remaining: int) -> None:
    seen = np.zeros(self.config.vocab_size, bool)
    seen[prompt] = True
    own = None if pages is None else pages[None]
    with self._on_mesh():
      self._rows = self._place(self._rows, np.int32(row), cache, own, prompt[-1], np.int32(remaining), seen,
                               np.bool_(not sampling.ignore_end), Knobs.of(sampling))

  def _reach(self) -> int:
    """The smallest reach that every active row keeps within for a stride."""
    longest = max(len(request.prompt) + min(request.started, request.sampling.max_tokens)
                  for request in self._active if request) + self.stride
    return next((reach for reach in self.reaches if longest <= reach), self._slots)

  def _narrow(self) -> bool | None:
    """Whether an active row's sampling narrows, where the program cannot look for itself."""
    return any(narrows(request.sampling) for request in self._active if request) if self._asks_host else None

  def _stop_row(self, row: int) -> None:
    with self._on_mesh():
      self._rows = self._rows._replace(remaining=self._rest(self._rows.remaining, np.int32(row)))

  def _on_mesh(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

  def _collect(self, row: int, request: _Request, drawn: Drawn) -> list[Piece]:
    """The news of a row; the arrays of `drawn` as lists."""
    pieces = []
    for step in range(drawn.counts[row]):
      token = drawn.tokens[step][row]
      request.count += 1
      ended = token == self.tokenizer.eot_id and not request.sampling.ignore_end
      text = "" if ended else request.text.push(token)
      likeliest = tuple(zip(drawn.top_tokens[step][row], drawn.top_logprobs[step][row]))
      pieces.append(Piece(request.name, text, token, drawn.logprobs[step][row], likeliest))
      if ended or request.text.stopped:
        return [*pieces, self._finish(row, "stop")]
    if request.count == request.sampling.max_tokens:
      pieces.append(self._finish(row, "length"))
    return pieces

  def _finish(self, row: int, reason: str) -> Piece:
    request, self._active[row] = self._active[row], None
    self._stop_row(row)
    self._free_pages(request)  # whoever gets them writes after the stride that is still under way
    text = request.text.finish()
    stopped = request.text.stopped and reason == "length"  # by text that was held back to the end
    return Piece(request.name, text, finish_reason="stop" if stopped else reason)


def _widths(smallest: int, largest: int) -> list[int]:
  """Powers of two from one to the other."""
  return [1 << i for i in range(smallest.bit_length() - 1, largest.bit_length())]


def _mesh_of(model: Atma) -> Mesh | None:
  """What the parameters are spread over; None where they simply lie on the default device."""
  sharding = jax.tree.leaves(nnx.state(model, nnx.Param))[0].sharding
  return sharding.mesh if isinstance(sharding, NamedSharding) else None

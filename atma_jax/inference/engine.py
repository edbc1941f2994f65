"""Continuous batching: many requests are decoded together in the rows of one cache, which are filled and freed independently.

A prompt is prefilled by itself, in passes whose widths are powers of two, between the decoding programs of the rows that are
running; its state is then put into a free row. One program decodes `decode_steps` tokens of all rows on the device, with donated
buffers and without consulting the host. It reads keys and values up to the smallest of a few fixed bucket sizes that holds the
longest row or, with a kernel, up to each row's own length. The device runs one decoding program while the host looks at the
tokens of the one before. Keys and values may lie in pages that the rows share. Shapes never depend on a request:
`Engine.warm_up` compiles every program there is.
"""

from __future__ import annotations

from collections import deque
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
from jaxtyping import Int
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.inference.footprint import Pages, check_page
from atma_jax.inference.prefill import SMALLEST_PASS, Prefiller
from atma_jax.inference.programs import DecodedTokens, HostTokens, cast_parameters, empty_state, make_programs, state_sharding
from atma_jax.inference.requests import Completion, Request, TokenOutput
from atma_jax.inference.sampling import RowSampling, Sampling
from atma_jax.inference.saved_state import load_state, save_state
from atma_jax.inference.text_stream import TextStream
from atma_jax.inference.weights_identity import weights_identity
from atma_jax.models import Atma
from atma_jax.models.cache import PAGE_LIMIT, Cache
from atma_jax.ops.core import dispatch
from atma_jax.ops.polar_attention.cached.api import BLOCK, slots_for
from atma_jax.sharding import LOGICAL_AXES

Prompt = str | Sequence[int] | Int[np.ndarray, " T"]  # text or token ids


class Engine:
  """Continuous batching over a fixed number of rows.

  If the model lies on a mesh of more than one device, rows are sharded over its ``data`` and ``fsdp`` axes.

  Args:
    model: an `Atma`.
    tokenizer: of the model. Its end-of-text ends a text, and ids beyond its vocabulary are never drawn.
    rows: requests decoded at once.
    capacity: most tokens of a request, prompt and text together. A model with a window takes any length in the same memory.
    chunk: most prompt tokens in one forward pass, a power of two. While rows decode, prompts advance by as many tokens for every
      free row between two decoding programs.
    first_chunk: the same for a pass over an empty cache, which the ops of the full forward pass serve: larger is faster for long
      prompts and takes more memory. None is `chunk`.
    decode_steps: tokens decoded before the host looks at them: more is faster, fewer stops and streams sooner.
    alternatives: number of likeliest tokens reported with every token.
    prefixes: number of prompts whose states are kept, so that a prompt that continues one of them starts there.
    cache_dtype: dtype of keys and values, one of `cache.CACHE_DTYPES`; None is the model's activation dtype.
    max_buckets: most sizes of cache that decoding programs are compiled for, each twice the one before. There is only one if
      decoding reads every row up to its own length anyway.
    prompt_logprobs: whether `submit` takes scored requests.
    pages: number of pages of keys and values that all rows share. A request holds the pages it may need and waits while too few
      are free. None gives every row room for `capacity`.
    page: tokens of a page, a power of two.
    saved_states: whether `save` and `load` can be called, if prefixes are kept. It costs one pass over the parameters now, see
      `atma_jax.inference.weights_identity`.

  Attributes:
    config: of the model.
    programs: what runs on the device.
    buckets: numbers of cached slots that decoding programs are compiled for, ascending.
    pages: the pool of pages, or None.
    state: of the rows, on the device.
    decoding: for every row, the request that it decodes.
    prefilling: requests being prefilled, by the row reserved for them.
  """

  def __init__(self, model: Atma, tokenizer: Tokenizer, *, rows: int = 8, capacity: int = 2048, chunk: int = 512,
               first_chunk: int | None = None, decode_steps: int = 8, alternatives: int = 0, prefixes: int = 0,
               cache_dtype: str | None = None, max_buckets: int = 8, prompt_logprobs: bool = False,
               pages: int | None = None, page: int = PAGE_LIMIT, saved_states: bool = True):
    first_chunk = chunk if first_chunk is None else first_chunk
    for name, value, least in (("chunk", chunk, SMALLEST_PASS), ("first_chunk", first_chunk, chunk)):
      if value < least or value & (value - 1):
        raise UserError(f"{name}={value}: must be a power of two of at least {least}")
    mesh = mesh_of(model)
    one_device = mesh is None or mesh.size == 1
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])
    for name, value, least in (("rows", rows, 1), ("capacity", capacity, 2), ("decode_steps", decode_steps, 1),
                               ("max_buckets", max_buckets, 1), ("prefixes", prefixes, 0), ("alternatives", alternatives, 0)):
      if value < least:
        raise UserError(f"{name}={value}: must be at least {least}")
    if pages is None:
      page = 1  # no rounding
    elif mesh is not None and not one_device:
      raise UserError(f"pages={pages}: pages lie on one device, and the model is spread over {mesh.size}")
    else:
      check_page(page)
    if rows % shards:
      raise UserError(f"rows={rows}: must be a multiple of the {shards} parts that the devices split them into")
    self.tokenizer, self.capacity, self.decode_steps, self.alternatives = tokenizer, capacity, decode_steps, alternatives
    self.scores_prompts = prompt_logprobs
    self.config: ModelConfig = model.config
    self._chunk, self._mesh, self._cache_dtype = chunk, mesh, cache_dtype
    self._filters_decided_on_host = dispatch.platform() == "gpu"  # a program that branches there waits for the host
    self._names, self._waiting = 0, deque[Request]()
    self.prefilling: dict[int, Request] = {}
    self.decoding: list[Request | None] = [None] * rows
    self._undelivered: tuple[list[Request | None], DecodedTokens] | None = None  # what the host has not looked at

    create = functools.partial(Cache.create, self.config, capacity=capacity, dtype=cache_dtype, page=page)
    keys = jax.eval_shape(lambda: create(1)).keys
    self._slots = slots = 0 if keys is None else keys.shape[-2]
    self.pages: Pages | None = None
    if pages is not None and slots:
      self.pages = Pages(pages, page, slots // page)
      if pages < self.pages.most:
        raise UserError(f"pages={pages}: must be at least {self.pages.most}, which a request of {capacity} tokens needs")
    make_state = functools.partial(empty_state, functools.partial(create, pages=pages), rows, self.config.vocab_size)
    abstract = jax.eval_shape(make_state)
    with self._on_mesh():
      unrolled = model.unrolls_decoding(abstract.cache)
      max_buckets = 1 if model.skips_unused_slots(abstract.cache) else max_buckets
    halvings = range(max_buckets)
    self.buckets = sorted({slots_for(max(slots >> i, min(BLOCK, slots))) for i in halvings}) if slots else [0]
    self._weights = weights_identity(model) if prefixes and saved_states else None
    graphdef, params = nnx.split(model.unstacked(fuse=one_device) if unrolled else model)
    self._params = cast_parameters(params, self.config)
    shardings = None if mesh is None else state_sharding(mesh, abstract)
    self.programs = make_programs(graphdef, self.config, tokenizer, create, decode_steps=decode_steps, alternatives=alternatives,
                                  mesh=mesh, shardings=shardings)
    self._prefiller = Prefiller(self.programs, self._params, chunk=chunk, first_chunk=first_chunk, prefixes=prefixes,
                                on_mesh=self._on_mesh)
    with self._on_mesh():
      self.state = jax.jit(make_state, out_shardings=shardings)()

  # --- Requests -------------------------------------------------------------------------------------------------------

  @property
  def rows(self) -> int:
    """Number of requests decoded at once."""
    return len(self.decoding)

  @property
  def prefilled(self) -> int:
    """Number of prompt tokens that went through the model so far."""
    return self._prefiller.tokens

  @property
  def counts(self) -> dict[str, int]:
    """Numbers of requests that are "waiting", "prefilling" and "decoding"."""
    return {"waiting": len(self._waiting), "prefilling": len(self.prefilling), "decoding": sum(map(bool, self.decoding))}

  @property
  def busy(self) -> bool:
    """Whether any request is waiting, prefilling or decoding."""
    return bool(self._waiting) or bool(self.prefilling) or any(self.decoding)

  def check(self, prompt: Prompt, sampling: Sampling) -> Int[np.ndarray, " T"]:
    """Returns the prompt's tokens (T,) int32; an empty prompt stands for the start of a document, which is end-of-text.

    Raises:
      UserError: prompt and text would not fit, or the prompt has ids that the model does not.
    """
    tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = np.asarray(tokens, np.int64) if len(tokens) else np.array([self.tokenizer.eot_id])
    if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
      raise UserError(f"prompt: token ids must be from 0 to {self.config.vocab_size - 1}")
    window = self.config.window
    if len(tokens) + sampling.max_tokens > self.capacity and (window is None or 0 < self._slots < window):
      raise UserError(f"max_tokens={sampling.max_tokens}: with a prompt of {len(tokens)} tokens more than the "
                      f"{self.capacity} that fit; legal: at most {max(self.capacity - len(tokens), 0)}")
    return tokens.astype(np.int32)

  def submit(self, prompt: Prompt, sampling: Sampling, *, scored: bool = False) -> int:
    """Queues a request.

    Args:
      prompt: text or token ids.
      sampling: how it continues.
      scored: whether to report `TokenOutput.prompt_logprobs`; the engine must have been made with `prompt_logprobs`.

    Returns:
      The name of the request, as in `TokenOutput.request`.

    Raises:
      UserError: see `check`.
    """
    if scored and not self.scores_prompts:
      raise ValueError("a scored request needs Engine(prompt_logprobs=True)")
    tokens = self.check(prompt, sampling)
    self._names += 1
    self._waiting.append(Request(self._names, tokens, sampling, TextStream(self.tokenizer, sampling.stop), scored))
    return self._names

  def cancel(self, request: int) -> TokenOutput | None:
    """Ends a request now and frees its row; returns its last output, or None if it has ended already."""
    for waiting in self._waiting:
      if waiting.name == request:
        self._waiting.remove(waiting)
        return TokenOutput(request, "", finish_reason="cancelled")
    for row, prefilling in self.prefilling.items():
      if prefilling.name == request:
        del self.prefilling[row]
        self._free_pages(prefilling)
        return TokenOutput(request, "", finish_reason="cancelled")
    for row, decoding in enumerate(self.decoding):
      if decoding is not None and decoding.name == request:
        return self._finish(row, decoding, "cancelled")
    return None

  def step(self) -> list[TokenOutput]:
    """Advances prompts for the free rows, starts decoding `decode_steps` tokens of every row, and returns the tokens that the
    previous call started to decode."""
    outputs, undelivered = self._fill_rows(), self._undelivered
    self._undelivered = None
    if any(self.decoding):
      with self._on_mesh():
        self.state, decoded = self.programs.decode(self._params, self.state, cache_slots=self.cache_slots(),
                                                   filters=self._filters())
      self._undelivered = list(self.decoding), decoded
      for request in filter(None, self.decoding):
        request.started += self.decode_steps
    if undelivered is not None:
      requests, decoded = undelivered
      tokens = decoded.on_host()
      for row, request in enumerate(requests):
        if request is not None and request is self.decoding[row]:  # otherwise it has ended since
          outputs += self._collect(row, request, tokens)
    return outputs

  def stream(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]) -> Iterator[TokenOutput]:
    """Yields the outputs of all prompts as they arrive; `TokenOutput.request` is the index of the prompt.

    Args:
      prompts: texts or token ids.
      sampling: of all prompts, or one for each.

    The engine must not be used for anything else meanwhile. Requests that are running when the iterator is closed are cancelled.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    index = {self.submit(prompt, own): i for i, (prompt, own) in enumerate(zip(prompts, samplings, strict=True))}
    try:
      while self.busy:
        for output in self.step():
          if output.request in index:
            yield dataclasses.replace(output, request=index[output.request])
    finally:
      for name in index:
        self.cancel(name)

  def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
    """Returns the completions of all prompts, in order; the arguments are those of `stream`."""
    lengths = [len(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else len(prompt) for prompt in prompts]
    completions = [Completion(length) for length in lengths]
    for output in self.stream(prompts, sampling):
      completions[output.request].add(output)
    return completions

  # --- States ---------------------------------------------------------------------------------------------------------

  def warm_up(self) -> None:
    """Compiles every program that serving may need, so that none is compiled later. The engine must be idle."""
    if self.busy:
      raise ValueError("warm_up: requests are running")
    cache = self.programs.copy_cache(self._prefiller.warm_up(scores=self.scores_prompts))
    self._place(0, cache, None if self.pages is None else self.pages.take(0), np.zeros(1, np.int32), Sampling(), remaining=0)
    decoded = None
    for cache_slots, filters in itertools.product(self.buckets, (False, True) if self._filters_decided_on_host else (None,)):
      with self._on_mesh():
        self.state, decoded = self.programs.decode(self._params, self.state, cache_slots=cache_slots, filters=filters)
    jax.device_get(decoded)
    self._stop_row(0)

  def prefill(self, tokens: Int[np.ndarray, " T"]) -> Cache:
    """Returns the state of one row after these tokens, T of any size, and keeps it as a prefix."""
    return self._prefiller.prefill(tokens)

  def forget_prefixes(self) -> None:
    """Drops the states of all prompts that were kept."""
    self._prefiller.forget()

  def save(self, path: str | os.PathLike, prompt: Prompt) -> None:
    """Writes the state after a prompt to a file that `load` of any engine of the same model and cache dtype reads.

    Raises:
      UserError: the engine keeps no prefixes, the file cannot be written, or see `check`.
    """
    tokens = self.check(prompt, Sampling(max_tokens=1))
    save_state(path, tokens, self.prefill(tokens), self.config, self._identity_of_weights())

  def load(self, path: str | os.PathLike) -> Int[np.ndarray, " T"]:
    """Keeps the state in a file as a prefix, and returns its tokens (T,), which later prompts may continue.

    Raises:
      UserError: the engine keeps no prefixes, or the file holds no state of these weights that fits.
    """
    tokens, cache = load_state(path, self.config, self.capacity, self._cache_dtype, self._identity_of_weights())
    if self._mesh is not None:
      cache = jax.device_put(cache, NamedSharding(self._mesh, PartitionSpec()))
    self._prefiller.keep(tokens, cache)
    return tokens

  def _identity_of_weights(self) -> str:
    if self._weights is None:
      raise UserError("prefixes=0: must be at least 1 to save or load a state, with saved_states=True and all parameters on one "
                      "host")
    return self._weights

  # --- Prefilling -----------------------------------------------------------------------------------------------------

  def _fill_rows(self) -> list[TokenOutput]:
    """Gives free rows to waiting requests and advances their prompts, by `chunk` tokens for every free row."""
    free = [row for row, request in enumerate(self.decoding) if request is None]
    budget, outputs = self._chunk * len(free), []
    for row in free:
      if row not in self.prefilling and self._waiting and budget > 0 and self._take_pages(self._waiting[0]):
        self.prefilling[row] = self._waiting.popleft()
      while row in self.prefilling and budget > 0:
        before = self.prefilled
        outputs += self._advance_prompt(row, self.prefilling[row])
        budget -= max(self.prefilled - before, 1)
    return outputs

  def _advance_prompt(self, row: int, request: Request) -> list[TokenOutput]:
    """Runs one pass of a request's prompt; once all of it is prefilled, the request moves into `row`."""
    tokens, cache, position = request.prompt[:-1], request.cache, request.position
    if cache is None:
      cache, position = (self.programs.new_cache(), 0) if request.scored else self._prefiller.start(tokens)
    if position < len(tokens):
      if request.scored:
        cache, position, scores = self._prefiller.score(request.prompt, cache, position)
        request.scores += scores
      else:
        cache, position = self._prefiller.advance(tokens, cache, position)
    request.cache, request.position = cache, position
    if position < len(tokens):
      return []
    self._prefiller.keep(tokens, cache)
    request.cache = None
    self._place(row, cache, request.pages, request.prompt, request.sampling, remaining=request.sampling.max_tokens)
    del self.prefilling[row]
    self.decoding[row] = request
    return [TokenOutput(request.name, "", prompt_logprobs=tuple(request.scores))] if request.scored else []

  def _place(self, row: int, cache: Cache, pages: Int[np.ndarray, " N"] | None, prompt: Int[np.ndarray, " T"],
             sampling: Sampling, *, remaining: int) -> None:
    """Puts a prefilled prompt into a row, to decode `remaining` tokens."""
    seen = np.zeros(self.config.vocab_size, bool)
    seen[prompt] = True
    table = None if pages is None else pages[None]
    with self._on_mesh():
      self.state = self.programs.place(self.state, np.int32(row), cache, table, prompt[-1], np.int32(remaining), seen,
                                       np.bool_(not sampling.ignore_end), RowSampling.stack(sampling))

  def _take_pages(self, request: Request) -> bool:
    """Takes the pages that a request may need; False if too few are free. The last of its tokens is never cached."""
    if self.pages is None:
      return True
    request.pages = self.pages.take(self.pages.needed(len(request.prompt) + request.sampling.max_tokens - 1))
    return request.pages is not None

  def _free_pages(self, request: Request) -> None:
    if self.pages is not None and request.pages is not None:
      self.pages.give_back(request.pages)
      request.pages = None

  # --- Decoding -------------------------------------------------------------------------------------------------------

  def cache_slots(self) -> int:
    """Returns the bucket that the next decoding program reads: the smallest that holds every row until it ends."""
    longest = max(len(request.prompt) + min(request.started, request.sampling.max_tokens)
                  for request in self.decoding if request) + self.decode_steps
    return next((slots for slots in self.buckets if longest <= slots), self._slots)

  def _filters(self) -> bool | None:
    """Whether any row's sampling filters tokens; None if the program finds out on the device."""
    return any(request.sampling.filters for request in self.decoding if request) if self._filters_decided_on_host else None

  def _collect(self, row: int, request: Request, decoded: HostTokens) -> list[TokenOutput]:
    """Returns the outputs of one row."""
    outputs = []
    for step in range(decoded.counts[row]):
      token = decoded.tokens[step][row]
      request.received += 1
      ended = token == self.tokenizer.eot_id and not request.sampling.ignore_end
      text = "" if ended else request.text.push(token)
      alternatives = tuple(zip(decoded.top_tokens[step][row], decoded.top_logprobs[step][row]))
      outputs.append(TokenOutput(request.name, text, token, decoded.logprobs[step][row], alternatives))
      if ended or request.text.stopped:
        return [*outputs, self._finish(row, request, "stop")]
    if request.received == request.sampling.max_tokens:
      outputs.append(self._finish(row, request, "length"))
    return outputs

  def _finish(self, row: int, request: Request, reason: str) -> TokenOutput:
    self.decoding[row] = None
    self._stop_row(row)
    self._free_pages(request)  # their next owner writes only after the decoding program that is still running
    text = request.text.finish()
    stopped = request.text.stopped and reason == "length"  # by text that was held back to the end
    return TokenOutput(request.name, text, finish_reason="stop" if stopped else reason)

  def _stop_row(self, row: int) -> None:
    with self._on_mesh():
      self.state = self.state._replace(remaining=self.programs.stop(self.state.remaining, np.int32(row)))

  def _on_mesh(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def mesh_of(model: Atma) -> Mesh | None:
  """Returns the mesh that the parameters are spread over; None if they simply lie on the default device."""
  sharding = jax.tree.leaves(nnx.state(model, nnx.Param))[0].sharding
  return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None

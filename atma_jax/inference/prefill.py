"""Prefill: prompts run through the model one at a time, in passes of fixed widths; states of prefixes are kept for reuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
import contextlib

from flax import nnx
import jax
from jaxtyping import Int
import numpy as np

from atma_jax.inference.programs import Programs
from atma_jax.inference.requests import TokenScore
from atma_jax.models.cache import Cache

SMALLEST_PASS = 16  # tokens


class Prefiller:
  """Takes prompts through the model in passes whose widths are powers of two, so that a few programs serve every length.

  Args:
    programs: of the engine.
    params: the model's parameters.
    chunk: most tokens in one pass.
    first_chunk: the same for a pass over an empty cache, at least `chunk`.
    prefixes: how many states of prompts are kept.
    on_mesh: returns the context in which programs are called.

  Attributes:
    tokens: prompt tokens that went through the model so far.
  """

  def __init__(self, programs: Programs, params: nnx.State, *, chunk: int, first_chunk: int, prefixes: int,
               on_mesh: Callable[[], contextlib.AbstractContextManager]):
    self._programs, self._params, self._on_mesh = programs, params, on_mesh
    self._chunk, self._first_chunk, self._prefixes = chunk, first_chunk, prefixes
    self._kept = OrderedDict[bytes, Cache]()  # states by the bytes of their int32 tokens, the latest used last
    self.tokens = 0

  def start(self, tokens: Int[np.ndarray, " T"]) -> tuple[Cache, int]:
    """Returns the state of the longest kept prefix of these tokens, and its length; an empty state and 0 if there is none."""
    content = tokens.tobytes()
    prefix = max((key for key in self._kept if content.startswith(key)), key=len, default=b"")
    if not prefix:
      return self._programs.new_cache(), 0
    self._kept.move_to_end(prefix)
    return self._programs.copy_cache(self._kept[prefix]), len(prefix) // tokens.itemsize  # what is kept must survive donation

  def advance(self, tokens: Int[np.ndarray, " T"], cache: Cache, position: int) -> tuple[Cache, int]:
    """Runs one pass over the next tokens.

    Args:
      tokens: all tokens to prefill, int32.
      cache: the state after the first `position` of them; donated.
      position: fewer than there are tokens.

    Returns:
      The new state, and how many tokens it has seen.
    """
    first = position == 0 and len(tokens) > self._chunk and self._first_chunk > self._chunk
    part = tokens[position : position + (self._first_chunk if first else self._chunk)]
    width = max(SMALLEST_PASS, 1 << (len(part) - 1).bit_length())
    return self._run(cache, part, width, first), position + len(part)

  def score(self, prompt: Int[np.ndarray, " T"], cache: Cache, position: int) -> tuple[Cache, int, list[TokenScore]]:
    """Runs one pass over the next tokens of a prompt and scores the tokens that follow them.

    Args:
      prompt: the whole prompt, int32. All of its tokens but the last are prefilled.
      cache: the state after the first `position` of them; donated.
      position: fewer than there are tokens to prefill.

    Returns:
      The new state, how many tokens it has seen, and the scores of the tokens after each of this pass.
    """
    part = prompt[position : position + self._chunk + 1]
    padded, count = np.zeros((2, 1, self._chunk), np.int32), len(part) - 1
    padded[:, 0, :count] = part[:-1], part[1:]
    self.tokens += count
    with self._on_mesh():
      cache, scores = self._programs.score(self._params, cache, *padded, np.array([count], np.int32))
    own, top_logprobs, top_tokens = (x[:count].tolist() for x in jax.device_get(scores))
    return cache, position + count, [(own[i], tuple(zip(top_tokens[i], top_logprobs[i]))) for i in range(count)]

  def prefill(self, tokens: Int[np.ndarray, " T"]) -> Cache:
    """Returns the state of one row after these tokens, T of any size, and keeps it as a prefix."""
    tokens = np.asarray(tokens, np.int32)
    cache, position = self.start(tokens)
    while position < len(tokens):
      cache, position = self.advance(tokens, cache, position)
    self.keep(tokens, cache)
    return cache

  def keep(self, tokens: Int[np.ndarray, " T"], cache: Cache) -> None:
    """Keeps a copy of the state of one row after these tokens, for prompts that continue them."""
    content = np.asarray(tokens, np.int32).tobytes()
    if self._prefixes and content and content not in self._kept:
      self._kept[content] = self._programs.copy_cache(cache)
      while len(self._kept) > self._prefixes:
        self._kept.popitem(last=False)

  def forget(self) -> None:
    """Drops all kept prefixes."""
    self._kept.clear()

  def warm_up(self, *, scores: bool) -> Cache:
    """Compiles the program of every width, and the scoring program if `scores`; returns the state of some row."""
    count, cache = self.tokens, None
    for width, first in [*((w, False) for w in _powers_of_two(SMALLEST_PASS, self._chunk)),
                         *((w, True) for w in _powers_of_two(2 * self._chunk, self._first_chunk))]:
      cache = self._run(self._programs.new_cache(), np.zeros(1, np.int32), width, first)
    if scores:
      cache = self.score(np.zeros(2, np.int32), self._programs.new_cache(), 0)[0]
    self.tokens = count
    assert cache is not None  # there is at least one width
    return cache

  def _run(self, cache: Cache, part: Int[np.ndarray, " T"], width: int, first: bool) -> Cache:
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(part)] = part
    self.tokens += len(part)
    with self._on_mesh():
      return self._programs.prefill(self._params, cache, padded, np.array([len(part)], np.int32),
                                    cache_slots=0 if first else None)


def _powers_of_two(smallest: int, largest: int) -> list[int]:
  """All powers of two from one to the other."""
  return [1 << i for i in range(smallest.bit_length() - 1, largest.bit_length())]

"""The table of generation: prefill and decoding of one sequence, and decoding of many, beside what memory bandwidth allows."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from atma_jax.benchmarks.timing import copy_bandwidth
from atma_jax.config import Config, ModelConfig
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.memory_needs import check_generation_fits
from atma_jax.models import Atma
from atma_jax.models.cache import Cache, nbytes

LOOKED_UP = ("embed",)  # parameters of which a decoding step reads single rows


class NoText(Tokenizer):
  """A tokenizer whose text is dots, for timing an engine alone."""

  kind, eot_id = "none", 0

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size

  def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
    """Returns a dot for each token."""
    return "." * len(ids)


@dataclasses.dataclass(frozen=True)
class Options:
  """What the table measures.

  Attributes:
    contexts: prompt lengths of a single sequence.
    batches: numbers of sequences that are decoded together.
    batch_context: their prompt length.
    chunk: prompt tokens in one forward pass.
    first_chunk: most prompt tokens in the first forward pass.
    decode_steps: tokens that are decoded before the host looks at them.
    programs: decoding programs, of `decode_steps` tokens each, that are timed.
    cache_dtype: dtype of keys and values; None is the model's.
  """

  contexts: tuple[int, ...] = (2048, 131072)
  batches: tuple[int, ...] = (64, 256)
  batch_context: int = 512
  chunk: int = 512
  first_chunk: int = 131072
  decode_steps: int = 32
  programs: int = 4
  cache_dtype: str | None = None

  def capacity(self, context: int) -> int:
    """Returns the most tokens of a sequence that is decoded after `context` tokens."""
    return context + self.decode_steps * (self.programs + 3)


def generation_table(config: Config, options: Options, seed: int) -> None:
  """Prints a line for every measurement.

  The predicted time of a decoding step is the bytes that it must move over the bandwidth of a copy measured here.
  """
  sizes = [(1, context) for context in options.contexts] + [(rows, options.batch_context) for rows in options.batches]
  for rows, context in sizes:
    check_generation_fits(config.model, rows, options.capacity(context), options.cache_dtype)
  bandwidth = copy_bandwidth()
  model = nnx.jit(lambda: Atma(config.model, rngs=nnx.Rngs(seed)))()
  weights = weight_bytes(model)
  print(f"\n{jax.devices()[0].device_kind}, copy {bandwidth / 1e9:.1f} GB/s, weights read per step {weights / 2**30:.3f} GiB, "
        f"keys and values {options.cache_dtype or config.model.activation_dtype}, decode_steps {options.decode_steps}")
  print("| generation | context | rows | ms | predicted | rate | memory GiB: caches / peak |")
  print("|---|---|---|---|---|---|---|")

  def single(context: int) -> None:
    engine, prompt = _engine(model, 1, context, options), _prompt(config.model, context, seed)
    _time_prefill(engine, prompt)
    _time_decoding(engine, [prompt], options, weights, bandwidth)

  def batch(rows: int) -> None:
    engine = _engine(model, rows, options.batch_context, options, prefixes=1)
    prompt = _prompt(config.model, options.batch_context, seed)
    _time_decoding(engine, [prompt] * rows, options, weights, bandwidth)

  for context in options.contexts:
    single(context)
  for rows in options.batches:
    batch(rows)


def weight_bytes(model: Atma) -> int:
  """Returns the bytes of parameters that a decoding step reads, in the dtypes in which the engine keeps them."""
  activation = jnp.dtype(model.config.activation_dtype).itemsize
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return sum(p.size * min(activation, p.dtype.itemsize) for path, p in flat if path[0] not in LOOKED_UP)


def state_bytes(config: ModelConfig, rows: int, slots: int, cache_dtype: str | None) -> int:
  """Returns the bytes of state that a decoding step moves: it reads `slots` keys and values, reads memory twice and writes it."""
  cache = jax.eval_shape(lambda: Cache.create(config, rows, slots, cache_dtype))
  memory = sum(nbytes(layer.memory) for layers in cache.layers.values() for layer in layers)
  return nbytes(cache) + 2 * memory


def _prompt(config: ModelConfig, length: int, seed: int) -> Int[np.ndarray, " T"]:
  """Draws a prompt of random tokens, without end-of-text."""
  return np.random.default_rng(seed).integers(1, config.vocab_size, length)


def _engine(model: Atma, rows: int, context: int, options: Options, **more: Any) -> Engine:
  """Makes an engine for `rows` sequences that are decoded after `context` tokens."""
  capacity = options.capacity(context)
  first = min(options.first_chunk, 1 << (capacity - 1).bit_length())
  return Engine(model, NoText(model.config.vocab_size), rows=rows, capacity=capacity, chunk=options.chunk, max_buckets=2,
                first_chunk=max(first, options.chunk), decode_steps=options.decode_steps, cache_dtype=options.cache_dtype, **more)


def _time_prefill(engine: Engine, prompt: Int[np.ndarray, " T"]) -> None:
  """Prints the better of two prefills."""
  seconds = []
  cache = None
  for _ in range(3):  # the first compiles
    start = time.perf_counter()
    cache = jax.block_until_ready(engine.prefill(prompt[:-1]))
    seconds.append(time.perf_counter() - start)
  best = min(seconds[1:])
  _print_line("prefill", len(prompt), 1, best * 1e3, None, len(prompt) / best, nbytes(cache))


def _time_decoding(engine: Engine, prompts: Sequence[Int[np.ndarray, " T"]], options: Options, weights: int,
                   bandwidth: float) -> None:
  """Prints the median time of a step that decodes one token of all rows, host included."""
  rows = len(prompts)
  sampling = Sampling(max_tokens=options.decode_steps * (options.programs + 2), ignore_end=True)
  for prompt in prompts:
    engine.submit(prompt, sampling)
  while engine.counts["decoding"] < rows:
    engine.step()
  engine.step()  # now everything is compiled, and the host has seen the first tokens
  slots, seconds = engine.cache_slots(), []
  for _ in range(options.programs):
    start = time.perf_counter()
    count = sum(output.token is not None for output in engine.step())
    seconds.append((time.perf_counter() - start) * rows / count)
  while engine.busy:
    engine.step()
  ms = statistics.median(seconds) * 1e3
  predicted = (weights + state_bytes(engine.config, rows, slots, options.cache_dtype)) / bandwidth * 1e3
  _print_line("decode", len(prompts[0]), rows, ms, predicted, rows * 1e3 / ms, nbytes(engine.state.cache))


def _print_line(name: str, context: int, rows: int, ms: float, predicted: float | None, rate: float, cache_bytes: int) -> None:
  """Prints a line of the table; `predicted` is in ms, `rate` in tokens per second."""
  stats = jax.devices()[0].memory_stats() or {}
  peak = f"{stats['peak_bytes_in_use'] / 2**30:.2f}" if "peak_bytes_in_use" in stats else "-"
  print(f"| {name} | {context} | {rows} | {ms:.3f} | {'-' if predicted is None else f'{predicted:.3f}'} | {rate:,.0f} tokens/s | "
        f"{cache_bytes / 2**30:.3f} / {peak} |", flush=True)

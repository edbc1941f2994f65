"""The table of generation speeds: prefill, decoding of one sequence, decoding of many, each beside what memory allows."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from atma_jax.config import Config, ModelConfig
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.models.cache import Cache, GlobalPast, nbytes

HARDLY_READ = ("embed",)  # a decoding step looks up a row of it


class _NoText(Tokenizer):
  """Stands for a tokenizer: what is timed is the engine."""

  kind, eot_id = "none", 0

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size

  def decode(self, ids: Sequence[int]) -> str:
    return "." * len(ids)


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured."""

  contexts: tuple[int, ...] = (2048, 131072)  # of a single sequence
  batches: tuple[int, ...] = (64, 256)  # sequences decoded together
  batch_context: int = 512
  chunk: int = 512
  first_chunk: int = 131072
  stride: int = 32
  strides: int = 4  # timed
  cache_dtype: str | None = None


def generation_table(config: Config, options: Options, seed: int) -> None:
  """Prints a line a measurement; predictions are the bytes a step must move over the bandwidth of a copy measured here."""
  bandwidth = copy_bandwidth()
  model = nnx.jit(lambda: Atma(config.model, rngs=nnx.Rngs(seed)))()
  weights = weight_bytes(model)
  print(f"\n{jax.devices()[0].device_kind}, copy {bandwidth / 1e9:.1f} GB/s, weights read a step {weights / 2**30:.3f} GiB, "
        f"keys and values {options.cache_dtype or config.model.activation_dtype}, stride {options.stride}")
  print("| generation | context | rows | ms | predicted | rate | memory GiB: caches / peak |")
  print("|---|---|---|---|---|---|---|")
  for context in options.contexts:
    _single(model, config.model, context, options, weights, bandwidth, seed)
  for rows in options.batches:
    _many(model, config.model, rows, options, weights, bandwidth, seed)


def copy_bandwidth() -> float:
  """Bytes a second that a large copy reads and writes."""
  size = 2**30 if jax.default_backend() != "cpu" else 2**26
  x, add = jnp.zeros(size // 4, jnp.float32), jax.jit(lambda x: x + 1)
  jax.block_until_ready(add(x))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(add(x))
    times.append(time.perf_counter() - start)
  return 2 * size / min(times)


def weight_bytes(model: Atma) -> int:
  """Bytes of the parameters as the engine keeps them, without those that a step hardly reads."""
  wide = jnp.dtype(model.config.activation_dtype).itemsize
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return sum(p.size * min(wide, p.dtype.itemsize) for path, p in flat if path[0] not in HARDLY_READ)


def state_bytes(config: ModelConfig, rows: int, reach: int, cache_dtype: str | None) -> int:
  """Bytes of state that a decoding step moves: keys and values up to `reach` once, memory matrices in twice and out once."""
  cache = jax.eval_shape(lambda: Cache.create(config, rows, reach, cache_dtype))
  memory = sum(nbytes(past.memory) for pasts in cache.layers.values() for past in pasts
               if isinstance(past, GlobalPast) and past.memory is not None)
  return nbytes(cache) + 2 * memory


def _line(name: str, context: int, rows: int, ms: float, predicted: float | None, rate: str, caches: int) -> None:
  stats = jax.devices()[0].memory_stats() or {}
  peak = f"{stats['peak_bytes_in_use'] / 2**30:.2f}" if "peak_bytes_in_use" in stats else "-"
  foreseen = "-" if predicted is None else f"{predicted:.3f}"
  print(f"| {name} | {context} | {rows} | {ms:.3f} | {foreseen} | {rate} | {caches / 2**30:.3f} / {peak} |", flush=True)


def _engine(model: Atma, rows: int, capacity: int, options: Options, **more: Any) -> Engine:
  first = min(options.first_chunk, 1 << (capacity - 1).bit_length())
  return Engine(model, _NoText(model.config.vocab_size), rows=rows, capacity=capacity, chunk=options.chunk, reaches=2,
                first_chunk=max(first, options.chunk), stride=options.stride, cache_dtype=options.cache_dtype, **more)


def _single(model, config, context, options, weights, bandwidth, seed) -> None:
  engine = _engine(model, 1, context + options.stride * (options.strides + 3), options)
  prompt = np.random.default_rng(seed).integers(1, config.vocab_size, context)
  seconds = []
  for _ in range(3):  # the first compiles
    start = time.perf_counter()
    cache = jax.block_until_ready(engine.prefill(prompt[:-1]))
    seconds.append(time.perf_counter() - start)
  best = min(seconds[1:])
  _line("prefill", context, 1, best * 1e3, None, f"{context / best:,.0f} tokens/s", nbytes(cache))
  del cache
  ms, reach = _decode(engine, [prompt], options)
  predicted = (weights + state_bytes(config, 1, reach, options.cache_dtype)) / bandwidth * 1e3
  _line("decode", context, 1, ms, predicted, f"{1e3 / ms:,.0f} tokens/s", nbytes(engine._rows.cache))


def _many(model, config, rows, options, weights, bandwidth, seed) -> None:
  engine = _engine(model, rows, options.batch_context + options.stride * (options.strides + 3), options, prefixes=1)
  prompt = np.random.default_rng(seed).integers(1, config.vocab_size, options.batch_context)
  ms, reach = _decode(engine, [prompt] * rows, options)
  predicted = (weights + state_bytes(config, rows, reach, options.cache_dtype)) / bandwidth * 1e3
  _line("decode", options.batch_context, rows, ms, predicted, f"{rows * 1e3 / ms:,.0f} tokens/s", nbytes(engine._rows.cache))


def _decode(engine: Engine, prompts: list[np.ndarray], options: Options) -> tuple[float, int]:
  """Milliseconds a step of all rows, host included, and the slots it reads: the median of the strides timed."""
  sampling = Sampling(max_tokens=options.stride * (options.strides + 2), ignore_end=True)
  for prompt in prompts:
    engine.submit(prompt, sampling)
  while engine.counts["decoding"] < len(prompts):
    engine.step()
  engine.step()  # compiled, and the first stride looked at
  reach, seconds = engine._reach(), []
  for _ in range(options.strides):
    start = time.perf_counter()
    count = sum(piece.token is not None for piece in engine.step())
    seconds.append((time.perf_counter() - start) * len(prompts) / count)
  while engine.busy:
    engine.step()
  return statistics.median(seconds) * 1e3, reach

"""Memory of an engine: how many rows or pages fit into so many GiB, which request holds which pages, and whether all fits."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.errors import UserError
from atma_jax.memory_needs import free_host_bytes
from atma_jax.models.cache import PAGE_LIMIT, Cache, nbytes

SPARE_ROWS = 2  # while a prompt is being placed, its own state and that of the row exist twice for a moment
SMALLEST_PAGE = 8  # tokens


class Pages:
  """A pool of pages, of which each request holds as many as it needs until it ends.

  Args:
    total: number of pages.
    page: tokens of a page.
    most: the most pages that one request may need, N.
  """

  def __init__(self, total: int, page: int, most: int):
    self.total, self.page, self.most = total, page, most
    self._free = list(range(total))[::-1]  # the last page freed is the next one taken

  @property
  def free(self) -> int:
    """Number of pages that nobody holds."""
    return len(self._free)

  def needed(self, tokens: int) -> int:
    """Returns the pages that a request with so many cached tokens needs; with a window, the last tokens replace the first."""
    return min(-(-tokens // self.page), self.most)

  def take(self, count: int) -> Int[np.ndarray, " N"] | None:
    """Takes pages out of the pool.

    Args:
      count: number of pages.

    Returns:
      (N,) int32: the pages, and `total` in the remaining places, which stands for no page. None if too few are free.
    """
    if count > len(self._free):
      return None
    taken = [self._free.pop() for _ in range(count)]
    return np.array(taken + [self.total] * (self.most - count), np.int32)

  def give_back(self, pages: Int[np.ndarray, " N"]) -> None:
    """Returns to the pool what `take` returned."""
    self._free += [int(page) for page in pages[::-1] if page < self.total]


def rows_within(config: ModelConfig, memory_gib: float, *, capacity: int, prefixes: int = 0,
                cache_dtype: str | None = None) -> int:
  """Computes how many rows fit, beside the states of kept prefixes and of prompts being prefilled.

  Args:
    config: of the model.
    memory_gib: memory for all of these states, in GiB.
    capacity: tokens of a row.
    prefixes: number of kept prefixes.
    cache_dtype: dtype of keys and values, one of `cache.CACHE_DTYPES`; None is the activation dtype.

  Raises:
    UserError: not even one row fits.
  """
  _check_gib(memory_gib)
  row = nbytes(jax.eval_shape(lambda: Cache.create(config, 1, capacity, cache_dtype)))
  rows = int(memory_gib * 2**30 / row) - prefixes - SPARE_ROWS
  if rows < 1:
    raise UserError(f"cache_gib={memory_gib}: a row of {capacity} tokens takes {row / 2**30:.4g} GiB, and {prefixes} kept "
                    f"prefixes, {SPARE_ROWS} prompts on their way and one row must fit: at least "
                    f"{(prefixes + SPARE_ROWS + 1) * row / 2**30:.4g}")
  return rows


def pages_within(config: ModelConfig, memory_gib: float, *, rows: int, page: int, capacity: int, prefixes: int = 0,
                 cache_dtype: str | None = None) -> int:
  """Computes how many pages fit, but no more than `rows` requests can use.

  Args:
    config: of the model.
    memory_gib: memory for pages, rows, kept prefixes and prompts being prefilled, in GiB.
    rows: requests decoded at once, which share the pages.
    page: tokens of a page.
    capacity: most tokens of a request.
    prefixes: number of kept prefixes.
    cache_dtype: dtype of keys and values, one of `cache.CACHE_DTYPES`; None is the activation dtype.

  Raises:
    UserError: not even one request of full capacity fits, or the model has no keys and values.
  """
  _check_gib(memory_gib)

  def create(rows: int, pages: int | None) -> Cache:
    return jax.eval_shape(lambda: Cache.create(config, rows, capacity, cache_dtype, page=page, pages=pages))

  row, page_bytes, table = nbytes(create(1, None)), nbytes(create(1, 1)) - nbytes(create(1, 0)), create(1, 1).table
  if not page_bytes or table is None:
    raise UserError(f"page={page}: the model keeps no keys and values that could lie in pages")
  most = table.shape[1]
  fixed = (prefixes + SPARE_ROWS) * row + nbytes(create(rows, 0))
  pages = int((memory_gib * 2**30 - fixed) / page_bytes)
  if pages < most:
    raise UserError(f"cache_gib={memory_gib}: {rows} rows, {prefixes} kept prefixes and {SPARE_ROWS} prompts on their way "
                    f"take {fixed / 2**30:.4g} GiB, and {most} pages of {page} tokens, which one request may need, must fit: "
                    f"at least {(fixed + most * page_bytes) / 2**30:.4g}")
  return min(pages, rows * most)


def sizes_within(config: ModelConfig, memory_gib: float | None, *, rows: int, page: int | None, shards: int, capacity: int,
                 prefixes: int = 0, cache_dtype: str | None = None) -> dict[str, int]:
  """Computes the engine's arguments `rows`, `page` and `pages` that make the most of a memory.

  Args:
    config: of the model.
    memory_gib: memory of one device for states, in GiB; None takes `rows` as it is.
    rows: requests decoded at once. With a memory and without a page, as many as fit are taken instead.
    page: tokens of a page; None makes no pages.
    shards: number of devices that the rows are spread over.
    capacity: most tokens of a request.
    prefixes: number of kept prefixes.
    cache_dtype: dtype of keys and values, one of `cache.CACHE_DTYPES`; None is the activation dtype.

  Raises:
    UserError: nothing fits, or there is a page but no memory.
  """
  states = {"capacity": capacity, "prefixes": prefixes, "cache_dtype": cache_dtype}
  if page is None:
    return {"rows": rows if memory_gib is None else rows_within(config, memory_gib, **states) * shards}
  if memory_gib is None:
    raise UserError(f"page={page}: needs cache_gib, the memory that holds the pages")
  check_page(page)
  return {"rows": rows, "page": page, "pages": pages_within(config, memory_gib, rows=rows, page=page, **states)}


def needed_bytes(config: ModelConfig, sizes: Mapping[str, Any], *, shards: int = 1) -> dict[str, float]:
  """Estimates the memory that an engine needs on every device beside the parameters; what it really needs is a little more.

  Args:
    config: of the model.
    sizes: every argument of `atma_jax.inference.engine.Engine` beside model and tokenizer, by name.
    shards: number of parts that the devices split the rows into.

  Returns:
    Bytes by the argument that most of them are due to: "capacity" (the states of all rows), "prefixes" (those kept, and those of
    prompts on their way), "decode_steps" (what a decoding program returns) and "chunk" (what a pass over a prompt computes).
  """
  def create(rows: int, pages: int | None) -> Cache:
    page = sizes["page"] if sizes["pages"] is not None else 1
    return jax.eval_shape(lambda: Cache.create(config, rows, sizes["capacity"], sizes["cache_dtype"], page=page, pages=pages))

  sizes = {name: min(size, 2**62) if isinstance(size, int) else size for name, size in sizes.items()}  # a float holds no more
  rows, vocab, itemsize = sizes["rows"] / shards, config.vocab_size, jnp.dtype(config.activation_dtype).itemsize
  logits = 3 * 4 * vocab  # in float32, as probabilities, and sorted
  tokens = max(sizes["chunk"], sizes["first_chunk"] or 0)
  scored = sizes["chunk"] * logits if sizes["prompt_logprobs"] else 0
  return {
    "capacity": nbytes(create(sizes["rows"], sizes["pages"])) / shards + rows * (vocab + logits),
    "prefixes": float((sizes["prefixes"] + SPARE_ROWS) * nbytes(create(1, None))),
    "decode_steps": sizes["decode_steps"] * rows * 4 * (2 + 2 * sizes["alternatives"]),
    "chunk": float(tokens * (4 * config.width + 3 * config.mlp_width) * itemsize + scored)}


def check_memory(config: ModelConfig, sizes: Mapping[str, Any], *, given: Mapping[str, str], shards: int = 1) -> None:
  """Refuses an engine that does not fit into what is free on a device, before anything of it is built.

  Args:
    config: of the model.
    sizes: see `needed_bytes`.
    given: for arguments that the user has given in another form, what that was, such as "cache_gib=8" for "capacity".
    shards: see `needed_bytes`.

  Raises:
    UserError: the engine does not fit; it names the argument that takes most, and a value of it that would fit.
  """
  def total(changes: Mapping[str, Any]) -> float:
    return sum(needed_bytes(config, {**sizes, **changes}, shards=shards).values())

  free, needed = free_bytes(), needed_bytes(config, sizes, shards=shards)
  if free is None or sum(needed.values()) <= free:
    return
  guilty = max(needed, key=lambda name: needed[name])
  if guilty in ("capacity", "prefixes"):  # both are states, whose size the capacity decides
    fewest = {"prefixes": 0, "rows": shards}
    guilty = next((name for name, least in fewest.items() if total({name: least}) <= free), "capacity")
  fitting = (value for i in range(1, 32) if (value := sizes[guilty] >> i) and total({guilty: value}) <= free)
  unit = guilty if guilty in ("rows", "prefixes") else "tokens"
  legal = f"{fit} {unit} would fit" if (fit := next(fitting, None)) else "other sizes must be smaller, too"
  states = f" for {sizes['rows']} rows of {sizes['capacity']} tokens" if guilty in ("capacity", "rows") else ""
  cause = given.get(guilty, f"{guilty}={sizes[guilty]}")
  raise UserError(f"{cause}: needs about {sum(needed.values()) / 2**30:.4g} GiB{states}, and {free / 2**30:.4g} GiB of the "
                  f"device's memory are free; {legal}")


def free_bytes() -> float | None:
  """Returns the memory that is free on each device of this process, or None where that is unknown; CPUs share the host's."""
  devices = jax.local_devices()
  stats = [device.memory_stats() for device in devices]
  if all(stats):
    return float(min(s["bytes_limit"] - s["bytes_in_use"] for s in stats if s))
  if devices[0].platform != "cpu":
    return None
  host = free_host_bytes()
  return None if host is None else host / len(devices)


def _check_gib(memory_gib: float) -> None:
  if not 0 < memory_gib < math.inf:
    raise UserError(f"cache_gib={memory_gib}: must be a finite number of GiB above 0")


def check_page(page: int) -> None:
  """Raises `UserError` unless a page may have so many tokens."""
  if not SMALLEST_PAGE <= page <= PAGE_LIMIT or page & (page - 1):
    raise UserError(f"page={page}: must be a power of two from {SMALLEST_PAGE} to {PAGE_LIMIT}")

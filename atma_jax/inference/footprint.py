"""Admission by memory: how many rows, or how many pages of keys and values, a memory of caches holds, and who has which page."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.errors import UserError
from atma_jax.models.cache import PAGE_LIMIT, Cache, nbytes

SPARE_ROWS = 2  # a prompt on its way, and the row it is put into, exist twice for a moment


class Pages:
  """The pages of a pool, of which requests hold as many as they need until they end.

  Args:
    total: pages.
    page: tokens of a page.
    row: pages that a request may need at most.
  """

  def __init__(self, total: int, page: int, row: int):
    self.total, self.page, self.row = total, page, row
    self._free = list(range(total))[::-1]  # the last freed is the next taken

  @property
  def free(self) -> int:
    """How many nobody holds."""
    return len(self._free)

  def needed(self, tokens: int) -> int:
    """Pages of a request of so many cached tokens; with a window the last of them take the place of the first."""
    return min(-(-tokens // self.page), self.row)

  def take(self, count: int) -> np.ndarray | None:
    """(row,) int32: `count` pages, then `total`, which is none; nothing where fewer are free."""
    if count > len(self._free):
      return None
    taken = [self._free.pop() for _ in range(count)]
    return np.array(taken + [self.total] * (self.row - count), np.int32)

  def give_back(self, pages: np.ndarray) -> None:
    """Frees what `take` gave."""
    self._free += [int(page) for page in pages[::-1] if page < self.total]


def rows_within(config: ModelConfig, memory_gib: float, *, capacity: int, prefixes: int = 0,
                cache_dtype: str | None = None) -> int:
  """How many rows a memory of caches holds, beside the states of kept prefixes and of prompts on their way.

  Raises:
    UserError: not even one.
  """
  row = nbytes(jax.eval_shape(lambda: Cache.create(config, 1, capacity, cache_dtype)))
  rows = int(memory_gib * 2**30 / row) - prefixes - SPARE_ROWS
  if rows < 1:
    raise UserError(f"cache_gib={memory_gib}: a row of {capacity} tokens takes {row / 2**30:.4g} GiB, and {prefixes} kept "
                    f"prefixes, {SPARE_ROWS} prompts on their way and one row must fit: at least "
                    f"{(prefixes + SPARE_ROWS + 1) * row / 2**30:.4g}")
  return rows


def pages_within(config: ModelConfig, memory_gib: float, *, rows: int, page: int, capacity: int, prefixes: int = 0,
                 cache_dtype: str | None = None) -> int:
  """How many pages `rows` requests can share in a memory of caches, beside what `rows_within` counts; no more than they need.

  Raises:
    UserError: fewer than one request of full capacity needs.
  """
  def create(rows: int, pages: int | None) -> Cache:
    return jax.eval_shape(lambda: Cache.create(config, rows, capacity, cache_dtype, page=page, pages=pages))

  row, each, whole = nbytes(create(1, None)), nbytes(create(1, 1)) - nbytes(create(1, 0)), create(1, 1).table.shape[1]
  if not each:
    raise UserError(f"page={page}: the model keeps no keys and values that could lie in pages")
  fixed = (prefixes + SPARE_ROWS) * row + nbytes(create(rows, 0))
  pages = int((memory_gib * 2**30 - fixed) / each)
  if pages < whole:
    raise UserError(f"cache_gib={memory_gib}: {rows} rows, {prefixes} kept prefixes and {SPARE_ROWS} prompts on their way "
                    f"take {fixed / 2**30:.4g} GiB, and {whole} pages of {page} tokens, which one request may need, must fit: "
                    f"at least {(fixed + whole * each) / 2**30:.4g}")
  return min(pages, rows * whole)


def sizes_within(config: ModelConfig, memory_gib: float | None, *, rows: int, page: int | None, parts: int,
                 **options: Any) -> dict[str, int]:
  """Arguments of the engine: `rows` without a memory to keep to; with one as many as `parts` devices hold, or, given a
  `page`, `rows` and as many pages. `options` are those of `rows_within`."""
  if page is None:
    return {"rows": rows if memory_gib is None else rows_within(config, memory_gib, **options) * parts}
  if memory_gib is None:
    raise UserError(f"page={page}: needs cache_gib, the memory that holds the pages")
  check_page(page)
  return {"rows": rows, "page": page, "pages": pages_within(config, memory_gib, rows=rows, page=page, **options)}


def check_page(page: int) -> None:
  """Raises UserError unless pages may have so many tokens."""
  if not 8 <= page <= PAGE_LIMIT or page & (page - 1):
    raise UserError(f"page={page}: must be a power of two from 8 to {PAGE_LIMIT}")

"""Engines for evaluation: a fixed number of rows over all devices, prompts read in large chunks."""

from __future__ import annotations

from jax.sharding import Mesh

from atma_jax.data.tokenizers import Tokenizer
from atma_jax.evaluation.scoring import round_up_rows
from atma_jax.inference.engine import Engine
from atma_jax.models import Atma

_MOST_PROMPT_TOKENS = 2048  # of a row in one pass


def make_engine(model: Atma, tokenizer: Tokenizer, mesh: Mesh, *, rows: int, capacity: int) -> Engine:
  """An engine for at least `rows` rows of up to `capacity` tokens, prompt and new tokens together.

  The number of rows is rounded up to a multiple of the devices that rows are spread over.
  """
  chunk = 1 << (min(_MOST_PROMPT_TOKENS, capacity).bit_length() - 1)  # a power of two
  return Engine(model, tokenizer, rows=round_up_rows(rows, mesh), capacity=capacity, chunk=chunk)

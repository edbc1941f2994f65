"""Text from a checkpoint in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import inspect
import math
import os
from typing import Any, overload

import jax

from atma_jax.checkpoints.load import load_model
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine, mesh_of
from atma_jax.inference.footprint import check_memory
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.sharding import LOGICAL_AXES


@overload
def generate(model: Atma | str | os.PathLike[str], prompt: str, *, tokenizer: Tokenizer | None = None, rows: int = 8,
             **sampling: Any) -> str:
  """One prompt, one text."""


@overload
def generate(model: Atma | str | os.PathLike[str], prompt: Sequence[str], *, tokenizer: Tokenizer | None = None, rows: int = 8,
             **sampling: Any) -> list[str]:
  """Several prompts, their texts in order."""


def generate(model: Atma | str | os.PathLike[str], prompt: str | Sequence[str], *, tokenizer: Tokenizer | None = None,
             rows: int = 8, **sampling: Any) -> str | list[str]:
  """Continues one prompt or several.

  Every call compiles its programs and, for a directory, reads the weights. A program that generates often keeps an
  `atma_jax.inference.engine.Engine`, which also streams tokens, reports log-probabilities and reuses prefixes.

  Args:
    model: the directory of a checkpoint (a working directory of `train`, its ``checkpoints`` folder, or a published
      checkpoint), or an `Atma`.
    prompt: text to continue, or a sequence of texts. An empty text stands for the start of a document.
    tokenizer: the tokenizer of an `Atma`; a directory holds its own.
    rows: the most prompts that are decoded at once.
    **sampling: fields of `atma_jax.inference.sampling.Sampling`: ``max_tokens``, ``temperature`` (0 takes the likeliest
      token), ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``seed``, ``stop`` (strings that end the text) and
      ``ignore_end``. Prompt i draws its random numbers from ``seed + i``.

  Returns:
    The new text, without the prompt and without end-of-text or the stop string that ended it; for a sequence of prompts
    the list of texts, in order.

  Raises:
    UserError: no good checkpoint in the directory, a tokenizer without its vocabulary, or a value that is not legal.
    TypeError: a keyword that is no field of `Sampling`.
    ValueError: an `Atma` without a tokenizer.

  Example:
    >>> atma_jax.generate("runs/quickstart", "def main(", max_tokens=32, temperature=0)
    >>> atma_jax.generate("runs/quickstart", ["import ", "class "], max_tokens=32, seed=1, stop=("\\n\\n",))
  """
  prompts = [prompt] if isinstance(prompt, str) else list(prompt)
  if isinstance(sampling.get("stop"), str):
    sampling["stop"] = (sampling["stop"],)
  first = Sampling(**sampling)
  if not isinstance(model, Atma):
    _, model, own, _ = load_model(model)
    tokenizer = tokenizer or own
  if tokenizer is None:
    raise ValueError("tokenizer=None: an Atma needs its tokenizer; only a directory holds one")
  if not prompts:
    return []
  longest = max(len(tokenizer.encode(text)) for text in prompts)
  engine = engine_for(model, tokenizer, longest + first.max_tokens, min(rows, len(prompts)))
  texts = [completion.text for completion in engine.generate(prompts, first.spread(len(prompts)))]
  return texts[0] if isinstance(prompt, str) else texts


def engine_for(model: Atma, tokenizer: Tokenizer, tokens: int, rows: int, **options: Any) -> Engine:
  """Makes an engine that is just large enough for ``max_tokens`` after a prompt.

  Args:
    model: the model.
    tokenizer: its tokenizer.
    tokens: the most tokens of a prompt and its text together. The capacity is a power of two above it, so that prompts of
      similar lengths run the same programs.
    rows: the most prompts decoded at once, rounded up to a multiple of the devices that share them.
    **options: further arguments of `Engine`.
  """
  devices = jax.device_count()
  given = {"capacity": f"max_tokens: {tokens} tokens of a prompt and its text"}
  return fitting_engine(model, tokenizer, given, rows=-(-rows // devices) * devices, capacity=1 << tokens.bit_length(), **options)


def fitting_engine(model: Atma, tokenizer: Tokenizer, given: Mapping[str, str] | None = None, **options: Any) -> Engine:
  """Makes an engine, unless the device has too little memory for it.

  Args:
    model: the model.
    tokenizer: its tokenizer.
    given: for arguments of `Engine` that the user has given in another form, what that was, such as "cache_gib=8" for "capacity".
    **options: further arguments of `Engine`.

  Raises:
    UserError: an argument is not legal or needs more memory than is free, or the tokenizer is only a name.
  """
  tokenizer.encode("")  # of a tokenizer that is only a name this says so
  given = given or {}
  bound = inspect.signature(Engine).bind(model, tokenizer, **options)
  bound.apply_defaults()
  sizes = bound.arguments
  if not 0 <= sizes["alternatives"] <= model.config.vocab_size:
    raise UserError(f"{given.get('alternatives', 'alternatives={}'.format(sizes['alternatives']))}: must be from 0 to "
                    f"{model.config.vocab_size}, the size of the model's vocabulary")
  mesh = mesh_of(model)
  shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])
  check_memory(model.config, sizes, given=given, shards=shards)
  return Engine(model, tokenizer, **options)

"""Text from a checkpoint in one call."""

from __future__ import annotations

from collections.abc import Sequence
import os
from typing import Any, overload

import jax

from atma_jax.checkpoints.load import load_model
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma


@overload
def generate(model: Atma | str | os.PathLike[str], prompt: str, *, tokenizer: Tokenizer | None = None, rows: int = 8,
             **sampling: Any) -> str: ...


@overload
def generate(model: Atma | str | os.PathLike[str], prompt: Sequence[str], *, tokenizer: Tokenizer | None = None, rows: int = 8,
             **sampling: Any) -> list[str]: ...


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
  """Makes an engine that is just large enough.

  Args:
    model: the model.
    tokenizer: its tokenizer.
    tokens: the most tokens of a prompt and its text together. The capacity is a power of two above it, so that prompts of
      similar lengths run the same programs.
    rows: the most prompts decoded at once, rounded up to a multiple of the devices that share them.
    **options: further arguments of `Engine`.
  """
  devices = jax.device_count()
  return Engine(model, tokenizer, rows=-(-rows // devices) * devices, capacity=1 << tokens.bit_length(), **options)

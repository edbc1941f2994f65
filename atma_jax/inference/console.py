"""Text from files, and completions to a terminal or as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
import time

import numpy as np

from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling


def read_text(flag: str, path: str) -> str:
  """The text of the file that a flag names; `UserError` where there is none."""
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--{flag}={path}: {error}") from error


def read_lines(flag: str, path: str) -> list[str]:
  """Its lines, of which there must be one."""
  lines = read_text(flag, path).splitlines()
  if not lines:
    raise UserError(f"--{flag}={path}: holds no line; a prompt a line is needed")
  return lines


def stream_one(engine: Engine, prompt: Sequence[int] | np.ndarray, sampling: Sampling) -> None:
  """Prints the text as it comes, then, to stderr, what the first stride and those after it took."""
  times = [time.perf_counter()]
  for piece in engine.stream([prompt], sampling):
    print(piece.text, end="", flush=True)
    times += [time.perf_counter()] * (piece.token is not None)
  print()
  first, rest = times[: engine.stride + 1], times[engine.stride + 1 :]
  said = f"prompt of {len(prompt)} tokens and {len(first) - 1} of the text in {first[-1] - first[0]:.2f} s with compilation"
  if rest:
    seconds = rest[-1] - first[-1]
    said += f", then {len(rest)} in {seconds:.2f} s: {len(rest) / seconds:.1f} tokens/s"
  print(said, file=sys.stderr)


def complete_all(engine: Engine, prompts: list[str], sampling: Sampling) -> None:
  """Prints a JSON line a prompt, in order, then the speed to stderr; the seed of prompt i is `sampling.seed` + i."""
  start = time.perf_counter()
  samplings = [dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**32) for i in range(len(prompts))]
  completions = engine.generate(prompts, samplings)
  for prompt, completion in zip(prompts, completions):
    print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}))
  seconds, count = time.perf_counter() - start, sum(len(completion.tokens) for completion in completions)
  print(f"{count} tokens in {seconds:.2f} s with compilation: {count / seconds:.1f} tokens/s", file=sys.stderr)

"""Continues prompts with a checkpoint, from its directory alone.

    python -m atma_jax.generate --checkpoint=DIR --prompt="def main(" [--max_tokens=128 --temperature=0.8 --top_p=0.95]
    python -m atma_jax.generate --checkpoint=DIR --prompts_file=FILE > completions.jsonl

A single prompt is streamed to the terminal; a file holds a prompt a line and gives a JSON line for each, in order.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time

from absl import flags

from atma_jax import cli
from atma_jax.config import DTYPES, UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models.retention import with_retention_cap
from atma_jax.training.checkpointing import load_model

_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean,
           tuple: flags.DEFINE_multi_string}
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, its checkpoints folder, or a published checkpoint.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default is the newest good one.")
_EMA = flags.DEFINE_boolean("ema", False, "Use the moving average of the weights (config.train.ema_decay).")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; empty starts a document.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A prompt a line.")
_SAMPLING = {field.name: _DEFINE[type(field.default)](field.name, field.default, field.metadata["help"])
             for field in dataclasses.fields(Sampling)}
_ROWS = flags.DEFINE_integer("rows", 8, "Prompts of a file decoded at once.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 512, "Prompt tokens in one forward pass, a power of two.")
_STRIDE = flags.DEFINE_integer("stride", 8, "Tokens decoded between two looks at the text.", lower_bound=1)
_CAP = cli.define_retention_flags()
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, DTYPES, "Of keys and values; default is the model's.")


def main() -> None:
  if not _CHECKPOINT.value:
    raise UserError("--checkpoint=DIR is required")
  if (_PROMPT.value is None) == (_PROMPTS_FILE.value is None):
    raise UserError("--prompt=TEXT or --prompts_file=FILE is required, and only one of them")
  sampling = Sampling(**{name: tuple(flag.value) if name == "stop" else flag.value for name, flag in _SAMPLING.items()})
  prompts = [_PROMPT.value]
  if _PROMPTS_FILE.value is not None:
    try:
      prompts = pathlib.Path(_PROMPTS_FILE.value).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"--prompts_file={_PROMPTS_FILE.value}: {error}") from error
    if not prompts:
      raise UserError(f"--prompts_file={_PROMPTS_FILE.value}: holds no line; a prompt a line is needed")
  _, model, tokenizer, _ = load_model(_CHECKPOINT.value, _STEP.value, ema=_EMA.value)
  capacity = 1 << (max(len(tokenizer.encode(prompt)) for prompt in prompts) + sampling.max_tokens).bit_length()
  engine = Engine(with_retention_cap(model, _CAP()), tokenizer, rows=min(_ROWS.value, len(prompts)), capacity=capacity,
                  chunk=_CHUNK.value, stride=_STRIDE.value, cache_dtype=_CACHE_DTYPE.value)
  times = [time.perf_counter()]
  if _PROMPTS_FILE.value is None:
    for piece in engine.stream(prompts, sampling):
      print(piece.text, end="", flush=True)
      times += [time.perf_counter()] * (piece.token is not None)
    print()
    first = times[: engine.stride + 1]  # with prefill and compilation
    print(f"{len(first) - 1} tokens after {first[-1] - first[0]:.2f} s, then {len(times) - len(first)} in "
          f"{times[-1] - first[-1]:.2f} s", file=sys.stderr)
  else:
    seeds = [dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**32) for i in range(len(prompts))]
    completions = engine.generate(prompts, seeds)
    for prompt, completion in zip(prompts, completions):
      print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}))
    seconds, count = time.perf_counter() - times[0], sum(len(completion.tokens) for completion in completions)
    print(f"{count} tokens in {seconds:.2f} s with compilation: {count / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)

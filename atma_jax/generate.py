"""Continues prompts with a checkpoint, from its directory alone.

    python -m atma_jax.generate --checkpoint=DIR --prompt="def main(" [--max_tokens=128 --temperature=0.8 --top_p=0.95]
    python -m atma_jax.generate --checkpoint=DIR --prompts_file=FILE > completions.jsonl
    python -m atma_jax.generate --checkpoint=DIR --prompt_file=BOOK --save_state=STATE; ... --load_state=STATE --prompt=QUESTION

A single prompt is streamed to the terminal. A file of prompts holds one per line, and each becomes a JSON line, in order. With
--chat every line that is typed is a message, and Ctrl-D ends the conversation.
"""

from __future__ import annotations

import sys

from absl import flags
import numpy as np

from atma_jax import cli, compilation_cache
from atma_jax.checkpoints.load import load_model
from atma_jax.dataclass_flags import DataclassFlags
from atma_jax.errors import UserError
from atma_jax.inference.api import engine_for
from atma_jax.inference.console import announce_compiling, complete_all, converse, read_prompts, stream_one
from atma_jax.inference.sampling import Sampling
from atma_jax.inference.saved_state import stored_tokens
from atma_jax.models.cache import CACHE_DTYPES

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, its checkpoints folder, a published checkpoint, or "
                                  "hf:USER/NAME.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default is the newest good one.")
_EMA = flags.DEFINE_boolean("ema", False, "Use the moving average of the weights (config.train.ema_decay).")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; empty starts a document.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File whose text is continued.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "File with one prompt per line.")
_CHAT = flags.DEFINE_boolean("chat", False, "Hold a conversation: every line of the input is a message of the user.")
_LOAD_STATE = flags.DEFINE_string("load_state", None, "File written by --save_state, whose prompt comes before the one given.")
_SAVE_STATE = flags.DEFINE_string("save_state", None, "File to write the state after the prompt to.")
_SAMPLING = DataclassFlags(Sampling, repeated=("stop",))
_ROWS = flags.DEFINE_integer("rows", 8, "Most prompts of a file decoded at once.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 512, "Most prompt tokens in one forward pass, a power of two.")
_FIRST_CHUNK = flags.DEFINE_integer("first_chunk", None, "The same for the first pass of a prompt; default is --chunk.")
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 8, "Tokens decoded before the text is looked at.", lower_bound=1)
flags.DEFINE_alias("stride", "decode_steps")  # its earlier name
_OVERRIDES = cli.define_override_flags()
_CACHE = flags.DEFINE_string("compilation_cache", "auto", compilation_cache.HELP)
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, CACHE_DTYPES, "Type of keys and values; default is the model's.")


def main() -> None:
  """Prints the text that continues a prompt. Raises `UserError` on bad flags, checkpoints and saved states."""
  if not _CHECKPOINT.value:
    raise UserError("--checkpoint=DIR is required")
  sampling, states = _SAMPLING.value, bool(_LOAD_STATE.value or _SAVE_STATE.value)
  prompts = read_prompts(_PROMPT.value, _PROMPT_FILE.value, _PROMPTS_FILE.value, chat=_CHAT.value, states=states)
  compilation_cache.use_compilation_cache(_CACHE.value)
  config, model, tokenizer, _ = load_model(_CHECKPOINT.value, _STEP.value, ema=_EMA.value, overrides=_OVERRIDES.values())
  announce_compiling()
  if _CHAT.value:
    return converse(model, tokenizer, sampling, sys.stdin, chunk=_CHUNK.value, cache_dtype=_CACHE_DTYPE.value)
  before = stored_tokens(_LOAD_STATE.value, config.model) if _LOAD_STATE.value else np.zeros(0, np.int32)
  tokens = len(before) + max(len(tokenizer.encode(p)) for p in prompts) + sampling.max_tokens
  engine = engine_for(model, tokenizer, tokens, min(_ROWS.value, len(prompts)), chunk=_CHUNK.value, prefixes=1,
                      saved_states=states, first_chunk=_FIRST_CHUNK.value, decode_steps=_DECODE_STEPS.value,
                      cache_dtype=_CACHE_DTYPE.value)
  if _PROMPTS_FILE.value is not None:
    return complete_all(engine, prompts, sampling)
  if _LOAD_STATE.value:
    engine.load(_LOAD_STATE.value)
  if len(prompt := np.concatenate([before, tokenizer.encode(prompts[0])])) == len(before) > 0:
    raise UserError("--load_state: needs a prompt of at least one token that continues it")
  prompt = engine.check(prompt, sampling)
  if _SAVE_STATE.value:
    engine.save(_SAVE_STATE.value, prompt)
  return stream_one(engine, prompt, sampling)


if __name__ == "__main__":
  cli.run(main)

"""The terminal side of ``generate``: prompts from files, completions as streamed text or as JSON lines."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import json
import logging
import pathlib
import sys
import time
from typing import Any

from atma_jax.data.chat_template import Message, template_of
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.inference.api import engine_for
from atma_jax.inference.engine import Engine, Prompt
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.ops.core.dispatch import LOGGER as DISPATCH_LOGGER

_CONVERSATION = 2000  # tokens of a conversation on the terminal, without the last answer


def read_text(flag: str, path: str) -> str:
  """Reads the file that a flag names. Raises `UserError` if it is missing or not UTF-8."""
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--{flag}={path}: {error}") from error


def read_lines(flag: str, path: str) -> list[str]:
  """Reads the lines of the file that a flag names. Raises `UserError` if there are none, as `read_text` does."""
  lines = read_text(flag, path).splitlines()
  if not lines:
    raise UserError(f"--{flag}={path}: is empty; write one prompt per line")
  return lines


def read_prompts(prompt: str | None, prompt_file: str | None, prompts_file: str | None, *, chat: bool, states: bool) -> list[str]:
  """The prompts that one of the three flags gives, or an empty one with ``--chat``.

  Raises:
    UserError: as `read_text` and `read_lines` do; none or several of the four flags; several prompts with saved states.
  """
  if sum(value is not None for value in (prompt, prompt_file, prompts_file)) + chat != 1:
    raise UserError("--prompt=TEXT, --prompt_file=FILE, --prompts_file=FILE or --chat is required, and only one of them")
  if states and (chat or prompts_file is not None):
    raise UserError("--load_state and --save_state take one prompt, so they cannot be used with --prompts_file or --chat")
  if prompts_file is not None:
    return read_lines("prompts_file", prompts_file)
  return [read_text("prompt_file", prompt_file) if prompt_file is not None else prompt or ""]


def announce_compiling() -> None:
  """Says on stderr that programs are compiled now, and keeps the log of their kernels out of the text."""
  logging.getLogger(DISPATCH_LOGGER).setLevel(logging.WARNING)
  print("compiling the programs that read prompts and decode, unless they are kept from an earlier call ...", file=sys.stderr,
        flush=True)


def stream_one(engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
  """Prints the text as it arrives, then, to stderr, the time of the first decoding program and the speed after it."""
  times = [time.perf_counter()]
  for output in engine.stream([prompt], sampling):
    print(output.text, end="", flush=True)
    times += [time.perf_counter()] * (output.token is not None)
  print()
  first, rest = times[: engine.decode_steps + 1], times[engine.decode_steps + 1 :]
  summary = f"prompt of {len(prompt)} tokens and {len(first) - 1} of the text in {first[-1] - first[0]:.2f} s with compilation"
  if rest:
    seconds = rest[-1] - first[-1]
    summary += f", then {len(rest)} in {seconds:.2f} s: {len(rest) / seconds:.1f} tokens/s"
  print(summary, file=sys.stderr)


def converse(model: Atma, tokenizer: Tokenizer, sampling: Sampling, lines: Iterable[str], **options: Any) -> None:
  """Answers every line as the next message of one conversation; the text before it is not read again.

  Args:
    model: the model.
    tokenizer: its tokenizer.
    sampling: of every answer; answer i draws from the seed `sampling.seed` + i.
    lines: what the user says. Empty lines are passed over.
    **options: further arguments of `Engine`.

  Raises:
    UserError: the checkpoint has no chat template, or the conversation has become too long.
  """
  template, messages = template_of(tokenizer), []
  engine = engine_for(model, tokenizer, _CONVERSATION + sampling.max_tokens, 1, prefixes=1, saved_states=False, **options)
  for line in map(str.strip, lines):
    if line:
      messages.append(Message("user", line))
      prompt = engine.check(template.prompt(messages, tokenizer), sampling)
      answer = ""
      for output in engine.stream([prompt], dataclasses.replace(sampling, seed=(sampling.seed + len(messages) // 2) % 2**32)):
        print(output.text, end="", flush=True)
        answer += output.text
      print()
      messages.append(Message("assistant", answer))


def complete_all(engine: Engine, prompts: list[str], sampling: Sampling) -> None:
  """Prints one JSON line per prompt, in order, then the speed to stderr. Prompt i draws from the seed `sampling.seed` + i."""
  start = time.perf_counter()
  completions = engine.generate(prompts, sampling.spread(len(prompts)))
  for prompt, completion in zip(prompts, completions):
    print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}))
  seconds, count = time.perf_counter() - start, sum(len(completion.tokens) for completion in completions)
  print(f"{count} tokens in {seconds:.2f} s with compilation: {count / seconds:.1f} tokens/s", file=sys.stderr)

"""What an evaluation measures and within what limits; every field is a flag of ``python -m atma_jax.evaluate``."""

from __future__ import annotations

import dataclasses
from typing import Any

from atma_jax.config import COUNT_LENGTHS, RetentionCap, retention_cap
from atma_jax.errors import UserError


def _option(default: Any, description: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": description})


def _require_positive(options: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(options, name)
    if value is not None and not value > 0:
      raise UserError(f"--{prefix}{name}={value}: must be greater than 0")


@dataclasses.dataclass(frozen=True)
class BabilongOptions:
  """Data and fine-tuning of suite ``babilong``; lengths are the names of its files, such as 0k and 128k."""

  train: str = _option("", "Folder of TASK/LENGTH.json to fine-tune on.")
  test: str = _option("", "Folder of TASK/LENGTH.json to answer.")
  tasks: tuple[str, ...] = _option(("qa1",), "Tasks.")
  train_lengths: tuple[str, ...] = _option(("0k", "1k", "2k"), "Lengths to fine-tune on.")
  test_lengths: tuple[str, ...] = _option(("0k", "1k", "2k", "4k", "8k"), "Lengths to answer at.")
  examples: int = _option(100, "Questions of a test file.")
  steps: int = _option(300, "Fine-tuning steps.")
  batch_size: int = _option(8, "Questions a fine-tuning step.")
  learning_rate: float = _option(3e-4, "Of Adam, constant.")

  def __post_init__(self):
    _require_positive(self, "babilong_", "examples", "steps", "batch_size", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  suite: tuple[str, ...] = _option(("loss", "needle"), "Suites to run.")
  multiples: tuple[int, ...] = _option((1, 2, 4, 8), "Context lengths, in multiples of the training length.")
  step: int | None = _option(None, "Checkpoint step; default is the newest good one.")
  ema: bool = _option(False, "Evaluate the moving average of the weights (config.train.ema_decay).")
  data: str = _option("", "Prepared data; default is what the checkpoint was trained on.")
  trials: int = _option(24, "Needles a distance.")
  retrieval_trials: int = _option(50, "Trials a cell of the retrieval grid.")
  depths: tuple[float, ...] = _option((10.0, 50.0, 90.0), "Depths of the retrieval grid, in percent.")
  bpb_span: int = _option(0, "Tokens whose bits per byte are measured; 0 is 512, or half the shortest length if that is less.")
  seed: int = _option(0, "Of needles and fine-tuning.")
  batch_tokens: int = _option(8192, "Tokens in a device's batch.")
  chunk: int = _option(512, "Time steps whose logits exist at once.")
  prefill_chunk: int = _option(65_536, "Most tokens of a row in one pass; longer rows are read in pieces of up to 16384.")
  memory_gib: float | None = _option(None, "Most that a program may take on a device; default is what is free.")
  context: int = _option(1, "Devices over which a sequence is split; a divisor of all.")
  keep_window: bool = _option(False, "Keep the attention window of training; else every key is seen.")
  null_length: int | None = _option(None, COUNT_LENGTHS["null_length"])
  count_length: int | None = _option(None, COUNT_LENGTHS["count_length"])
  retention_cap: float | None = _option(None, "Half-life in tokens that the memory is held to; default is none.")
  retention_heads: str = _option("all", "Heads held to it: all, worst, or LAYER:HEAD pairs such as 6:3,10:1.")
  retention_cap_sweep: tuple[str, ...] = _option((), "Caps to compare, each by itself, such as none,256,1024.")
  min_documents: int = _option(4, "Fewest documents as long as the longest length.")
  max_documents: int | None = _option(None, "Held-out documents read, the longest first; default is all.")
  stream_windows: int = _option(8, "Windows of the longest length that are read of the validation stream.")

  def __post_init__(self):
    _require_positive(self, "", "trials", "retrieval_trials", "batch_tokens", "chunk", "prefill_chunk", "memory_gib",
                      "min_documents", "max_documents", "stream_windows", "context")
    if not self.multiples or min(self.multiples) < 1:
      raise UserError(f"--multiples={','.join(map(str, self.multiples))}: must be whole numbers, each at least 1")
    if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
      raise UserError(f"--depths={','.join(f'{d:g}' for d in self.depths)}: must be percentages from 0 to 100")
    for name in COUNT_LENGTHS:
      if (length := getattr(self, name)) is not None and length < 0:
        raise UserError(f"--{name}={length}: must be a number of keys, or 0 for no end")
    if self.seed < 0 or self.bpb_span < 0:
      raise UserError(f"--seed={self.seed}, --bpb_span={self.bpb_span}: must be at least 0")
    self.caps()

  def caps(self) -> tuple[RetentionCap | None, ...]:
    """The retention caps to evaluate under, each by itself; None leaves the memory as it is."""
    if self.retention_cap_sweep and self.retention_cap is not None:
      raise UserError("--retention_cap and --retention_cap_sweep: only one of them can be given")
    if not self.retention_cap_sweep:
      return (retention_cap(self.retention_cap, self.retention_heads),)
    try:
      return tuple(None if text == "none" else RetentionCap(float(text), self.retention_heads)
                   for text in self.retention_cap_sweep)
    except ValueError as error:
      raise UserError(f"--retention_cap_sweep={','.join(self.retention_cap_sweep)}: must be half-lives in tokens or none, such "
                      "as none,256,1024") from error

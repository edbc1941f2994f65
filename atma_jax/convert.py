"""Converts checkpoints between the published PyTorch format, safetensors for transformers, and this package's own format.

    python -m atma_jax.convert --input=PUBLISHED --output=WORKDIR [--tokenizer=tokenizer.json]
    python -m atma_jax.convert --input=WORKDIR --output=DIR --format=pytorch|safetensors [--step=N] [--lossy]

The format of the input is recognised by its files. Weights are copied bit for bit. PyTorch is not needed. What the
public code would compute otherwise is named and refused; `--lossy` writes it in fields and tensor names that only this package
reads.
"""

from __future__ import annotations

import pathlib
import time

from absl import flags, logging

from atma_jax import cli
from atma_jax.checkpoints.load import load_model
from atma_jax.checkpoints.store import save_model
from atma_jax.errors import UserError
from atma_jax.pytorch import FORMATS, is_published, read_published, write_published

_INPUT = flags.DEFINE_string("input", None, "A published checkpoint (weights.pt or *.safetensors), or a training workdir.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; new or empty.")
_FORMAT = flags.DEFINE_enum("format", None, ("atma", *FORMATS),
                            "Format to write. Default: atma for a published input, pytorch for a training workdir.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None,
                                "Tokenizer of a published input: tokenizer.json or SentencePiece .model. Default: its own.")
_EMA = flags.DEFINE_boolean("ema", False, "Convert the exponential moving average of the weights (config.train.ema_decay).")
_LOSSY = flags.DEFINE_boolean("lossy", False, "Write a published format even where the public code would compute otherwise, such "
                              "as for null_length, max_half_life or foreign kinds of block.")
_STEP = flags.DEFINE_integer("step", None, "Step of a training workdir to convert. Default: the newest good one.")


def main() -> None:
  """Converts `--input` to `--output`; raises UserError on bad flags, and on bad checkpoints, naming the tensor."""
  source, target = _INPUT.value, _OUTPUT.value
  if not source or not target:
    raise UserError(f"--{'output' if source else 'input'}=DIR is required")
  if not pathlib.Path(source).is_dir():
    raise UserError(f"--input={source}: no such directory")
  kind = _FORMAT.value or ("atma" if is_published(source) else "pytorch")
  if kind == "atma" and _LOSSY.value:
    raise UserError("--lossy: --format=atma carries everything; leave it out")
  started = time.perf_counter()
  if is_published(source):
    if _STEP.value or _EMA.value:
      raise UserError("--step, --ema: a published checkpoint has one step, 0, and no average")
    (config, model, tokenizer), step = read_published(source, _TOKENIZER.value), 0
  else:
    if _TOKENIZER.value is not None:
      raise UserError("--tokenizer: a training workdir holds the tokenizer it was trained with; leave it out")
    config, model, tokenizer, step = load_model(source, _STEP.value, ema=_EMA.value)
  if kind == "atma":
    save_model(target, config, model, tokenizer, step)
  else:
    write_published(target, kind, config, model, tokenizer, step, _LOSSY.value)
  logging.info("%s: written as %s in %.1f s", target, kind, time.perf_counter() - started)


if __name__ == "__main__":
  cli.run(main)

"""Converts checkpoints between this package's own format, the published PyTorch format, and directories for transformers.

    python -m atma_jax.convert --input=PUBLISHED --output=WORKDIR [--tokenizer=tokenizer.json]
    python -m atma_jax.convert --input=WORKDIR --output=DIR --format=transformers [--step=N] [--push=USER/NAME --private]
    python -m atma_jax.convert --input=WORKDIR --output=DIR --format=pytorch|safetensors [--step=N] [--lossy]

The format of the input is recognised by its files; hf:USER/NAME reads it from the Hugging Face hub. Weights are copied bit for
bit. PyTorch is not needed. What the public PyTorch code would compute otherwise is named and refused; `--lossy` writes it in
fields and tensor names that only this package reads. `--format=transformers` carries everything: its modelling code is ours.
"""

from __future__ import annotations

import pathlib
import time

from absl import flags, logging

from atma_jax import cli
from atma_jax.checkpoints.load import load_model
from atma_jax.checkpoints.model_hub import check_push_name, located, push_directory
from atma_jax.checkpoints.store import save_model
from atma_jax.errors import UserError
from atma_jax.pytorch import FORMATS, is_published, read_published, write_published

_INPUT = flags.DEFINE_string("input", None, "A published checkpoint (weights.pt or *.safetensors), or a training workdir; may be "
                             "hf:USER/NAME[@REVISION]. --checkpoint is the same.")
flags.DEFINE_alias("checkpoint", "input")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; new or empty.")
_FORMAT = flags.DEFINE_enum("format", None, ("atma", *FORMATS),
                            "Format to write. Default: atma for a published input, pytorch for a training workdir.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None,
                                "Tokenizer of a published input: tokenizer.json or SentencePiece .model. Default: its own.")
_EMA = flags.DEFINE_boolean("ema", False, "Convert the exponential moving average of the weights (config.train.ema_decay).")
_LOSSY = flags.DEFINE_boolean("lossy", False, "Write a published format even where the public code would compute otherwise, such "
                              "as for null_length, max_half_life or foreign kinds of block.")
_PUSH = flags.DEFINE_string("push", None, "USER/NAME: upload --output to the Hugging Face hub, with the token of HF_TOKEN.")
_PRIVATE = flags.DEFINE_boolean("private", False, "With --push: make the model private, if it is made.")
_STEP = flags.DEFINE_integer("step", None, "Step of a training workdir to convert. Default: the newest good one.")


def main() -> None:
  """Converts `--input` to `--output`; raises UserError on bad flags, and on bad checkpoints, naming the tensor."""
  source, target = _INPUT.value, _OUTPUT.value
  if not source or not target:
    raise UserError(f"--{'output' if source else 'input'}=DIR is required")
  if _PUSH.value is not None:
    check_push_name(_PUSH.value)
  elif _PRIVATE.value:
    raise UserError("--private: only with --push=USER/NAME")
  source, _ = located(source)
  if not pathlib.Path(source).is_dir():
    raise UserError(f"--input={source}: no such directory")
  kind = _FORMAT.value or ("atma" if is_published(source) else "pytorch")
  if kind in ("atma", "transformers") and _LOSSY.value:
    raise UserError(f"--lossy: --format={kind} carries everything; leave it out")
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
  if _PUSH.value is not None:
    print(push_directory(target, _PUSH.value, _PRIVATE.value))


if __name__ == "__main__":
  cli.run(main)

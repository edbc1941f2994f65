"""Evaluates a checkpoint from its directory alone, past the training length.

    python -m atma_jax.evaluate --checkpoint=DIR --suite=loss,needle --output=DIR [--multiples=1,2,4,8]

Appends ``results.jsonl``, prints a table, draws PNG plots. Run again, it computes only what is not recorded yet.
"""

from __future__ import annotations

from absl import flags

from atma_jax import cli
from atma_jax.config import UserError
from atma_jax.evaluation.runner import SUITES, Options, evaluate

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, its checkpoints folder, or a published checkpoint.")
_SUITE = flags.DEFINE_list("suite", ["loss", "needle"], f"Suites to run: {', '.join(SUITES)}.")
_OUTPUT = flags.DEFINE_string("output", None, "Where results.jsonl and the plots go.")
_MULTIPLES = flags.DEFINE_list("multiples", ["1", "2", "4", "8"], "Context lengths, in multiples of the training length.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default is the newest good one.")
_DATA = flags.DEFINE_string("data", "", "Prepared data; default is what the checkpoint was trained on.")
_TRIALS = flags.DEFINE_integer("trials", 24, "Needles a distance.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the needles.", lower_bound=0)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 8192, "Tokens in a device's batch.", lower_bound=1)
_MIN_DOCUMENTS = flags.DEFINE_integer("min_documents", 4, "Fewest documents as long as the longest length.", lower_bound=1)
_RETENTION = cli.define_retention_flags()
_SWEEP = flags.DEFINE_list("retention_cap_sweep", None, "Caps to compare, each by itself: none,256,1024.")


def main() -> None:
  for flag in (_CHECKPOINT, _OUTPUT):
    if not flag.value:
      raise UserError(f"--{flag.name}=DIR is required")
  try:
    multiples = tuple(int(m) for m in _MULTIPLES.value)
  except ValueError as error:
    raise UserError(f"--multiples={','.join(_MULTIPLES.value)}: must be whole numbers such as 1,2,4,8") from error
  options = Options(suites=tuple(_SUITE.value), multiples=multiples, step=_STEP.value, data=_DATA.value, trials=_TRIALS.value,
                    retention_caps=(_RETENTION.value,) if _SWEEP.value is None else _RETENTION.sweep(_SWEEP.value),
                    seed=_SEED.value, batch_tokens=_BATCH_TOKENS.value, min_documents=_MIN_DOCUMENTS.value)
  evaluate(_CHECKPOINT.value, _OUTPUT.value, options)


if __name__ == "__main__":
  cli.run(main)

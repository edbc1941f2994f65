"""Trains a recipe: ``python -m atma_jax.train --config=configs/quickstart.py --workdir=DIR [--config.FIELD=VALUE ...]``.

Prepares the data if the working directory holds none, resumes the newest good checkpoint if there is one, and says that
it is done when there is nothing left. Exit codes: 0 done, 2 bad input, 75 pre-empted after saving.
"""

from __future__ import annotations

from absl import flags

from atma_jax import cli
from atma_jax.config import UserError
from atma_jax.distributed import DistributedFlags
from atma_jax.training.loop import PREEMPTED, train

_CONFIG = cli.define_config_flag()
_DISTRIBUTED = DistributedFlags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and prepared data go.")


def main() -> int:
  if not _WORKDIR.value:
    raise UserError("--workdir=DIR is required: where checkpoints, metrics and prepared data go")
  config = _CONFIG.value
  _DISTRIBUTED.initialize()
  return cli.EXIT_PREEMPTED if train(config, _WORKDIR.value) == PREEMPTED else 0


if __name__ == "__main__":
  cli.run(main)

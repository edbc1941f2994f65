"""Trains a recipe: ``python -m atma_jax.train --config=quickstart --workdir=DIR [--config.FIELD=VALUE ...]``.

Prepares the data if the working directory holds none, goes on from the newest good checkpoint if there is one, and says so if
there is nothing left to do. Compiled programs are kept in ``WORKDIR/xla_cache``, so that a restart does not compile them again.
``--check`` only looks for what would make the run fail.
Exit codes: 0 done, 1 a failure that a restart may mend, 2 bad input, 75 pre-empted and 130 interrupted (Ctrl-C) after saving.
"""

from __future__ import annotations

from absl import flags

from atma_jax import cli
from atma_jax.distributed_flags import DistributedFlags
from atma_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_DISTRIBUTED = DistributedFlags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of checkpoints, metrics and prepared data; may be gs://BUCKET/PATH if "
                               "config.data.directory is set.")
_CACHE = flags.DEFINE_string("compilation_cache", "auto", "Directory of compiled programs; auto is JAX_COMPILATION_CACHE_DIR if "
                             "that is set, otherwise WORKDIR/xla_cache; off keeps none.")
_CHECK = flags.DEFINE_bool("check", False,
                           "Only look for what would make the run fail, a line for each check; nothing is trained.")
_CHECK_FOR = flags.DEFINE_string("check_for", None, "With --check: the devices of the run, KIND:DEVICES[:SLICES], such as "
                                 "v6e:16; default is those of this machine.")
_ELSEWHERE = flags.DEFINE_string("check_elsewhere", None, "With --check: the run is on other machines, which have these extras, "
                                 "such as tpu; their files are not looked for here.")
_WANDB = flags.DEFINE_string("wandb", None, "Project of Weights & Biases that gets the metrics too (extra wandb); its own "
                             "variables such as WANDB_MODE=offline count.")


def main() -> int:
  """Trains to the last step; returns the exit code, 75 or 130 if SIGTERM or Ctrl-C came first. Raises UserError for bad input."""
  if not _WORKDIR.value:
    raise UserError("--workdir=DIR is required: where checkpoints, metrics and prepared data go")
  config = _CONFIG.value
  if _CHECK.value:
    return check(_WORKDIR.value)
  for flag in (_CHECK_FOR, _ELSEWHERE):
    if flag.present:
      raise UserError(f"--{flag.name}={flag.value}: is for --check")
  from atma_jax.compilation_cache import use_compilation_cache  # only now, because a mistyped flag should be answered at once
  from atma_jax.training.loop import train
  _DISTRIBUTED.initialize()
  use_compilation_cache(_CACHE.value, _WORKDIR.value)
  return cli.ENDED.get(train(config, _WORKDIR.value, wandb=_WANDB.value), 0)


def check(workdir: str) -> int:
  """Prints a line for every check, and what they come to."""
  from atma_jax.training import preflight
  target = preflight.Target.parse(_CHECK_FOR.value, _ELSEWHERE.value)
  open_questions = 0
  for line in preflight.check(_CONFIG.value, workdir, target, wandb=_WANDB.value, processes=_DISTRIBUTED.processes):
    print(line, flush=True)
    open_questions += line.startswith("not checked")
  print("checked: nothing was found that would make the run fail" + f"; {open_questions} not checked" * (open_questions > 0))
  return 0


if __name__ == "__main__":
  cli.run(main)

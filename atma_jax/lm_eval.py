"""The lm-evaluation-harness with the model ``atma_jax``, which reads the checkpoints of this package.

    python -m atma_jax.lm_eval --model_args checkpoint=DIR --tasks lambada_openai,hellaswag --batch_size auto

The command line is that of ``lm_eval`` (extra ``eval``); ``--model atma_jax`` is implied.
"""

from __future__ import annotations

import importlib.util
import sys

from atma_jax.cli import bad_input
from atma_jax.errors import UserError


def main() -> None:
  """Runs the harness's command line with the model `atma_jax` registered; exit code 2 for bad input or a missing harness."""
  if importlib.util.find_spec("lm_eval") is None:
    bad_input("the lm-evaluation-harness is not installed: pip install 'atma_jax[eval]'")
  if len(sys.argv) == 1:
    bad_input("--model_args checkpoint=DIR and --tasks NAME,... are required (see --help)")
  from lm_eval._cli import HarnessCLI
  from lm_eval.utils import setup_logging

  from atma_jax.evaluation import lm_eval_adapter  # registers the model  # noqa: F401

  runs = len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help", "ls", "validate")
  if runs and not any(argument in ("-M", "--model") or argument.startswith("--model=") for argument in sys.argv):
    sys.argv += ["--model", "atma_jax"]
  setup_logging()
  parser = HarnessCLI()
  try:
    parser.execute(parser.parse_args())
  except UserError as error:
    bad_input(error)
  except ValueError as error:
    if not str(error).startswith(("Tasks not found", "No tasks specified")):
      raise
    bad_input(f"--tasks: {error} `ls tasks` lists those of the harness, --include_path=DIR adds your own")


if __name__ == "__main__":
  main()

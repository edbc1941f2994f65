"""Trains and evaluates a grid of runs: ``python -m atma_jax.ablate --config=RECIPE --preset=paper120 --output=DIR``.

    --axis model.attention=polar,nope --axis model.memory.enabled=true,false --seeds=0,1    axes over any field
    --list                            prints the cell ids
    --output=DIR                      runs cells that no other worker runs, resumes, reports; without a grid: every cell in DIR
    --jobs=slurm --launch=--time=4:00:00 [--dry_run]    submits one job per cell instead

Exit codes: 0 done, 1 some cells failed, all others are done (2 if they failed for bad input), 2 bad input, 75 or 130 told to end.
"""

from __future__ import annotations

import pathlib

from absl import flags

from atma_jax import cli
from atma_jax.ablation import grid, jobs, sweep
from atma_jax.ablation.worker import FAILED, Worker, cell_command
from atma_jax.config import Config
from atma_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_PRESET = flags.DEFINE_string("preset", None, f"A grid by name: {', '.join(grid.PRESETS)}.")
_AXIS = flags.DEFINE_multi_string("axis", [], "FIELD=VALUE,VALUE,...: an axis over a field of the configuration.")
_SEEDS = flags.DEFINE_list("seeds", [], "Seeds, as one more axis.")
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "LABEL,LABEL,...: leaves out the cells that have all of these labels.")
_LIST = flags.DEFINE_bool("list", False, "Print the cell ids and end.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the sweep, shared by all workers.")
_CELLS = flags.DEFINE_list("cells", [], "Only these cell ids.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Cells at a time on this machine, each in its own process.", lower_bound=1)
_GPUS = flags.DEFINE_list("gpus", [], "GPU ids; every cell sees one of them, e.g. --gpus=0,1,2,3 --parallel=4.")
_RETRY = flags.DEFINE_bool("retry_failed", False, "Retry the cells that failed.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the report over the cells that are done.")
_JOBS = flags.DEFINE_enum("jobs", None, tuple(jobs.LAUNCHERS), "Submit one job per cell.")
_LAUNCH = flags.DEFINE_multi_string("launch", [], "An option of the launcher, e.g. --launch=--partition=gpu.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands of the jobs instead of running them.")
_SUITE = flags.DEFINE_list("suite", list(sweep.Evaluation.suite), "Evaluation suites.")
_MULTIPLES = flags.DEFINE_list("multiples", [*map(str, sweep.Evaluation.multiples)], "Contexts, in training lengths.")
_TRIALS = flags.DEFINE_integer("trials", sweep.Evaluation.trials, "Trials of every cell of the retrieval suites.", lower_bound=1)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", sweep.Evaluation.batch_tokens, "Tokens in a batch.", lower_bound=1)
_DOCUMENTS = flags.DEFINE_integer("min_documents", sweep.Evaluation.min_documents, "Fewest full-length documents.", lower_bound=1)
_RUN_CELL = flags.DEFINE_string("run_cell", None, "Used by the worker itself: the folder of the cell that this process runs.")


def main() -> int | None:
  """Runs, lists, submits or reports cells, as the flags say; returns the exit code. Raises UserError on bad flags."""
  if _RUN_CELL.value:
    from atma_jax.ablation.cell_process import run_cell  # imports JAX, which a worker must not: it would take the devices
    return cli.ENDED.get(run_cell(_RUN_CELL.value), 0)
  cli.refuse_empty(_SEEDS, _CELLS, _GPUS, _SUITE, _MULTIPLES)
  evaluation = sweep.Evaluation(tuple(_SUITE.value), cli.whole_numbers("multiples", _MULTIPLES.value), _TRIALS.value,
                                _BATCH_TOKENS.value, _DOCUMENTS.value)
  axes, exclude = grid.preset(_PRESET.value) if _PRESET.value else ([], ())
  axes += [grid.parse_axis(text, cli.parse_field) for text in _AXIS.value]
  axes += [grid.seed_axis(cli.whole_numbers("seeds", _SEEDS.value))] if _SEEDS.value else []
  cells = []
  if axes or _CONFIG.given or _LIST.value:
    cells = grid.expand(axes, _CONFIG.value if _CONFIG.given or not _LIST.value else Config(), [*exclude, *_EXCLUDE.value])
  if _LIST.value:
    return print("\n".join(cell.id for cell in cells))
  if not _OUTPUT.value:
    raise UserError("--output=DIR is required: the directory of the sweep")
  directory = pathlib.Path(_OUTPUT.value)
  folders = (sweep.create(directory, sweep.select_cells(cells, _CELLS.value, directory), evaluation) if cells
             else sweep.select_cells(sweep.find(directory), _CELLS.value, directory))
  if _JOBS.value:
    return jobs.submit(_JOBS.value, folders, _OUTPUT.value, _LAUNCH.value, dry_run=_DRY_RUN.value)
  worker = Worker(folders, cell_command("atma_jax.ablate"), parallel=_PARALLEL.value, retry_failed=_RETRY.value, gpus=_GPUS.value)
  outcome = None if _REPORT.value else worker.run()
  if outcome not in cli.ENDED and (_REPORT.value or any(cell.done for cell in sweep.find(directory))):
    from atma_jax.ablation import summary  # imports SciPy and matplotlib, for which a mistyped flag should not wait
    summary.write_summary(directory, sweep.find(directory))
  return cli.ENDED.get(outcome or "", sweep.failure_exit_code(folders) if outcome == FAILED else 0)


if __name__ == "__main__":
  cli.run(main)

"""Evaluates a checkpoint from its directory alone, at and past its training length.

    python -m atma_jax.evaluate --checkpoint=DIR --suite=loss,needle --output=DIR [--multiples=1,2,4,8] [--report]

Appends to ``results.jsonl``, prints tables and draws PNG plots. Run again, it computes only what is not recorded yet. With
``--report`` it also writes ``report.html`` over ``results.jsonl`` and the files of ``--compare``; without a ``--checkpoint``
it does only that.
"""

from __future__ import annotations

import pathlib

from absl import flags

from atma_jax import cli
from atma_jax.compilation_cache import HELP, use_compilation_cache
from atma_jax.dataclass_flags import DataclassFlags
from atma_jax.distributed_flags import DistributedFlags
from atma_jax.errors import UserError
from atma_jax.evaluation.api import evaluate
from atma_jax.evaluation.options import option_owners, parse_caps
from atma_jax.evaluation.report.page import write_report
from atma_jax.evaluation.suites import all_suites

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, its checkpoints folder, a published checkpoint, or "
                                  "hf:USER/NAME.")
_OUTPUT = flags.DEFINE_string("output", None, "Where results.jsonl, the plots and the report go.")
_REPORT = flags.DEFINE_boolean("report", False, "Write OUTPUT/report.html.")
_COMPARE = flags.DEFINE_list("compare", [], "More results.jsonl files, for the report.")
_CAPS = flags.DEFINE_list("retention_cap_sweep", [], "Retention caps to compare, each on its own, such as none,256,1024.")
_DISTRIBUTED = DistributedFlags()
_OVERRIDES = cli.define_override_flags()
_CACHE = flags.DEFINE_string("compilation_cache", "auto", HELP)
_OPTIONS = [DataclassFlags(options) for _, options in option_owners()]
flags.FLAGS["suite"].help += " " + "; ".join(f"{name}: {suite.help}" for name, suite in all_suites().items()) + "."


def main() -> None:
  """Runs the suites, goes on where results end, and writes report and plots. Raises UserError on bad flags and checkpoints."""
  checkpoint, output = _CHECKPOINT.value, _OUTPUT.value
  if not output:
    raise UserError("--output=DIR is required")
  if not checkpoint and not _REPORT.value:
    raise UserError("--checkpoint=DIR is required")
  if _COMPARE.value and not _REPORT.value:
    raise UserError(f"--compare={','.join(_COMPARE.value)}: is for --report")
  overrides = _OVERRIDES.values(heads_alone=bool(_CAPS.value))
  caps = parse_caps(_CAPS.value, _OVERRIDES.heads)
  options = {name: value for group in _OPTIONS for name, value in group.values().items()}
  _DISTRIBUTED.initialize()
  use_compilation_cache(_CACHE.value)
  if checkpoint:
    evaluate(checkpoint, output, overrides=overrides, retention_caps=caps, **options)
  if _REPORT.value and _DISTRIBUTED.first:
    folder = pathlib.Path(output)
    write_report([folder / "results.jsonl", *map(pathlib.Path, _COMPARE.value)], folder / "report.html")


if __name__ == "__main__":
  cli.run(main)

"""Evaluates a checkpoint from its directory alone, past the training length.

    python -m atma_jax.evaluate --checkpoint=DIR --suite=loss,needle --output=DIR [--multiples=1,2,4,8] [--report]

Appends ``results.jsonl``, prints a table, draws PNG plots. Run again, it computes only what is not recorded yet. ``--report``
writes ``report.html`` too, of all in ``results.jsonl`` and the files of ``--compare``; without a ``--checkpoint`` only that.
"""

from __future__ import annotations

import dataclasses
import pathlib
import typing

from absl import flags

from atma_jax import cli
from atma_jax.distributed import DistributedFlags
from atma_jax.errors import UserError
from atma_jax.evaluation.options import BabilongOptions, Options
from atma_jax.evaluation.report.page_tables import write_report
from atma_jax.evaluation.runner import evaluate

_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string, bool: flags.DEFINE_boolean}


def _define(owner: type, prefix: str) -> dict[str, tuple[typing.Any, flags.FlagHolder]]:
  """A flag for each field; of a tuple, its elements' type and the flag of a list."""
  defined = {}
  for field in dataclasses.fields(owner):
    hint, description = typing.get_type_hints(owner)[field.name], field.metadata["help"]
    if typing.get_origin(hint) is tuple:
      kind = typing.get_args(hint)[0]
      default = [format(v, "g") if kind is float else str(v) for v in field.default]
      flag = flags.DEFINE_list(prefix + field.name, default, description)
    else:
      kind, inner = None, hint if hint in _DEFINE else typing.get_args(hint)[0]
      flag = _DEFINE[inner](prefix + field.name, field.default, description)
    defined[field.name] = kind, flag
  return defined


_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, its checkpoints folder, or a published checkpoint.")
_OUTPUT = flags.DEFINE_string("output", None, "Where results.jsonl, the plots and the report go.")
_REPORT = flags.DEFINE_boolean("report", False, "Write OUTPUT/report.html.")
_COMPARE = flags.DEFINE_list("compare", [], "More results.jsonl files, for the report.")
_DISTRIBUTED = DistributedFlags()
_OPTIONS = _define(Options, "")
_BABILONG = _define(BabilongOptions, "babilong_")


def _value(kind: type | None, flag: flags.FlagHolder) -> typing.Any:
  if kind is None:
    return flag.value
  try:
    return tuple(kind(item) for item in flag.value)
  except ValueError as error:
    raise UserError(f"--{flag.name}={','.join(flag.value)}: must be {kind.__name__}s such as {flag.default}") from error


def main() -> None:
  """Runs the suites, goes on where results end, and writes report and plots. Raises UserError on bad flags and checkpoints."""
  for flag, needed in ((_OUTPUT, True), (_CHECKPOINT, not _REPORT.value)):
    if needed and not flag.value:
      raise UserError(f"--{flag.name}=DIR is required")
  if _COMPARE.value and not _REPORT.value:
    raise UserError(f"--compare={','.join(_COMPARE.value)}: is for --report")
  options = Options(**{name: _value(*defined) for name, defined in _OPTIONS.items()})
  babilong = BabilongOptions(**{name: _value(*defined) for name, defined in _BABILONG.items()})
  _DISTRIBUTED.initialize()
  if _CHECKPOINT.value:
    evaluate(_CHECKPOINT.value, _OUTPUT.value, options, babilong)
  if _REPORT.value and _DISTRIBUTED.first:
    write_report([pathlib.Path(_OUTPUT.value) / "results.jsonl", *map(pathlib.Path, _COMPARE.value)],
                 pathlib.Path(_OUTPUT.value) / "report.html")


if __name__ == "__main__":
  cli.run(main)

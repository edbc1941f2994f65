"""Launch scripts run against recording stand-ins for gcloud, kubectl, xpk, Slurm's commands and a few others."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
import pathlib
import shlex
import subprocess

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
STUBS = ("gcloud", "kubectl", "xpk", "sbatch", "squeue", "scancel", "scontrol", "srun", "git", "mkdir", "tail")

STUB = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$RECORD"
case "${0##*/} $*" in
  *"describe"*) echo "${STUB_STATE:-ACTIVE}" ;;
  "kubectl "*" apply -f -") cat >>"$RECORD.stdin" ;;
  "srun "*) exit "${STUB_SRUN_EXIT:-0}" ;;
esac
"""


PYTHON = """#!/bin/bash
[[ $1 != -c ]] || exit "${STUB_PYTHON_EXIT:-0}"  # asked whether it has the package
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$RECORD"
[[ ${STUB_CHECK_EXIT:-0} == 0 ]] || echo "error: config.data.sources: no such thing" >&2
exit "${STUB_CHECK_EXIT:-0}"
"""


@dataclasses.dataclass(frozen=True)
class Result:
  """What a script printed, and the commands it ran as shell-quoted lines."""

  code: int
  stdout: str
  stderr: str
  commands: list[str]
  stdin: str


@pytest.fixture
def launch(tmp_path) -> Callable[..., Result]:
  """`launch("tpu_vm.sh", argument..., VARIABLE=value...)` runs a script of launch/ with the stand-ins first on PATH."""
  stubs = tmp_path / "stubs"
  stubs.mkdir()
  for name in STUBS:
    (stubs / name).write_text(STUB)
    (stubs / name).chmod(0o755)
  for name in ("python", "python3"):
    (stubs / name).write_text(PYTHON)
    (stubs / name).chmod(0o755)
  (stubs / "mktemp").write_text("#!/bin/bash\necho /tmp/atma_jax_scratch\n")
  (stubs / "mktemp").chmod(0o755)

  def run(script: str, *arguments: str, **environ: str) -> Result:
    record = tmp_path / "record"
    for stale in (record, tmp_path / "record.stdin"):
      stale.unlink(missing_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_", "LIBTPU_", "JAX_"))}
    done = subprocess.run(
      ["bash", str(REPOSITORY / "launch" / script), *arguments], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
      capture_output=True, text=True, timeout=30,
      env=inherited | {"PATH": f"{stubs}:{os.environ['PATH']}", "RECORD": str(record), "PYTHON": "python"} | environ)
    recorded = record.read_text().split("\n\0")[:-1] if record.exists() else []
    given = tmp_path / "record.stdin"
    return Result(done.returncode, done.stdout, done.stderr,
                  [portable(shlex.join(command.split("\0")[:-1])) for command in recorded],
                  given.read_text() if given.exists() else "")

  return run


def portable(text: str) -> str:
  """Without the place of the checkout."""
  return text.replace(str(REPOSITORY), "REPOSITORY").replace("/tmp/atma_jax_scratch/", "/tmp/")

"""Submits one job per cell to Slurm, or to GKE through xpk, with the launchers of this repository.

A job is a worker for one cell. When it is requeued or restarted, it takes the cell over and resumes, also after a failure (up
to the launcher's --max-restarts). When a cell is submitted twice, one of the two jobs finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import pathlib
import shlex
import subprocess

from atma_jax.ablation.sweep import CellFolder
from atma_jax.errors import UserError, unknown_name

LAUNCHERS = {"slurm": ("launch/slurm.sh",), "xpk": ("launch/gke/xpk.sh", "run")}
DEFAULTS = {"slurm": ("--nodes=1", "--gpus-per-node=1"), "xpk": ()}


def job_name(cell: str) -> str:
  """A job name of at most 28 characters that all launchers accept: as much of the cell's id as fits, and a hash of it."""
  words = "".join(c if c.isalnum() else "-" for c in cell.lower())
  short = "-".join(word for word in words.split("-") if word)[:18].strip("-")
  return f"c-{short}-{hashlib.sha256(cell.encode()).hexdigest()[:6]}"


def job_command(kind: str, cell: CellFolder, directory: str, options: Sequence[str]) -> list[str]:
  """The command line that submits the job of a cell.

  Args:
    kind: one of `LAUNCHERS`.
    cell: the cell.
    directory: of the sweep, as the job sees it.
    options: of the launcher; they replace its defaults.

  Raises:
    UserError: there is no such launcher.
  """
  if kind not in LAUNCHERS:
    raise UserError(unknown_name("--jobs", kind, LAUNCHERS))
  given = {option.partition("=")[0] for option in options}
  defaults = [option for option in DEFAULTS[kind] if option.partition("=")[0] not in given]
  return ["bash", *LAUNCHERS[kind], f"--name={job_name(cell.id)}", "--module=atma_jax.ablate", *defaults, *options,
          "--", f"--output={directory}", f"--cells={cell.id}", "--retry_failed"]


def submit(kind: str, cells: Sequence[CellFolder], directory: str, options: Sequence[str], *, dry_run: bool) -> None:
  """Submits a job for every cell that is not done, or only prints the commands.

  Raises:
    UserError: a cell cannot be run, the launcher failed (it has said why), or it is not in the current directory.
  """
  for cell in cells:
    cell.check()
  for cell in cells:
    if cell.done:
      continue
    command = job_command(kind, cell, directory, options)
    if dry_run:
      print(f"# {cell.id}\n{shlex.join(command)}")
      continue
    if not pathlib.Path(command[1]).is_file():
      raise UserError(f"--jobs={kind}: {command[1]} is not here; call this from the root of a checkout")
    code = subprocess.run(command, check=False).returncode
    if code:
      raise UserError(f"--jobs={kind}: {command[1]} ended with exit code {code} for cell {cell.id}")

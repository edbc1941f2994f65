"""The directories of a training run, checked before anything is computed."""

from __future__ import annotations

import pathlib
import secrets
import socket

from etils import epath
import jax

from atma_jax import distributed
from atma_jax.checkpoints.steps import absolute, is_remote
from atma_jax.claims import Claim, hold
from atma_jax.compilation_cache import user_cache
from atma_jax.config import Config
from atma_jax.data.manifest import MANIFEST, load_manifest, settings_of
from atma_jax.data.prepare import prepare
from atma_jax.errors import UserError, described
from atma_jax.json_input import json_digest
from atma_jax.training.continued import initial_tokenizer


def data_directory(config: Config, workdir: str) -> pathlib.Path:
  """The directory of the prepared data: ``config.data.directory``, or ``WORKDIR/data``.

  Prepared data is memory-mapped. With a remote `workdir`, and where none is named, it is in this user's cache, in a folder for
  its options and this host, because every host then prepares its own (see `prepare_data`).

  Raises:
    UserError: a remote `workdir` where a local directory is needed, for a profile.
  """
  if config.train.profile_start is not None and is_remote(workdir):
    raise UserError(f"config.train.profile_start={config.train.profile_start}: profiles need a --workdir on a file system, not "
                    f"{workdir}")
  if config.train.profile_start is not None and (pathlib.Path(workdir) / "profile").is_file():
    raise UserError(f"{pathlib.Path(workdir) / 'profile'} cannot be written: it is a file, not a directory")
  if config.data.directory:
    return pathlib.Path(config.data.directory).absolute()
  if is_remote(workdir):
    return user_cache().parent.parent / "data" / f"{json_digest(settings_of(config.data))[:16]}-{socket.gethostname()}"
  return pathlib.Path(workdir).absolute() / "data"


def prepare_data(config: Config, directory: pathlib.Path, *, shared: bool) -> None:
  """Prepares the data: once, in a directory that all processes see, or once on every host, in one of its own.

  Args:
    config: the recipe.
    directory: where the data goes.
    shared: whether all processes see that directory.

  Raises:
    UserError: the data cannot be prepared, by this process or by another; or hosts have prepared different data.
  """
  hosts = distributed.exchange(socket.gethostname())
  first = 0 if shared else hosts.index(hosts[jax.process_index()])
  with distributed.agreed():
    if jax.process_index() == first:
      prepare(config.data, directory, tokenizer=None if (directory / MANIFEST).exists() else initial_tokenizer(config))
  if not shared:
    found = distributed.exchange(load_manifest(directory).fingerprint)
    other = next((index for index, fingerprint in enumerate(found) if fingerprint != found[0]), None)
    if other is not None:
      raise UserError(f"config.data.sources: hosts {hosts[0]} and {hosts[other]} found different text, and so prepared different "
                      f"data in {directory.parent}: remove it on both, or name a config.data.directory that all hosts see")


def make_workdir(workdir: str) -> epath.Path:
  """Makes the directory, and makes sure that every process sees the same one.

  Raises:
    UserError: it cannot be written, or this process does not see what process 0 wrote there.
  """
  folder, token = absolute(workdir), secrets.token_hex(8)
  with distributed.agreed():
    if jax.process_index() == 0:
      try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_count() > 1:
          (folder / ".shared").write_text(token)
      except Exception as error:  # cloud file systems raise errors of their own
        reason = getattr(error, "strerror", None) or described(error)
        raise UserError(f"--workdir={workdir}: cannot be written: {reason}") from error
  token = distributed.from_first(token)
  with distributed.agreed():
    if jax.process_count() > 1 and (not (folder / ".shared").exists() or (folder / ".shared").read_text() != token):
      raise UserError(f"--workdir={workdir}: does not show what process 0 wrote there; with several processes it must be a "
                      "directory that all of them see")
  return folder


def claim_workdir(folder: epath.Path, workdir: str) -> tuple[Claim | None, UserError | None]:
  """Claims the directory for all processes of this run; process 0 holds the claim.

  Args:
    folder: the directory.
    workdir: as the flag names it.

  Returns:
    The claim, None in the other processes; and why there is none although nobody else has one: on a read-only disk a run that is
    done can still be recognised, but not go on.

  Raises:
    UserError: a process that is alive trains in the directory.
  """
  claim = refusal = None
  with distributed.agreed():
    if jax.process_index() == 0:
      try:
        claim = hold(folder, f"--workdir={workdir}")
      except UserError as error:
        if not isinstance(error.__cause__, UserError):  # not because `folder` cannot be written
          raise
        refusal = error
  return claim, refusal

"""Checkpoints on the Hugging Face hub: reading ``hf:USER/NAME[@REVISION]``, and pushing a directory.

A model there is what `convert` writes: a training workdir with ``checkpoints``, or a directory for PyTorch or `transformers`.
Only such files are fetched, into the hub's cache on this machine; code is not. Tokens and addresses come from the hub's usual
environment (HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import sys

from absl import logging

from atma_jax.config import shown
from atma_jax.data.remote import FIRST_ATTEMPTS, hub_address, retried
from atma_jax.errors import UserError

PREFIX = "hf:"
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w.-][\w./-]{0,199}))?")
_LEGAL = f"{PREFIX}USER/NAME or {PREFIX}USER/NAME@REVISION"
_FILES = ("*.json", "*.safetensors", "weights.pt", "tokenizer.model", "checkpoints/*", "[0-9]*/*")  # that belong to a checkpoint
_COMMIT = re.compile("[0-9a-f]{40}")


def is_on_hub(checkpoint: str | os.PathLike) -> bool:
  """Whether a checkpoint is named as one on the hub."""
  return os.fspath(checkpoint).startswith(PREFIX)


def fetch_checkpoint(checkpoint: str) -> pathlib.Path:
  """Fetches a checkpoint from the hub into the hub's cache, and returns the folder, which is called like the commit.

  Args:
    checkpoint: ``hf:USER/NAME`` or ``hf:USER/NAME@REVISION``, a branch, tag or commit. What the cache holds of a commit, given by
      all its 40 digits, needs no network.

  Raises:
    UserError: the name is malformed, there is no such model or revision, it holds no checkpoint, or nobody may read it.
    RunError: the hub does not answer.
  """
  import huggingface_hub  # takes a quarter of a second
  from huggingface_hub.errors import LocalEntryNotFoundError

  found = _NAME.fullmatch(checkpoint.removeprefix(PREFIX))
  if found is None:
    raise UserError(f"--checkpoint={shown(checkpoint)}: no name of a model on the hub; legal: {_LEGAL}")
  name, revision, what = found["name"], found["revision"], f"--checkpoint={checkpoint}"
  api = huggingface_hub.HfApi(endpoint=hub_address(), library_name="atma_jax")

  def download(commit: str) -> str:
    try:
      return api.snapshot_download(name, revision=commit, allow_patterns=list(_FILES))
    except LocalEntryNotFoundError as error:  # which hides why the hub could not be asked
      raise error.__cause__ or error from None

  with _quiet_hub():
    try:
      if revision is None or not _COMMIT.fullmatch(revision):
        revision = str(retried(lambda: api.model_info(name, revision=found["revision"]), what, attempts=FIRST_ATTEMPTS).sha)
      folder = pathlib.Path(retried(lambda: download(revision), what, attempts=FIRST_ATTEMPTS))
    except FileNotFoundError as error:
      raise UserError(f"{what}: {hub_address()} has no such model or revision, or HF_TOKEN may not read it") from error
  if not folder.is_dir() or not any(folder.iterdir()):
    raise UserError(f"{what}: holds no checkpoint; legal: what python -m atma_jax.convert --push writes")
  return folder


def located(checkpoint: str | os.PathLike) -> tuple[str | os.PathLike, str]:
  """Where a checkpoint is on this machine, fetched if need be, and what tells it from others: its path, or its commit."""
  if not is_on_hub(checkpoint):
    return checkpoint, os.path.abspath(checkpoint)
  folder = fetch_checkpoint(os.fspath(checkpoint))
  return folder, f"{os.fspath(checkpoint).partition('@')[0]}@{folder.name}"


def push_directory(directory: str | os.PathLike, name: str, private: bool) -> str:
  """Uploads a directory as a model of the hub, which is made if it is not there, in one commit; returns its address.

  Args:
    directory: what to upload, whole.
    name: ``USER/NAME``.
    private: make the model private, if it is made.

  Raises:
    UserError: the name is malformed, or the token may not write there.
    RunError: the hub does not answer.
  """
  import huggingface_hub

  check_push_name(name)
  api = huggingface_hub.HfApi(endpoint=hub_address(), library_name="atma_jax")
  what, outcome = f"--push={name}", f"cannot be written on {hub_address()} ({directory} is complete)"

  def upload() -> str:
    try:
      return api.upload_folder(repo_id=name, folder_path=os.fspath(directory), commit_message="Upload by atma_jax").oid
    except RuntimeError as error:  # of a large file, which hides what the store answered
      raise error.__cause__ or error from None

  with _quiet_hub():
    try:
      retried(lambda: api.create_repo(name, private=private or None, exist_ok=True), what, attempts=1, outcome=outcome)
      commit = retried(upload, what, attempts=1, outcome=outcome)
    except FileNotFoundError as error:
      raise UserError(f"{what} {outcome}: there is no such user or model, or HF_TOKEN may not write to it") from error
  logging.info("%s: commit %s", what, commit)
  return f"{hub_address()}/{name}"


def check_push_name(name: str) -> None:
  """Raises `UserError` if a name is none of a model on the hub."""
  found = _NAME.fullmatch(name)
  if found is None or found["revision"] is not None:
    raise UserError(f"--push={shown(name)}: no name of a model on the hub; legal: USER/NAME")


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
  """Keeps the bars of the hub's client off what is no terminal."""
  from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

  if sys.stderr.isatty() or are_progress_bars_disabled():
    yield
    return
  disable_progress_bars()
  try:
    yield
  finally:
    enable_progress_bars()

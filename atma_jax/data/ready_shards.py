"""Token shards that others have prepared and put on the Hugging Face hub: fetched, compared with the hub's digests, kept.

A file that is there and has the digest that the hub names is kept. Everything else is fetched, several files at a time and in
pieces (see `atma_jax.data.remote`), to ``NAME.DIGEST.part``, which a later run goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import fnmatch
import os
import pathlib
import queue
import shutil
import threading
from typing import TypeVar

from absl import logging
import huggingface_hub
import numpy as np

from atma_jax.data.files import exclusive
from atma_jax.data.remote import FIRST_ATTEMPTS, PIECE, hub_address, open_remote, retried
from atma_jax.data.shards import Shard, file_digest, open_shard
from atma_jax.errors import RunError, UserError, unknown_name
from atma_jax.progress import progress_bar

CONNECTIONS = 8  # files fetched at a time
_SPARE = 64 << 20  # bytes that stay free on the disk
_LOOKED_AT = 1 << 20  # tokens of every shard that are held against the vocabulary
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True)
class Preset:
  """A dataset of token shards on the hub.

  Attributes:
    dataset: OWNER/NAME.
    train: pattern of the names of the training shards, whose order is that of their names.
    validation: the same for validation.
    tokenizer: that made the tokens, as ``config.data.tokenizer`` names it.
    vocab_size: of the tokenizer.
    help: what it holds.
  """

  dataset: str
  train: str
  validation: str
  tokenizer: str
  vocab_size: int
  help: str


PRESETS = {
  "fineweb-edu-gpt2-10B": Preset("kjj0/finewebedu10B-gpt2", "finewebedu_train_*.bin", "finewebedu_val_*.bin", "gpt2", 50_257,
                                 "FineWeb-Edu, the sample of 10 billion GPT-2 tokens: 99 shards of 200 MB"),
  "fineweb-gpt2-10B": Preset("kjj0/fineweb10B-gpt2", "fineweb_train_*.bin", "fineweb_val_*.bin", "gpt2", 50_257,
                             "FineWeb, the sample of 10 billion GPT-2 tokens: 103 shards of 200 MB"),
}


@dataclasses.dataclass(frozen=True)
class ReadyFile:
  """A file of the dataset.

  Attributes:
    name: within the dataset and the folder here.
    size: in bytes.
    sha256: of its content; None if the hub does not say.
  """

  name: str
  size: int
  sha256: str | None


@dataclasses.dataclass
class Fetched:
  """What `fetch` left in the folder.

  Attributes:
    files: all of them.
    kept: how many were there already.
    tokens: in the training shards.
    unchecked: how many have no digest on the hub.
  """

  files: list[ReadyFile]
  kept: int
  tokens: int
  unchecked: int


def preset_of(name: str) -> Preset:
  """The preset of a name. Raises `UserError` if there is none."""
  if name not in PRESETS:
    raise UserError(unknown_name("--preset", name, PRESETS))
  return PRESETS[name]


def fetch(preset: Preset, folder: pathlib.Path, shards: int | None = None, progress: bool = True) -> Fetched:
  """Brings the training shards of a preset, or the first of them, and the validation shards into a folder.

  Args:
    preset: the dataset.
    folder: created if missing.
    shards: how many training shards; None is all of them.
    progress: whether to show a progress bar.

  Raises:
    UserError: the hub lacks the dataset, there are fewer shards, the disk has no room, or another process works in the folder.
    RunError: the hub does not answer, or sent something else than it says.
  """
  revision, files = _listed(preset, shards)
  size = sum(file.size for file in files)
  with exclusive(folder), progress_bar(size, "B", description="check and fetch", enabled=progress) as bar:
    there = dict(_in_threads(lambda file, stop: (file, _is_whole(folder / file.name, file)), files))
    missing = [file for file in files if not there[file]]
    bar.update(sum(file.size for file in files if there[file]))
    _check_room(folder, missing)
    for file in _in_threads(lambda file, stop: _fetch(preset, revision, folder, file, stop), missing):
      bar.update(file.size)
  tokens = sum(open_shard(folder / file.name).tokens for file in files if fnmatch.fnmatch(file.name, preset.train))
  return Fetched(files, len(files) - len(missing), tokens, sum(file.sha256 is None for file in files))


def _listed(preset: Preset, shards: int | None) -> tuple[str, list[ReadyFile]]:
  """The dataset's revision, and the files that are wanted."""
  hub = huggingface_hub.HfApi(endpoint=hub_address())
  try:
    info = retried(lambda: hub.dataset_info(preset.dataset, files_metadata=True), f"{preset.dataset} of the hub",
                   attempts=FIRST_ATTEMPTS)
  except FileNotFoundError as error:
    raise UserError(f"{hub_address()} has no dataset {preset.dataset!r}, or it needs a token (hf auth login, or "
                    "HF_TOKEN)") from error
  found = [ReadyFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)
           for sibling in sorted(info.siblings or [], key=lambda sibling: sibling.rfilename)]
  train = [file for file in found if fnmatch.fnmatch(file.name, preset.train)]
  if not train:
    raise UserError(f"{preset.dataset} of {hub_address()} has no files {preset.train}")
  if shards is not None and not 1 <= shards <= len(train):
    raise UserError(f"--shards={shards}: must be at least 1 and at most {len(train)}")
  return str(info.sha), train[:shards] + [file for file in found if fnmatch.fnmatch(file.name, preset.validation)]


def _is_whole(path: pathlib.Path, file: ReadyFile) -> bool:
  if not path.is_file() or path.stat().st_size != file.size:
    return False
  return file.sha256 is None or file_digest(path) == file.sha256


def _check_room(folder: pathlib.Path, missing: Sequence[ReadyFile]) -> None:
  there = [path.stat().st_size for file in missing for path in (folder / file.name, _part(folder, file)) if path.is_file()]
  needed = sum(file.size for file in missing) - sum(there)
  free = shutil.disk_usage(folder).free
  if missing and needed + _SPARE > free:
    raise UserError(f"--output={folder}: {needed / 1e9:,.2f} GB are still to be fetched, and {free / 1e9:,.2f} GB are free: make "
                    "room, name another folder, or fetch fewer --shards")


def _fetch(preset: Preset, revision: str, folder: pathlib.Path, file: ReadyFile, stop: threading.Event) -> ReadyFile:
  """Fetches one file, or what is left of it, and compares it with what the hub says of it; leaves off where `stop` is set."""
  what, path, part = f"{preset.dataset}/{file.name}", folder / file.name, _part(folder, file)
  address = f"{hub_address()}/datasets/{preset.dataset}/resolve/{revision}/{file.name}"
  try:
    path.unlink(missing_ok=True)  # it is cut, or another
    with open(part, "ab") as target, open_remote(address, file.size) as source:
      source.seek(target.tell())
      while not stop.is_set() and (piece := source.read(PIECE)):
        target.write(piece)
        target.flush()
      os.fsync(target.fileno())
  except OSError as error:
    raise UserError(f"cannot write {part}: {error.strerror or error}") from error
  if stop.is_set():
    return file
  if not _is_whole(part, file):
    part.unlink()
    raise RunError(f"{what}: what came has another size or digest than the hub says; it was removed: start the same "
                   "command again")
  shard = open_shard(part)
  largest = int(np.max(Shard(shard.path, min(shard.tokens, _LOOKED_AT), shard.dtype).open(), initial=0))
  if largest >= preset.vocab_size:
    raise UserError(f"{part} holds token {largest}, which {preset.tokenizer} does not have")
  os.replace(part, path)
  return file


def _part(folder: pathlib.Path, file: ReadyFile) -> pathlib.Path:
  """Where a file is kept until it is whole."""
  return folder / f"{file.name}.{(file.sha256 or 'no-digest')[:12]}.part"


def _in_threads(work: Callable[[_T, threading.Event], _R], items: Sequence[_T]) -> Iterator[_R]:
  """The results of `work` on all items, as they are done, by a few threads.

  The first error ends it, once the threads have left off what they were doing; Ctrl-C waits for none of them.
  """
  waiting: queue.SimpleQueue[_T] = queue.SimpleQueue()
  done: queue.SimpleQueue[tuple[_R | None, Exception | None]] = queue.SimpleQueue()
  stop = threading.Event()
  for item in items:
    waiting.put(item)

  def run() -> None:
    while not stop.is_set():
      try:
        item = waiting.get_nowait()
      except queue.Empty:
        return
      try:
        done.put((work(item, stop), None))
      except Exception as error:
        done.put((None, error))

  threads = [threading.Thread(target=run, daemon=True) for _ in range(min(CONNECTIONS, len(items)))]
  for thread in threads:
    thread.start()
  try:
    for _ in items:
      result, error = done.get()
      if error is not None:
        stop.set()
        for thread in threads:
          thread.join()
        raise error
      yield result  # pyright: ignore[reportReturnType]
  finally:
    stop.set()


def summary(fetched: Fetched, preset: Preset, folder: pathlib.Path) -> str:
  """What was fetched and how to train on it, as lines of text."""
  if fetched.unchecked:
    logging.warning("%d files have no digest on the hub: only their size and header were checked", fetched.unchecked)
  size = sum(file.size for file in fetched.files)
  return (f"fetched: {len(fetched.files)} files, {size / 1e9:,.2f} GB, {fetched.tokens:,} tokens to train on, in {folder} "
          f"({fetched.kept} were there)\n"
          f"train with --config.data.sources=bin:{folder.absolute()}/{preset.train} --config.data.tokenizer={preset.tokenizer}")

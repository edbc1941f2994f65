"""Saving and resuming a training run: model, optimizer, data position, configuration and tokenizer as one atomic Orbax step.

Orbax writes a step (see `atma_jax.checkpoints.steps`) in the background and renames it into place, so a kill leaves the step
before it intact.

The directory is any that Orbax takes, ``gs://BUCKET/PATH`` included; with several processes all of them must see it. Steps are
written there directly, not by way of local disks: Orbax 0.12's managers for that (emergency, peer-to-peer, replicator) bind a
local step to the processes and devices that wrote it, keep nothing like ``meta``, or need several slices or a driver of GKE. The
processes agree on whether a step was written or can be read: a disk that fails under one of them is a failure for all, and none
is left waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import os
import resource
import shutil
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import orbax.checkpoint as ocp

from atma_jax import distributed
from atma_jax.checkpoints.steps import (
  FOLDER,
  LoadedStep,
  absolute,
  checksums,
  is_remote,
  make_meta,
  newest_good_step,
  read_arrays,
  read_data,
  read_meta,
  without_traceback,
)
from atma_jax.config import Config
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import RunError, UserError
from atma_jax.models import Atma
from atma_jax.models.definition import Params, params_of

WRITE_SECONDS = 1200  # a step that not all processes have written within this time has failed
FINAL_PAUSES = (0, 2, 5)  # seconds before each attempt to write the last step
_EXECUTION_FIELDS = ("remat", "scan", "implementation")  # of the model: how it is computed, which a resumed run may change
_STATE_FIELDS = ("kind", "clip_basis", "clip_norm", "ema_decay")  # of optimizer and train: they decide which arrays a state has
_ROOM_PER_ARRAY, _ROOM_BESIDES = 5 << 10, 64 << 10  # bytes of indices and metadata, at most


@dataclasses.dataclass
class Weights:
  """A state that has parameters and nothing else."""

  params: Params


class Checkpointer:
  """Saves to and restores from ``WORKDIR/checkpoints``.

  A write that fails is logged and counted in `failed_saves`, and training goes on; earlier steps are intact. Every method must be
  called by all processes and returns the same in all of them.

  Attributes:
    directory: the folder that holds the steps.
    failed_saves: writes that have failed so far.
    failed_in_a_row: those since the last write that succeeded.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int):
    """Makes the directory.

    Args:
      workdir: what the folder ``checkpoints`` lies in.
      keep: how many steps are kept, the newest ones.

    Raises:
      UserError: the directory cannot be made.
    """
    logging.get_absl_logger().addFilter(without_traceback)  # once; `write_failed` says in one line what went wrong
    self.directory = absolute(workdir) / FOLDER
    self.failed_saves = self.failed_in_a_row = 0
    self._keep = keep
    self._writing: int | None = None
    self._reason = ""
    self._room = 0  # bytes that a step takes, once `check_room` knows
    try:
      with distributed.agreed():
        if jax.process_index() == 0:
          self.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"--workdir={workdir}: cannot write checkpoints: {error}") from error
    self._manager: ocp.CheckpointManager | None = self._open()  # None after a failure, until the next attempt

  def _open(self) -> ocp.CheckpointManager:
    several = jax.process_count() > 1
    return ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, enable_async_checkpointing=True, create=False,
      cleanup_tmp_directories=True,  # leftovers of a kill or a failed write would only take up room
      # With directories made before `save` returns, one that cannot be made is an error at once and nobody waits for it.
      async_options=ocp.AsyncOptions(timeout_secs=WRITE_SECONDS, create_directories_asynchronously=False),
      # With its processes named, Orbax waits for them with a time limit instead of in a collective of the devices. The
      # prefix is new after every failure, so that no barrier left half-way by an earlier attempt is met again.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=f"atma_jax_{self.failed_saves}")
      if several else ocp.options.MultiprocessingOptions()))

  def save(self, step: int, state: Any, *, config: Config, tokenizer: Tokenizer, data_state: dict[str, Any]) -> bool:
    """Starts writing a step, once the write before it has ended.

    Args:
      step: its number.
      state: a dataclass of arrays, such as a `TrainState` or `Weights`.
      config: stored beside the arrays.
      tokenizer: stored beside the arrays.
      data_state: the position of the data iterator.

    Returns:
      False if the write could not be started.
    """
    self.settle()
    tree = _as_dict(state)
    meta = make_meta(step, config.to_dict(), tokenizer.to_dict(), checksums(tree), data_state)
    arguments = ocp.args.Composite(
      state=ocp.args.PyTreeSave(tree), data=ocp.args.JsonSave(data_state), meta=ocp.args.JsonSave(meta))
    reason = distributed.attempt(self._probe)  # finds a disk that fails under one process, before Orbax waits for it
    reason = reason or distributed.attempt(lambda: self._start(step, arguments))
    if reason:
      self.write_failed(step, reason)
      return False
    self._writing = step
    return True

  def _start(self, step: int, arguments: ocp.args.Composite) -> None:
    self._manager = self._manager or self._open()
    self._manager.save(step, args=arguments, force=True)

  def settle(self) -> bool:
    """Waits for the write that was started; False if it failed."""
    if self._writing is None or self._manager is None:
      return True
    step, self._writing = self._writing, None
    reason = distributed.attempt(self._manager.wait_until_finished)
    if reason:
      self.write_failed(step, reason)
    else:
      self.failed_in_a_row = 0
    return not reason

  def check(self) -> bool:
    """Looks, without waiting, at the write that was started; False if it is known to have failed."""
    if self._writing is None or self._manager is None:
      return True
    if "writing" in distributed.exchange("writing" if self._manager.is_saving_in_progress() else ""):
      return True
    return self.settle()

  def save_last(self, step: int, state: Any, *, config: Config, tokenizer: Tokenizer, data_state: dict[str, Any]) -> None:
    """Writes a step and returns once it is on disk; the arguments are those of `save`.

    Raises:
      RunError: several attempts failed.
    """
    for pause in FINAL_PAUSES:
      time.sleep(pause)
      if self.save(step, state, config=config, tokenizer=tokenizer, data_state=data_state) and self.settle():
        return
    raise RunError(f"{self.directory}: step {step} could not be written in {len(FINAL_PAUSES)} attempts, earlier steps are "
                   f"intact: {self._reason}")

  def write_failed(self, step: int, reason: str) -> None:
    self.failed_saves += 1
    self.failed_in_a_row += 1
    self._reason = reason
    if jax.process_index() == 0:
      logging.error("checkpoint %s could not be written (%d failed so far), earlier steps are intact: %s",
                    self.directory / str(step), self.failed_saves, reason)
    if self._manager is not None:
      with contextlib.suppress(Exception):  # of a manager that has failed already
        self._manager.close()
    self._manager = None
    distributed.exchange("closed")

  def check_room(self, target: Any) -> None:
    """Logs the room that a step takes, and refuses a local disk without room for one; called before the first one is written.

    Args:
      target: a state of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: there is less room than one more step takes, or this process may not write files of that size.
    """
    leaves = jax.tree.leaves(_as_dict(target))
    self._room = sum(leaf.size * leaf.dtype.itemsize + _ROOM_PER_ARRAY for leaf in leaves) + _ROOM_BESIDES
    each = f"a checkpoint takes at most {_mebibytes(self._room)}, {self._keep} of them are kept and one more while it is written"
    with distributed.agreed():
      if jax.process_index():
        return
      if is_remote(self.directory):
        logging.info("%s", each)
        return
      limit, free = resource.getrlimit(resource.RLIMIT_FSIZE)[0], shutil.disk_usage(self.directory).free
      if limit != resource.RLIM_INFINITY and limit < self._room:
        raise UserError(f"{self.directory}: {each}, but this process may write no file larger than {_mebibytes(limit)}: raise "
                        "the limit (ulimit -f)")
      if free < self._room:
        raise UserError(f"{self.directory}: {each}, but only {_mebibytes(free)} are free: make room, or name another --workdir")
      logging.info("%s; %s are free", each, _mebibytes(free))
      missing = self._keep + 1 - len([path for path in self.directory.iterdir() if path.name.isdigit()])
      if free < missing * self._room:
        logging.warning("%s has no room for that many: %s would do", self.directory, _mebibytes(missing * self._room))

  def _probe(self) -> None:
    """Writes and removes a small file, and looks for room, which raises whatever keeps this process from writing."""
    file = self.directory / f".probe-{jax.process_index()}"
    try:
      file.write_text("atma_jax\n")
    finally:
      with contextlib.suppress(Exception):  # the write says what is wrong
        file.unlink()
    if not is_remote(self.directory) and shutil.disk_usage(self.directory).free < self._room:
      free = _mebibytes(shutil.disk_usage(self.directory).free)
      raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {_mebibytes(self._room)}, and {free} are free")

  def restore(self, config: Config, target: Any,
              check_data: Callable[[dict[str, Any]], None]) -> tuple[Any, dict[str, Any]] | None:
    """Reads the newest good step and removes the damaged ones that are newer.

    Args:
      config: what the run trains; a step of another architecture, or with another optimizer, is refused.
      target: a state of `jax.ShapeDtypeStruct` with shardings.
      check_data: called with the data state of a step; if it raises anything but `UserError`, the step is damaged.

    Returns:
      The state, shaped and sharded like `target`, and the data state; None if there is no step yet.

    Raises:
      UserError: steps exist but none is good, or they were trained with another model or optimizer.
    """
    assert self._manager is not None, "a run is restored before anything is saved"
    steps = sorted(self._manager.all_steps(), reverse=True)

    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(_as_dict(target))[0]}

    def load(folder: epath.Path) -> LoadedStep:
      meta = read_meta(folder)
      data = read_data(folder, meta)
      check_data(data)
      stored = Config.from_dict(meta["config"])
      _check_model(config, stored, self.directory)
      if meta["checksums"].keys() != paths:
        _check_optimizer(config, stored, self.directory)
      return LoadedStep(read_arrays(folder, _as_dict(target)), data, meta["checksums"])

    result = newest_good_step(self.directory, steps, load)
    if result is None:
      return None
    step, loaded = result
    for newer in [s for s in steps if s > step]:
      try:
        self._manager.delete(newer)
      except OSError as error:
        raise UserError(f"{self.directory / str(newer)} is damaged and cannot be removed: {error.strerror or error}") from error
    return type(target)(**loaded.arrays), loaded.rest

  def close(self) -> None:
    """Waits for the write that was started and releases the directory; failures were logged."""
    self.settle()
    if self._manager is not None:
      self._manager.close()


def save_model(workdir: str | os.PathLike, config: Config, model: Atma, tokenizer: Tokenizer, step: int) -> None:
  """Writes a checkpoint that holds parameters alone, for `load_model`, ``serve`` and the like; no run resumes from it.

  Args:
    workdir: the directory to write, made if missing; it holds no checkpoints yet.
    config: the configuration; `config.model` is that of the model.
    model: the model.
    tokenizer: its tokenizer, which is stored too.
    step: the number of the step.

  Returns:
    None; the directory then is a checkpoint.

  Raises:
    UserError: there are checkpoints already, or the directory cannot be made.
    RunError: several attempts to write it failed.

  Example:
    >>> config, model, tokenizer, step = atma_jax.load_model("runs/quickstart")
    >>> save_model("runs/needles/copy", config, model, tokenizer, step)
  """
  if (absolute(workdir) / FOLDER).exists():
    raise UserError(f"--output={workdir}: holds checkpoints already; name another directory")
  checkpointer = Checkpointer(workdir, keep=1)
  checkpointer.save_last(step, Weights(params_of(model)), config=config, tokenizer=tokenizer, data_state={})
  checkpointer.close()


def _differences(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
  """Names of the fields whose values differ, and what is said about each."""
  for name, value in ours.items():
    if isinstance(value, dict):
      yield from _differences(value, theirs[name], f"{path}.{name}")
    elif value != theirs[name]:
      yield name, f"{path}.{name}={value!r} here, {theirs[name]!r} in the checkpoint"


def _check_model(config: Config, stored: Config, directory: epath.Path) -> None:
  pairs = _differences(config.to_dict()["model"], stored.to_dict()["model"], "config.model")
  found = [text for name, text in pairs if name not in _EXECUTION_FIELDS]
  if found:
    raise UserError(f"{directory} holds another architecture: {'; '.join(found)}; use another --workdir or the stored values")


def _check_optimizer(config: Config, stored: Config, directory: epath.Path) -> None:
  """Names the fields for which a stored state may have other arrays than this run's; other damage is not its business."""
  ours, theirs = config.to_dict(), stored.to_dict()
  found = [text for name, text in _differences(ours["optimizer"], theirs["optimizer"], "config.optimizer")
           if name in _STATE_FIELDS]
  found += [text for name, text in _differences(ours["train"], theirs["train"], "config.train") if name in _STATE_FIELDS]
  if found:
    raise UserError(f"{directory} holds another state of the optimizer: {'; '.join(found)}; use another --workdir or the stored "
                    "values")


def _mebibytes(count: int) -> str:
  return f"{count / 2**20:,.1f} MiB"


def _as_dict(state: Any) -> dict[str, Any]:
  return {name: getattr(state, name) for name in state.__dataclass_fields__}

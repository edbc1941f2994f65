"""Checkpoints: model, optimizer, data position, configuration and tokenizer as one atomic Orbax step.

A step has three items: ``state`` (arrays), ``data`` (the iterator's state) and ``meta`` (configuration, tokenizer, checksums).
Orbax writes it in the background and renames it into place, so a kill leaves the step before. A restore verifies a
position-dependent checksum of every array: a truncated or altered step is reported and the one before it used.

The directory is any that Orbax takes, ``gs://BUCKET/PATH`` included; several processes must all see it. Steps go there directly,
not by way of local disks: Orbax 0.12's managers for that (emergency, peer-to-peer, replicator) bind a local step to the processes
and devices that wrote it, keep nothing like ``meta``, or need several slices or a driver of GKE. Whether a step was written or
can be read is agreed between the processes: a disk that fails in one of them is a failure for all, and none is left waiting.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import re
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from atma_jax import distributed
from atma_jax.config import Config
from atma_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from atma_jax.errors import RunError, UserError
from atma_jax.models import Atma
from atma_jax.models.definition import ModelDefinition, Params, params_of, with_counts
from atma_jax.pytorch import is_published, read_published
from atma_jax.sharding import make_mesh

FOLDER = "checkpoints"
SCHEMA = 1
WRITE_SECONDS = 1200  # a step not written by all processes within this time has failed
FINAL_PAUSES = (0, 2, 5)  # seconds before each attempt to write the last step
_HOW_IT_IS_COMPUTED = ("remat", "scan", "implementation")  # fields of the model that a resumed run may change


@dataclasses.dataclass
class Weights:
  """A state of which only parameters are known."""

  params: Params


def is_remote(path: str | os.PathLike) -> bool:
  """True for ``gs://...`` and the like, which only Orbax and etils read and write."""
  return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
  """The path as Orbax wants it."""
  return epath.Path(path if is_remote(path) else os.path.abspath(path))


class Checkpointer:
  """Saves to and restores from ``WORKDIR/checkpoints``.

  A write that fails is reported and counted in `failed_saves`, and the caller goes on; earlier steps are intact. Every method
  is called by all processes alike, and answers the same in all.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self.directory = absolute(workdir) / FOLDER
    self.failed_saves = self.failed_in_a_row = 0
    self._keep = keep
    self._writing: int | None = None
    self._reason = ""
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
      cleanup_tmp_directories=True,  # what a kill or a failed write left half-way would only take up room
      # Directories are made before `save` returns: one that cannot be is an error at once, not a wait for all that want it.
      async_options=ocp.AsyncOptions(timeout_secs=WRITE_SECONDS, create_directories_asynchronously=False),
      # With its processes named, Orbax waits for them with a time limit, and not in a collective of the devices. A new
      # prefix, because barriers that were left half-way are not to be met again.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=f"atma_jax_{self.failed_saves}")
      if several else ocp.options.MultiprocessingOptions()))

  def save(self, step: int, state: Any, *, config: Config, tokenizer: Tokenizer, data_state: dict[str, Any]) -> bool:
    """Starts writing a step, once the write before it has ended; False where this one could not be started."""
    self.settle()
    tree = _as_dict(state)
    meta = {"schema": SCHEMA, "config": config.to_dict(), "tokenizer": tokenizer.to_dict(), "checksums": checksums(tree)}
    arguments = ocp.args.Composite(
      state=ocp.args.PyTreeSave(tree), data=ocp.args.JsonSave(data_state), meta=ocp.args.JsonSave(meta))
    reason = distributed.attempt(self._probe)  # finds out quickly, and without Orbax waiting, what only one process suffers
    reason = reason or distributed.attempt(lambda: self._start(step, arguments))
    if reason:
      self._failed(step, reason)
      return False
    self._writing = step
    return True

  def _start(self, step: int, arguments: ocp.args.Composite) -> None:
    self._manager = self._manager or self._open()
    self._manager.save(step, args=arguments, force=True)

  def settle(self) -> bool:
    """Waits for the write that was started; False where it failed."""
    if self._writing is None:
      return True
    step, self._writing = self._writing, None
    reason = distributed.attempt(self._manager.wait_until_finished)
    if reason:
      self._failed(step, reason)
    else:
      self.failed_in_a_row = 0
    return not reason

  def check(self) -> bool:
    """Without waiting: False where the write that was started is known to have failed."""
    if self._writing is None:
      return True
    if "writing" in distributed.exchange("writing" if self._manager.is_saving_in_progress() else ""):
      return True
    return self.settle()

  def save_last(self, step: int, state: Any, **options: Any) -> None:
    """Writes a step and returns once it is on disk.

    Raises:
      RunError: several attempts failed.
    """
    for pause in FINAL_PAUSES:
      time.sleep(pause)
      if self.save(step, state, **options) and self.settle():
        return
    raise RunError(f"{self.directory}: step {step} could not be written in {len(FINAL_PAUSES)} attempts, earlier steps are "
                   f"intact: {self._reason}")

  def _failed(self, step: int, reason: str) -> None:
    self.failed_saves += 1
    self.failed_in_a_row += 1
    self._reason = reason
    if jax.process_index() == 0:
      logging.error("checkpoint %s could not be written (%d failed so far), earlier steps are intact: %s",
                    self.directory / str(step), self.failed_saves, reason)
    with contextlib.suppress(Exception):  # of a manager that has failed already
      self._manager.close()
    self._manager = None
    distributed.exchange("closed")

  def _probe(self) -> None:
    """Writes and removes a small file; raises what keeps this process from writing."""
    file = self.directory / f".probe-{jax.process_index()}"
    file.write_text("atma_jax\n")
    file.unlink()

  def restore(self, config: Config, target: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest good step as (state shaped and sharded like `target`, data state), or None where there is none yet.

    Raises:
      UserError: steps exist but none is good, or they were trained with another model.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)

    def load(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
      meta = _read_json(folder / "meta")
      _check_model(config, meta["config"], self.directory)
      return _read_arrays(folder, _as_dict(target)), _read_json(folder / "data"), meta["checksums"]

    result = _first_good(self.directory, steps, load)
    if result is None:
      return None
    step, (tree, data_state, _) = result
    for newer in [s for s in steps if s > step]:
      self._manager.delete(newer)
    return type(target)(**tree), data_state

  def close(self) -> None:
    """Waits and releases the directory; what failed was reported."""
    self.settle()
    if self._manager is not None:
      self._manager.close()


def load_model(directory: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None, *, ema: bool = False,
               null_length: int | None = None, count_length: int | None = None) -> tuple[Config, Atma, Tokenizer, int]:
  """Configuration, model, tokenizer and step number from a workdir (or its ``checkpoints``) or a published checkpoint alone.

  Only parameters are read, or, with `ema`, their exponential moving average. `step` None is the newest good one; `mesh` None
  is every device along ``data``. A published checkpoint (see `atma_jax.pytorch`) counts as step 0. `null_length`
  and `count_length` replace config.model's; 0 is no end, None leaves it as it is.

  Raises:
    UserError: no such directory or step, no good step, no average in it, a malformed published checkpoint, or one of
      these lengths for a model without polar attention.
  """
  counts = {"null_length": null_length, "count_length": count_length}
  folder = absolute(directory)
  folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
  if not folder.is_dir():
    raise UserError(f"--checkpoint={directory}: no such directory")
  mesh = make_mesh() if mesh is None else mesh
  if not is_remote(folder) and is_published(folder):
    if step:
      raise UserError(f"--step={step}: {directory} is a published checkpoint, which has one step, 0")
    if ema:
      raise UserError(f"--ema: {directory} is a published checkpoint, which holds no average")
    config, model, tokenizer = read_published(folder)
    return *_with_counts(config, place(model, mesh), counts), tokenizer, 0
  manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False, read_only=True))
  steps = sorted(manager.all_steps(), reverse=True)
  manager.close()
  if not steps:
    raise UserError(f"--checkpoint={directory}: holds no checkpoint step")
  if step is not None and step not in steps:
    raise UserError(f"--step={step}: not in {folder}; legal: {', '.join(map(str, reversed(steps)))}")

  weights = "ema" if ema else "params"

  def load(folder: epath.Path) -> tuple[dict[str, Any], tuple[Config, ModelDefinition, Tokenizer], dict[str, int]]:
    meta = _read_json(folder / "meta")
    config = Config.from_dict(meta["config"])
    definition = ModelDefinition(config.model)
    if ema and config.train.ema_decay is None:
      raise UserError(f"--ema: step {folder.name} of {folder.parent} holds no average; it was trained with "
                      "config.train.ema_decay=None")
    tree = _read_arrays(folder, {weights: definition.abstract_params(mesh)}, partial_restore=True)
    return tree, (config, definition, tokenizer_from_dict(meta["tokenizer"])), meta["checksums"]

  chosen, (tree, (config, definition, tokenizer), _) = _first_good(folder, steps if step is None else [step], load)
  return *_with_counts(config, definition.merge(tree[weights]), counts), tokenizer, chosen


def _with_counts(config: Config, model: Atma, counts: dict[str, int | None]) -> tuple[Config, Atma]:
  model = with_counts(model, **counts)
  return dataclasses.replace(config, model=model.config), model


def save_model(workdir: str | os.PathLike, config: Config, model: Atma, tokenizer: Tokenizer, step: int) -> None:
  """Writes a step of parameters alone, as `load_model` reads it; a run cannot be resumed from it.

  Raises:
    UserError: there are checkpoints already, or the directory cannot be made.
    RunError: several attempts to write it failed.
  """
  if (absolute(workdir) / FOLDER).exists():
    raise UserError(f"--output={workdir}: holds checkpoints already; name another directory")
  checkpointer = Checkpointer(workdir, keep=1)
  checkpointer.save_last(step, Weights(params_of(model)), config=config, tokenizer=tokenizer, data_state={})
  checkpointer.close()


def place(model: Atma, mesh: Mesh) -> Atma:
  """The model on the devices of a mesh, as a restored one is."""
  definition = ModelDefinition(model.config)
  shardings = {name: leaf.sharding for name, leaf in definition.abstract_params(mesh).items()}
  return definition.merge(jax.device_put(params_of(model), shardings))


def checksums(tree: Any) -> dict[str, int]:
  """A 32-bit number for every array, by path: sum over elements of bits times an odd weight of the position.

  Computed on the devices; independent of the sharding.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  values = jax.device_get(_checksums([leaf for _, leaf in flat]))
  return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(flat, values, strict=True)}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
  def checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    weights, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
      weights += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
      stride *= x.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * weights + 1), dtype=jnp.uint32)

  return [checksum(leaf) for leaf in leaves]


_Loaded = tuple[dict[str, Any], Any, dict[str, int]]  # arrays, whatever else, and the checksums stored with the arrays


def _first_good(directory: epath.Path, steps: list[int], load: Callable[[epath.Path], _Loaded]) -> tuple[int, _Loaded] | None:
  """The first of `steps` that every process can load and whose checksums are right; `load` waits for no other process."""
  steps = json.loads(distributed.from_first(json.dumps(steps)))
  for step in steps:
    loaded, reason = None, ""
    with distributed.agreed():
      try:
        loaded = load(directory / str(step))
      except UserError:
        raise
      except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or a decoder raise
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    reason = next(filter(None, distributed.exchange(reason)), "")
    if not reason:
      values = checksums(loaded[0])
      reason = next((f"checksum of {path} differs" for path, value in values.items() if loaded[2].get(path) != value), "")
    if not reason:
      return step, loaded
    if jax.process_index() == 0:
      logging.warning("checkpoint %s is damaged and was passed over: %s", directory / str(step), reason)
  if steps:
    raise UserError(f"{directory}: none of the steps {', '.join(map(str, reversed(steps)))} can be restored")
  return None


def _read_json(folder: epath.Path) -> dict[str, Any]:
  return ocp.JsonCheckpointHandler().restore(folder)


def _read_arrays(folder: epath.Path, target: Any, **options: bool) -> dict[str, Any]:
  """The item ``state``, read by its handler alone: the manager's own `restore` waits for all processes at its end."""
  arguments = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), **options)
  return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=arguments)


def _check_model(config: Config, stored: dict[str, Any], directory: epath.Path) -> None:
  def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str):
    for name, value in ours.items():
      if isinstance(value, dict):
        yield from differences(value, theirs[name], f"{path}.{name}")
      elif value != theirs[name] and name not in _HOW_IT_IS_COMPUTED:
        yield f"{path}.{name}={value!r} here, {theirs[name]!r} in the checkpoint"

  found = list(differences(config.to_dict()["model"], Config.from_dict(stored).to_dict()["model"], "config.model"))
  if found:
    raise UserError(f"{directory} holds another architecture: {'; '.join(found)}; use another --workdir or the stored values")


def _as_dict(state: Any) -> dict[str, Any]:
  return {name: getattr(state, name) for name in state.__dataclass_fields__}

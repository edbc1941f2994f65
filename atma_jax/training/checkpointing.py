"""Checkpoints: model, optimizer, data position, configuration and tokenizer as one atomic Orbax step.

A step has three items: ``state`` (arrays), ``data`` (the iterator's state) and ``meta`` (configuration, tokenizer, checksums).
Orbax writes it in the background and renames it into place, so a kill leaves the step before. A restore verifies a
position-dependent checksum of every array: a truncated or altered step is reported and the one before it used.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from atma_jax.config import Config, UserError
from atma_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from atma_jax.models import Atma
from atma_jax.pytorch import is_published, read_published
from atma_jax.sharding import make_mesh
from atma_jax.training.state import ModelDefinition, Params, params_of

FOLDER = "checkpoints"
SCHEMA = 1
_HOW_IT_IS_COMPUTED = ("remat", "scan", "implementation")  # fields of the model that a resumed run may change


@dataclasses.dataclass
class Weights:
  """A state of which only parameters are known."""

  params: Params


class Checkpointer:
  """Saves to and restores from ``WORKDIR/checkpoints``."""

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self.directory = pathlib.Path(workdir).absolute() / FOLDER
    try:
      self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True))
    except OSError as error:
      raise UserError(f"--workdir={workdir}: cannot write checkpoints: {error}") from error

  def save(self, step: int, state: Any, *, config: Config, tokenizer: Tokenizer, data_state: dict[str, Any]) -> None:
    """Starts writing a step; failures of this or of the write before it raise `UserError`, the last good step intact."""
    tree = _as_dict(state)
    meta = {"schema": SCHEMA, "config": config.to_dict(), "tokenizer": tokenizer.to_dict(), "checksums": checksums(tree)}
    try:
      self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree), data=ocp.args.JsonSave(data_state), meta=ocp.args.JsonSave(meta)), force=True)
    except (OSError, ValueError, RuntimeError) as error:
      raise UserError(f"{self.directory}: step {step} could not be saved, earlier steps are intact: {error}") from error

  def wait(self) -> None:
    """Returns once everything is on disk; a write that failed in the background raises `UserError`."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
      raise UserError(f"{self.directory}: the last checkpoint could not be written: {error}") from error

  def restore(self, config: Config, target: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest good step as (state shaped and sharded like `target`, data state), or None where there is none yet.

    Raises:
      UserError: steps exist but none is good, or they were trained with another model.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)

    def load(step: int) -> tuple[Any, dict[str, Any]]:
      meta = _read_meta(self._manager, step)
      _check_model(config, meta["config"], self.directory)
      tree = _as_dict(target)
      restored = self._manager.restore(step, args=ocp.args.Composite(state=_restore_args(tree), data=ocp.args.JsonRestore()))
      _verify(restored.state, meta["checksums"])
      return type(target)(**restored.state), restored.data

    result = _first_good(self.directory, steps, load)
    if result is None:
      return None
    step, loaded = result
    for newer in [s for s in steps if s > step]:
      self._manager.delete(newer)
    return loaded

  def close(self) -> None:
    """Waits and releases the directory."""
    self.wait()
    self._manager.close()


def load_model(directory: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None, *,
               ema: bool = False) -> tuple[Config, Atma, Tokenizer, int]:
  """Configuration, model, tokenizer and step number from a workdir (or its ``checkpoints``) or a published checkpoint alone.

  Only parameters are read, or, with `ema`, their exponential moving average. `step` None is the newest good one; `mesh` None
  is every device along ``data``. A published checkpoint (see `atma_jax.pytorch`) counts as step 0.

  Raises:
    UserError: no such directory or step, no good step, no average in it, or a malformed published checkpoint.
  """
  folder = pathlib.Path(directory).absolute()
  folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
  if not folder.is_dir():
    raise UserError(f"--checkpoint={directory}: no such directory")
  mesh = make_mesh() if mesh is None else mesh
  if is_published(folder):
    if step:
      raise UserError(f"--step={step}: {directory} is a published checkpoint, which has one step, 0")
    if ema:
      raise UserError(f"--ema: {directory} is a published checkpoint, which holds no average")
    config, model, tokenizer = read_published(folder)
    return config, place(model, mesh), tokenizer, 0
  manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False, read_only=True))
  steps = sorted(manager.all_steps(), reverse=True)
  if not steps:
    raise UserError(f"--checkpoint={directory}: holds no checkpoint step")
  if step is not None and step not in steps:
    raise UserError(f"--step={step}: not in {folder}; legal: {', '.join(map(str, reversed(steps)))}")

  def load(step: int) -> tuple[Config, Atma, Tokenizer]:
    meta = _read_meta(manager, step)
    config = Config.from_dict(meta["config"])
    definition = ModelDefinition(config.model)
    if ema and config.train.ema_decay is None:
      raise UserError(f"--ema: step {step} of {folder} holds no average; it was trained with config.train.ema_decay=None")
    weights = "ema" if ema else "params"
    target = {weights: definition.abstract_params(mesh)}
    restored = manager.restore(step, args=ocp.args.Composite(state=_restore_args(target, partial_restore=True)))
    _verify(restored.state, meta["checksums"])
    return config, definition.merge(restored.state[weights]), tokenizer_from_dict(meta["tokenizer"])

  chosen, (config, model, tokenizer) = _first_good(folder, steps if step is None else [step], load)
  manager.close()
  return config, model, tokenizer, chosen


def save_model(workdir: str | os.PathLike, config: Config, model: Atma, tokenizer: Tokenizer, step: int) -> None:
  """Writes a step of parameters alone, as `load_model` reads it; a run cannot be resumed from it.

  Raises:
    UserError: there are checkpoints already, or the directory cannot be written.
  """
  if (pathlib.Path(workdir) / FOLDER).exists():
    raise UserError(f"--output={workdir}: holds checkpoints already; name another directory")
  checkpointer = Checkpointer(workdir, keep=1)
  checkpointer.save(step, Weights(params_of(model)), config=config, tokenizer=tokenizer, data_state={})
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


class _BadStep(Exception):
  """A step whose contents are not what was saved."""


def _verify(tree: Any, stored: dict[str, int]) -> None:
  for path, value in checksums(tree).items():
    if stored[path] != value:
      raise _BadStep(f"checksum of {path} differs")


def _first_good(directory: pathlib.Path, steps: list[int], load: Callable[[int], Any]) -> tuple[int, Any] | None:
  for step in steps:
    try:
      return step, load(step)
    except UserError:
      raise
    except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or a decoder raise
      reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
      logging.warning("checkpoint %s is damaged and was passed over: %s", directory / str(step), reason)
  if steps:
    raise UserError(f"{directory}: none of the steps {', '.join(map(str, reversed(steps)))} can be restored")
  return None


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def _restore_args(target: Any, **options: bool) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), **options)


def _check_model(config: Config, stored: dict[str, Any], directory: pathlib.Path) -> None:
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

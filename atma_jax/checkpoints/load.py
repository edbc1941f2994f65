"""Loading a trained model from its directory alone, for inference and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from atma_jax.checkpoints.model_hub import fetch_checkpoint, is_on_hub
from atma_jax.checkpoints.overrides import checked_overrides, refuse_unfitting
from atma_jax.checkpoints.steps import FOLDER, LoadedStep, absolute, is_remote, newest_good_step, read_arrays, read_meta
from atma_jax.config import Config
from atma_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from atma_jax.errors import UserError, described
from atma_jax.models import Atma
from atma_jax.models.definition import ModelDefinition, params_of, reconfigured
from atma_jax.pytorch import is_published, read_published
from atma_jax.sharding import make_mesh


class LoadedModel(NamedTuple):
  """What `load_model` returns.

  Attributes:
    config: the configuration of the run; `config.model` is that of `model`, overrides included.
    model: the `Atma`, its arrays on the devices of the mesh.
    tokenizer: the tokenizer that the model was trained with.
    step: the training step of the weights; 0 of a published checkpoint.
  """

  config: Config
  model: Atma
  tokenizer: Tokenizer
  step: int


def load_model(directory: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None, *, ema: bool = False,
               overrides: Mapping[str, Any] | None = None) -> LoadedModel:
  """Loads configuration, model, tokenizer and step number; of the arrays only the parameters are read.

  Args:
    directory: a training workdir, its folder ``checkpoints``, a published checkpoint (see `atma_jax.pytorch`), or one of these on
      the Hugging Face hub, ``hf:USER/NAME[@REVISION]``.
    step: the step to read; None is the newest good one.
    mesh: where the parameters go; None is every device along ``data``.
    ema: read the exponential moving average of the parameters instead (``config.train.ema_decay``).
    overrides: values of the model's fields that replace those it was trained with, by name: ``window``, ``null_length`` and
      ``count_length`` (a number of keys), ``memory_reset`` (a number of tokens), ``memory_off`` (True or False),
      ``retention_cap`` (a half-life in tokens, or a `atma_jax.config.RetentionCap`). None stands for "without". See
      `atma_jax.checkpoints.overrides.OVERRIDES`.

  Returns:
    A `LoadedModel`: ``config``, ``model``, ``tokenizer`` and ``step`` by name, or unpacked in that order.

  Raises:
    RunError: the hub does not answer.
    UserError: no such directory, model or step, no good step, no average in it, a malformed published checkpoint, or an override
      that is unknown, not legal, or that the model has no use for.

  Example:
    >>> config, model, tokenizer, step = load_model("runs/quickstart")
    >>> logits = model(jnp.asarray([tokenizer.encode("def main(")]))  # (1, T, V) float32
    >>> windowed = load_model("runs/quickstart", overrides={"window": 64, "count_length": 256}).model
  """
  overrides = {} if overrides is None else overrides
  checked_overrides(overrides)  # a wrong name is told before anything is read
  folder = _folder(directory)
  mesh = make_mesh() if mesh is None else mesh
  if not is_remote(folder) and is_published(folder):
    if step:
      raise UserError(f"--step={step}: {directory} is a published checkpoint, which has one step, 0")
    if ema:
      raise UserError(f"--ema: {directory} is a published checkpoint, which holds no average")
    config, model, tokenizer = read_published(folder)
    return _overridden(LoadedModel(config, place(model, mesh), tokenizer, 0), overrides)
  steps = _steps(folder, directory)[::-1]
  if step is not None and step not in steps:
    raise UserError(f"--step={step}: not in {folder}; legal: {', '.join(map(str, reversed(steps)))}")

  weights = "ema" if ema else "params"

  def load(folder: epath.Path) -> LoadedStep:
    meta = read_meta(folder)
    config = Config.from_dict(meta["config"])
    definition = ModelDefinition(config.model)
    if ema and config.train.ema_decay is None:
      raise UserError(f"--ema: step {folder.name} of {folder.parent} holds no average; it was trained with "
                      "config.train.ema_decay=None")
    arrays = read_arrays(folder, {weights: definition.abstract_params(mesh)}, partial=True)
    return LoadedStep(arrays, (config, definition, tokenizer_from_dict(meta["tokenizer"])), meta["checksums"])

  result = newest_good_step(folder, steps if step is None else [step], load)
  assert result is not None, "there is at least one step to try"
  chosen, loaded = result
  config, definition, tokenizer = loaded.rest
  return _overridden(LoadedModel(config, definition.merge(loaded.arrays[weights]), tokenizer, chosen), overrides)


def load_tokenizer_of(directory: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a checkpoint, without reading its arrays; `directory` as for `load_model`.

  Raises:
    UserError: no such directory, no step that can be read, or a malformed published checkpoint.
  """
  folder = _folder(directory)
  if not is_remote(folder) and is_published(folder):
    return read_published(folder)[2]
  for step in reversed(_steps(folder, directory)):
    try:
      return tokenizer_from_dict(read_meta(folder / str(step))["tokenizer"])
    except UserError:
      raise
    except Exception as error:  # whatever a damaged file makes Orbax or a decoder raise
      logging.warning("checkpoint %s is damaged and was passed over: %s", folder / str(step), described(error))
  raise UserError(f"{folder}: none of its steps can be read")


def _folder(directory: str | os.PathLike) -> epath.Path:
  """The folder of the steps, brought from the hub for ``hf:USER/NAME``. Raises `UserError` if there is no such directory."""
  folder = absolute(fetch_checkpoint(os.fspath(directory)) if is_on_hub(directory) else directory)
  folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
  if not folder.is_dir():
    raise UserError(f"--checkpoint={directory}: no such directory")
  return folder


def _steps(folder: epath.Path, directory: str | os.PathLike) -> list[int]:
  """The steps in a folder, ascending. Raises `UserError` if there are none."""
  manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False, read_only=True))
  steps = sorted(manager.all_steps())
  manager.close()
  if not steps:
    raise UserError(f"--checkpoint={directory}: holds no checkpoint step")
  return steps


def overridden(model: Atma, overrides: Mapping[str, Any]) -> Atma:
  """The same parameters in a model with other values of some fields; the names and values are those of `load_model`.

  Raises:
    UserError: an override that is unknown, not legal, or that the model has no use for.
  """
  changes = checked_overrides(overrides)
  refuse_unfitting(model.config, overrides, changes)
  return reconfigured(model, **changes)


def _overridden(loaded: LoadedModel, overrides: Mapping[str, Any]) -> LoadedModel:
  model = overridden(loaded.model, overrides)
  return loaded._replace(config=dataclasses.replace(loaded.config, model=model.config), model=model)


def place(model: Atma, mesh: Mesh) -> Atma:
  """The model with its parameters sharded over the devices of a mesh, as `load_model` leaves them."""
  definition = ModelDefinition(model.config)
  shardings = {name: leaf.sharding for name, leaf in definition.abstract_params(mesh).items()}
  return definition.merge(jax.device_put(params_of(model), shardings))

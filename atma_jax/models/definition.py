"""The structure of a model apart from its arrays: parameters by dotted name, and how they become an `Atma`."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh

from atma_jax.config import ModelConfig
from atma_jax.errors import UserError
from atma_jax.models.model import Atma, parameter_metadata
from atma_jax.sharding import named_sharding

Params = dict[str, jax.Array]


class ModelDefinition:
  """The structure of a model without its arrays: how flat parameters become an `Atma`, and what is known of each."""

  def __init__(self, config: ModelConfig):
    self.config = config
    abstract = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
    self._graphdef, self._state = nnx.split(abstract, nnx.Param)
    axes, groups = (dict(_flat(tree)) for tree in parameter_metadata(abstract))
    self.logical_axes: dict[str, tuple[str | None, ...]] = axes
    self.optimizer_groups: dict[str, str] = groups

  def init(self, seed: jax.Array) -> Params:
    """Fresh parameters."""
    return params_of(Atma(self.config, rngs=nnx.Rngs(params=seed)))

  def merge(self, params: Params) -> Atma:
    """The model with these parameters."""
    flat = [(path, variable.replace(params[_name(path)])) for path, variable in nnx.to_flat_state(self._state)]
    return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

  def abstract_params(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings; sizes that do not divide over the mesh raise `UserError`."""
    abstract = {}
    for path, variable in nnx.to_flat_state(self._state):
      name = _name(path)
      try:
        sharding = named_sharding(mesh, self.logical_axes[name], variable.shape)
      except ValueError as error:
        raise UserError(f"config.mesh: parameter {name}: {error}") from error
      abstract[name] = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
    if self.config.num_heads % mesh.shape["tensor"]:
      raise UserError(f"config.mesh.tensor={mesh.shape['tensor']}: must divide config.model.num_heads={self.config.num_heads}")
    return abstract


def params_of(model: Atma) -> Params:
  """The model's parameters by dotted name."""
  return {_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def reconfigured(model: Atma, **changes: Any) -> Atma:
  """The same parameters under a model configuration that differs in `changes`, which leave shapes alone."""
  config = dataclasses.replace(model.config, **changes)
  return model if config == model.config else ModelDefinition(config).merge(params_of(model))


def _name(path: tuple[Any, ...]) -> str:
  return ".".join(map(str, path))


def _flat(tree: Any, path: tuple[Any, ...] = ()):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, (*path, key))
    else:
      yield _name((*path, key)), value

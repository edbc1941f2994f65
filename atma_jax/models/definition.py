"""The structure of a model apart from its arrays: parameters by dotted name, and how they become an `Atma`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from atma_jax.config import ModelConfig
from atma_jax.errors import UserError
from atma_jax.models.mixers import Mixer
from atma_jax.models.model import Atma, parameter_metadata
from atma_jax.models.retention_cap import share_caps, with_retention_cap
from atma_jax.sharding import named_sharding

Params = dict[str, Array]


class ModelDefinition:
  """The structure of a model without its arrays: how parameters by name become an `Atma`, and what is known of each.

  Args:
    config: of the model.
    foreign_keys: keys of the following rows of the batch that attention over whole sequences sees before a row's own, as if they
      came earlier in its text. For training: queries then meet more keys, and more unrelated ones, than a row of text holds, as
      they do in longer contexts (after the cross-batch keys of "Focused Transformer", arXiv 2307.03170).

  Attributes:
    logical_axes: of every parameter, by name (`atma_jax.sharding`).
    optimizer_groups: of every parameter, by name (`atma_jax.models.layers`).
  """

  def __init__(self, config: ModelConfig, *, foreign_keys: int = 0):
    self.config = config
    abstract = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
    if foreign_keys:
      for _, module in nnx.iter_graph(abstract):
        if isinstance(module, Mixer):
          module.foreign_keys = foreign_keys
    self._graphdef, self._state = nnx.split(abstract, nnx.Param)
    axes, groups = (dict(_flat(tree)) for tree in parameter_metadata(abstract))
    self.logical_axes: dict[str, tuple[str | None, ...]] = axes
    self.optimizer_groups: dict[str, str] = groups

  def init(self, seed: Key[Array, ""]) -> Params:
    """Parameters to start training from."""
    return params_of(Atma(self.config, rngs=nnx.Rngs(params=seed)))

  def merge(self, params: Params) -> Atma:
    """The model with these parameters."""
    flat = [(path, variable.replace(params[_name(path)])) for path, variable in nnx.to_flat_state(self._state)]
    return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

  def abstract_params(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the parameters.

    Raises:
      UserError: a size does not divide over the mesh.
    """
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
  """The same parameters in a model of another configuration.

  Args:
    model: is left as it is.
    **changes: fields of its configuration that are to be different and that no shape depends on, such as ``window``; and
      ``retention_cap``, a `RetentionCap` or None, which is no field (see `with_retention_cap`). Without it a cap stays.

  Raises:
    UserError: the cap does not fit the model.
  """
  capped, cap = "retention_cap" in changes, changes.pop("retention_cap", None)
  config = dataclasses.replace(model.config, **changes)
  if config != model.config:
    model = share_caps(ModelDefinition(config).merge(params_of(model)), model)
  return with_retention_cap(model, cap) if capped else model


def _name(path: tuple[Any, ...]) -> str:
  return ".".join(map(str, path))


def _flat(tree: Mapping[str, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, (*path, key))
    else:
      yield _name((*path, key)), value

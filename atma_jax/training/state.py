"""The training state: plain arrays by dotted parameter name, created sharded."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from atma_jax.config import Config, ModelConfig, UserError
from atma_jax.models import Atma, parameter_metadata
from atma_jax.sharding import named_sharding
from atma_jax.training.optimizer import make_optimizer

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """Everything a step changes.

  `step` counts batches consumed; `bad_steps` those skipped in a row for a non-finite loss or gradient, `bad_steps_total` in all;
  `ema` is the average of the parameters, or an empty dict.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  ema: Params
  bad_steps: jax.Array
  bad_steps_total: jax.Array


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


def with_counts(model: Atma, *, null_length: int | None = None, count_length: int | None = None) -> Atma:
  """The model with another null_length and count_length: 0 is without end, None leaves it as the checkpoint has it.

  Raises:
    UserError: the model has no polar attention.
  """
  lengths = {"null_length": null_length, "count_length": count_length}
  given = {name: length for name, length in lengths.items() if length is not None}
  for name, length in given.items():
    if "global" not in model.config.block_pattern:
      raise UserError(f"--{name}={length}: only polar attention counts its keys, and the model has no attention")
    if model.config.attention != "polar":
      raise UserError(f"--{name}={length}: only polar attention counts its keys, and the model's is {model.config.attention}")
  return reconfigured(model, **{name: length or None for name, length in given.items()})


def optimizer_for(config: Config, definition: ModelDefinition) -> optax.GradientTransformation:
  """The optimizer of a recipe."""
  tokens = config.data.batch_size * config.data.sequence_length
  return make_optimizer(config.optimizer, config.train.steps, definition.optimizer_groups, tokens, definition.logical_axes)


def abstract_state(config: Config, definition: ModelDefinition, optimizer: optax.GradientTransformation,
                   mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the whole state; moments are sharded as their parameters."""
  params = definition.abstract_params(mesh)
  replicated = NamedSharding(mesh, PartitionSpec())
  opt_state = jax.eval_shape(optimizer.init, params)

  def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    owner = next((params[key.key] for key in path if getattr(key, "key", None) in params), None)
    sharding = owner.sharding if owner is not None and owner.shape == leaf.shape else replicated
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  opt_state = jax.tree_util.tree_map_with_path(place, opt_state)
  counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  ema = params if config.train.ema_decay is not None else {}
  return TrainState(counter, params, opt_state, ema, counter, counter)


def create_state(config: Config, definition: ModelDefinition, optimizer: optax.GradientTransformation,
                 mesh: Mesh) -> TrainState:
  """A fresh state, initialised on the devices that hold it: no host ever holds the whole model."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, definition, optimizer, mesh))

  def create(seed: jax.Array) -> TrainState:
    params = definition.init(seed)
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params) if config.train.ema_decay is not None else {}
    return TrainState(zero, params, optimizer.init(params), ema, zero, zero)

  with jax.set_mesh(mesh):
    return jax.jit(create, out_shardings=shardings)(jax.random.key(config.train.seed))


def _name(path: tuple[Any, ...]) -> str:
  return ".".join(map(str, path))


def _flat(tree: Any, path: tuple[Any, ...] = ()):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, (*path, key))
    else:
      yield _name((*path, key)), value

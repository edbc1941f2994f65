"""The training state: arrays by dotted parameter name, created on the devices that hold them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
import optax

from atma_jax.config import Config
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """Everything that a training step changes.

  Attributes:
    step: batches consumed.
    params: the parameters by dotted name.
    opt_state: the optimizer's state.
    ema: the exponential moving average of the parameters, or an empty dict.
    bad_steps: steps skipped in a row because their loss or gradient was not finite.
    bad_steps_total: all steps skipped so far.
  """

  step: Int[Array, ""]
  params: Params
  opt_state: Any
  ema: Params
  bad_steps: Int[Array, ""]
  bad_steps_total: Int[Array, ""]


def optimizer_for(config: Config, definition: ModelDefinition) -> optax.GradientTransformation:
  """The optimizer that a recipe asks for, with the group and the logical axes of every parameter of its model."""
  tokens = config.data.batch_size * config.data.sequence_length
  return make_optimizer(config.optimizer, config.train.steps, definition.optimizer_groups, tokens, definition.logical_axes)


def abstract_state(config: Config, definition: ModelDefinition, optimizer: optax.GradientTransformation,
                   mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the whole state, as a `TrainState` of `jax.ShapeDtypeStruct`.

  Moments are sharded as their parameters, everything else of the optimizer's state is replicated.

  Raises:
    UserError: a parameter does not divide over the mesh.
  """
  params: Any = definition.abstract_params(mesh)
  replicated = NamedSharding(mesh, PartitionSpec())
  opt_state = jax.eval_shape(optimizer.init, params)

  def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    owner = next((params[key.key] for key in path if getattr(key, "key", None) in params), None)
    sharding = owner.sharding if owner is not None and owner.shape == leaf.shape else replicated
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  opt_state = jax.tree_util.tree_map_with_path(place, opt_state)
  counter: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  ema = params if config.train.ema_decay is not None else {}
  return TrainState(counter, params, opt_state, ema, counter, counter)


def create_state(config: Config, definition: ModelDefinition, optimizer: optax.GradientTransformation,
                 mesh: Mesh) -> TrainState:
  """A fresh state, initialised shard by shard on the devices that hold it; no host ever holds the whole model."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, definition, optimizer, mesh))

  def create(seed: jax.Array) -> TrainState:
    params = definition.init(seed)
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params) if config.train.ema_decay is not None else {}
    return TrainState(zero, params, optimizer.init(params), ema, zero, zero)

  with jax.set_mesh(mesh):
    return jax.jit(create, out_shardings=shardings)(jax.random.key(config.train.seed))

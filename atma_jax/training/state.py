"""The training state: plain arrays by dotted parameter name, created sharded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from atma_jax.config import Config
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.training.optimizer import make_optimizer


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

"""Training on eight devices equals that on one: loss, gradients, parameters after five steps; shardings follow the table."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.batches import check_divides
from atma_jax.training.objective import language_model_loss
from atma_jax.training.state import abstract_state, create_state, optimizer_for
from atma_jax.training.train_step import make_train_step

STEPS = 5
MESHES = [{"fsdp": 8}, {"data": 2, "tensor": 4}, {"context": 8}, {"fsdp": 2, "tensor": 2, "context": 2}]


@pytest.fixture(scope="module")
def recipe() -> Config:
  """Two scanned pairs of a local and a global block with memory; every sharded size divides by eight."""
  return Config(
    name="sharded",
    model=ModelConfig(vocab_size=64, num_layers=4, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64,
                      block_pattern=("local", "global"), activation_dtype="float32"),
    data=DataConfig(sequence_length=32, batch_size=8),
    train=TrainConfig(steps=20)).validate()


def batch(number: int) -> np.ndarray:
  return np.random.default_rng(number).integers(0, 64, (8, 33)).astype(np.int32)


def run(config: Config, mesh: jax.sharding.Mesh, steps: int = STEPS):
  """Trains `steps` steps; returns their losses and the state after them."""
  definition = ModelDefinition(config.model)
  optimizer = optimizer_for(config, definition)
  state = create_state(config, definition, optimizer, mesh)
  step = make_train_step(config, definition, optimizer, mesh, state)
  losses = []
  with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
    for number in range(steps):
      state, metrics = step(state, jax.device_put(batch(number), named_sharding(mesh, ("batch", None))))
      losses.append(float(metrics["loss"]))
  assert step._cache_size() == 1  # one shape, one program
  return losses, state


@functools.cache
def one_device(accumulation: int = 1):
  config = copy.deepcopy(one_device.recipe)
  config.train.accumulation = accumulation
  return run(config, make_mesh(devices=jax.devices()[:1]))


def assert_equal_training(losses, state, expected_losses, expected):
  # Sums over a split axis are taken in another order, an error of 2^-24 times the square root of their length. Muon and Adam
  # divide by the gradient's size and so keep it relative; five steps at a learning rate of 0.3 let it grow.
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
  for name, value in state.params.items():
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected.params[name]), atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "-".join(f"{k}{v}" for k, v in axes.items()))
def test_training_equals_one_device(recipe, axes):
  one_device.recipe = recipe
  mesh = make_mesh(**{"data": 1} | axes)
  losses, state = run(recipe, mesh)
  assert_equal_training(losses, state, *one_device())
  for name, value in state.params.items():
    wanted = named_sharding(mesh, ModelDefinition(recipe.model).logical_axes[name])
    assert value.sharding.is_equivalent_to(wanted, value.ndim), name


@pytest.mark.slow
def test_accumulation_on_devices_equals_one_device(recipe):
  one_device.recipe = recipe
  config = copy.deepcopy(recipe)
  config.data.batch_size = 8
  config.train.accumulation = 2
  assert_equal_training(*run(config, make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])), *one_device())


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}], ids=["data2-fsdp2-tensor2"])
@pytest.mark.parametrize("first_token", [None, 3], ids=["whole-rows", "documents"])
def test_gradients_equal_one_device(recipe, axes, first_token):
  definition = ModelDefinition(recipe.model)
  params = {name: 0.1 * jax.random.normal(jax.random.key(i), value.shape)
            for i, (name, value) in enumerate(sorted(definition.init(jax.random.key(0)).items()))}

  def gradients(mesh):
    put = {name: jax.device_put(value, named_sharding(mesh, definition.logical_axes[name])) for name, value in params.items()}
    tokens = jax.device_put(batch(0), named_sharding(mesh, ("batch", None)))

    def loss(p):
      return language_model_loss(definition.merge(p), tokens, z_loss=1e-4, chunk=8, first_token=first_token)[0]

    with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
      return jax.jit(jax.value_and_grad(loss))(put)

  (loss, grads), (expected_loss, expected) = gradients(make_mesh(**axes)), gradients(make_mesh(devices=jax.devices()[:1]))
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  for name, value in grads.items():
    scale = float(jnp.abs(expected[name]).max())
    np.testing.assert_allclose(value, expected[name], atol=2e-5 * max(scale, 1e-3), err_msg=name)


def test_moments_are_sharded_as_their_parameters(recipe):
  definition = ModelDefinition(recipe.model)
  mesh = make_mesh(data=1, fsdp=4, tensor=2)
  state = abstract_state(recipe, definition, optimizer_for(recipe, definition), mesh)
  moments = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    owner = next((state.params[key.key] for key in path if getattr(key, "key", None) in state.params), None)
    if owner is not None:
      assert leaf.sharding == owner.sharding, path
      moments += 1
  assert moments >= len(state.params)


def test_sizes_that_do_not_divide_are_refused_with_the_numbers(recipe):
  config = copy.deepcopy(recipe)
  config.model.mlp_width = 44
  definition = ModelDefinition(config.model)
  with pytest.raises(UserError, match=r"config\.mesh: parameter .*size 44 does not divide over mesh tensor=8"):
    abstract_state(config, definition, optimizer_for(config, definition), make_mesh(data=1, tensor=8))
  definition = ModelDefinition(recipe.model)
  with pytest.raises(UserError, match=r"config\.mesh\.tensor=8: must divide config\.model\.num_heads=4"):
    abstract_state(recipe, definition, optimizer_for(recipe, definition), make_mesh(data=1, tensor=8))
  config = copy.deepcopy(recipe)
  config.data.sequence_length, config.mesh.context = 36, 4
  with pytest.raises(UserError, match=r"config\.data\.sequence_length=36: must be a multiple of twice config\.mesh\.context=4"):
    config.validate()
  with pytest.raises(UserError, match=r"config\.data\.sequence_length=36: must be a multiple of twice config\.mesh\.context=4"):
    check_divides(config, make_mesh(data=-1, context=4).shape)

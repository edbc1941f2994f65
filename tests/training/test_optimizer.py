"""The update rule against golden numbers, and its schedule, clipping and groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atma_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh
from atma_jax.training import optimizer as lib
from atma_jax.training.state import abstract_state, optimizer_for
from atma_jax.training.train_step import make_train_step

# How a golden (out, in) matrix or (channels, 1, taps) filter is stored in each group, and back.
LAYOUTS = {
    ("wide", "muon"): (lambda p: p.T, lambda p: p.T),
    ("tall", "muon"): (lambda p: p.T, lambda p: p.T),
    ("wide", "muon_out_in"): (lambda p: p, lambda p: p),
    ("tall", "muon_out_in"): (lambda p: p, lambda p: p),
    ("depthwise", "muon_depthwise"): (lambda p: p[:, 0].T, lambda p: p.T[:, None]),
}
CONSTANT = OptimizerConfig(decay_fraction=0.0, clip_norm=None, clip_basis="mean")


def _run(params, gradients, group, config=CONSTANT, tokens=1):
  """The parameters after every update."""
  optimizer = lib.make_optimizer(config, 1000, jax.tree.map(lambda _: group, params), tokens)

  @jax.jit
  def step(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state, history = optimizer.init(params), []
  for gradient in gradients:
    params, state = step(params, state, gradient)
    history.append(params)
  return history


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("name", "group"), LAYOUTS)
def test_muon_equals_golden(golden, name, group, stacked, dtype):
  file = golden("muon.npz")
  store, restore = LAYOUTS[name, group]

  def load(key):
    x = store(file[f"{name}_{key}"]).astype(dtype)
    return jnp.asarray(np.stack([x, -x]) if stacked else x)  # the update is odd: the second layer mirrors the first

  with jax.enable_x64(dtype == "float64"):
    history = _run(load("param0"), [load(f"grad{i}") for i in range(3)], group)
    for i, param in enumerate(history):
      expected = file[f"{name}_param{i + 1}"]
      layers = [param[0], -param[1]] if stacked else [param]
      for layer in layers:
        error = np.abs(restore(np.asarray(layer)) - expected).max()
        # The schedule is float32: a rate of 0.02 is off by up to 6e-10, three steps of orthogonal updates (entries <= 1).
        assert error < (1e-6 if dtype == "float32" else 2e-9), (i, error)


def test_published_iteration_is_orthogonal_and_quintic_is_close():
  x = jax.random.normal(jax.random.key(0), (3, 16, 40))
  for variant, low, high in (("published", 0.999, 1.001), ("quintic5", 0.6, 1.3)):
    singular = jnp.linalg.svd(lib.orthogonalize(x, lib.NEWTON_SCHULZ[variant]), compute_uv=False)
    assert low < singular.min() and singular.max() < high, variant


def test_quintic_equals_optax():
  x = jax.random.normal(jax.random.key(0), (16, 24))
  ours = lib.orthogonalize(x, lib.NEWTON_SCHULZ["quintic5"])
  theirs = optax.contrib.scale_by_muon(weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(), nesterov=False)
  updates, _ = theirs.update(x, theirs.init(x))
  np.testing.assert_allclose(ours, updates, atol=2e-5)


@pytest.mark.parametrize("variant", lib.NEWTON_SCHULZ)
def test_depthwise_is_the_iteration_on_single_rows(variant):
  x = jax.random.normal(jax.random.key(0), (5, 4, 6))  # layers, taps, channels
  rows = x.mT[..., None, :]
  expected = lib.orthogonalize(rows, lib.NEWTON_SCHULZ[variant])[..., 0, :].mT
  update, _ = lib.orthogonalize_updates("muon_depthwise", variant).update(x, optax.EmptyState())
  np.testing.assert_allclose(update, expected, atol=1e-5)


def test_zero_gradient_only_decays():
  for group in lib.MUON_GROUPS:
    params = jnp.ones((6, 4))
    (after,) = _run(params, [jnp.zeros_like(params)], group)
    np.testing.assert_allclose(after, 1 - CONSTANT.muon_learning_rate * CONSTANT.muon_weight_decay, rtol=1e-6)


@pytest.mark.parametrize("group", lib.ADAM_GROUPS)
def test_adam_groups(group):
  """The first step of Adam is the learning rate against the sign of the gradient; the others follow the textbook recurrence."""
  rate = {"embedding": 0.3, "head": 1 / 320, "vector": 0.01}[group]
  gradients = np.array([[3.0, -2.0, 1e-4], [1.0, 5.0, -1e-4]])
  history = _run(jnp.ones(3), list(jnp.asarray(gradients)), group)
  m, v, p = np.zeros(3), np.zeros(3), np.ones(3)
  for t, (g, got) in enumerate(zip(gradients, history), start=1):
    m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
    p = p - rate * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-10)
    np.testing.assert_allclose(got, p, rtol=1e-5)


def test_schedule():
  factor = lib.learning_rate_factor(OptimizerConfig(warmup_steps=4, decay_fraction=0.5), 20)
  values = np.array([factor(i) for i in range(21)])
  np.testing.assert_allclose(values[:4], [0.25, 0.5, 0.75, 1.0])
  np.testing.assert_allclose(values[4:11], 1.0)
  np.testing.assert_allclose(values[10:], np.linspace(1, 0, 11), atol=1e-7)


def test_published_schedule_starts_at_full_rate():
  factor = lib.learning_rate_factor(OptimizerConfig(), 1000)
  np.testing.assert_allclose([factor(0), factor(300), factor(650), factor(1000)], [1, 1, 0.5, 0], atol=1e-6)


def test_learning_rates_name_every_group():
  rates = lib.learning_rates(OptimizerConfig(), 1000, 650)
  np.testing.assert_allclose([rates[g] for g in ("muon", "embedding", "head", "vector")], [0.01, 0.15, 1 / 640, 0.005])


@pytest.mark.parametrize(("kind", "groups"), [
  ("muon", {"learning_rate/muon", "learning_rate/embedding", "learning_rate/head", "learning_rate/vector"}),
  ("adamw", {"learning_rate/adamw"}), (None, set()), ("injected", {"learning_rate"})])
def test_logged_learning_rates_are_those_of_the_optimizer(kind, groups):
  """An optimizer of somebody else's has no Muon whose rate could be logged; what `inject_hyperparams` keeps is."""
  config = Config(model=ModelConfig(vocab_size=64, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                                    block_pattern=("local",)),
                  data=DataConfig(sequence_length=16, batch_size=4),
                  optimizer=OptimizerConfig(kind="adamw" if kind == "adamw" else "muon"))
  definition, mesh = ModelDefinition(config.model), make_mesh(devices=jax.devices()[:1])
  others = {None: optax.sgd(0.1), "injected": optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 9))}
  optimizer = others[kind] if kind in others else optimizer_for(config, definition)
  state = abstract_state(config, definition, optimizer, mesh)
  with jax.set_mesh(mesh):
    _, metrics = jax.eval_shape(make_train_step(config, definition, optimizer, mesh, state), state,
                                jax.ShapeDtypeStruct((4, 17), jnp.int32))
  assert {name for name in metrics if name.startswith("learning_rate")} == groups


def test_clip_basis():
  """`sum` clips the gradient of the summed loss, so that it binds tokens-per-step times earlier than `mean`."""
  gradient = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([0.0])}

  def clipped(basis, norm, tokens):
    chain = optax.chain(*lib.clipping(OptimizerConfig(clip_basis=basis, clip_norm=norm), tokens))
    return chain.update(gradient, chain.init(gradient))[0]["a"]

  np.testing.assert_allclose(clipped("mean", 1.0, 100), [0.3, 0.4])
  np.testing.assert_allclose(clipped("mean", 0.1, 100), [0.06, 0.08], rtol=1e-6)
  np.testing.assert_allclose(clipped("sum", 1.0, 100), [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(clipped("sum", 1000.0, 100), [30, 40], rtol=1e-6)
  np.testing.assert_allclose(clipped("sum", None, 100), [30, 40], rtol=1e-6)


def test_unknown_group_is_refused():
  with pytest.raises(ValueError, match="matrix"):
    lib.make_optimizer(CONSTANT, 10, {"a": "matrix"}, 1)

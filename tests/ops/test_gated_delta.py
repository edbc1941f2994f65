"""One suite for all implementations of the gated delta, kernels in interpret mode, against the oracle; and laws of its chunks.

`test_golden` compares the same implementations with the golden files.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import gated_delta
from atma_jax.ops.gated_delta import pallas_gpu, pallas_tpu, reference, step_gpu, xla
from atma_jax.ops.gated_delta.api import repeat_heads

DELTA = {
  "xla": functools.partial(gated_delta, implementation="xla"),
  "pallas_gpu": functools.partial(pallas_gpu.gated_delta, interpret=True),
  "pallas_tpu": functools.partial(pallas_tpu.gated_delta, interpret=True),
  "reference": functools.partial(gated_delta, implementation="reference"),
}
every_delta = pytest.mark.parametrize("implementation", [name for name in DELTA if name != "reference"])


def delta_inputs(T, D, Dv, dtype=jnp.float32, H=2):
  rng = np.random.default_rng(T + D)
  q, k = (rng.normal(size=(1, T, H, D)) for _ in range(2))
  q, k = (jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), dtype) for x in (q, k))
  log_gamma = jax.nn.log_sigmoid(jnp.asarray(rng.normal(size=(1, T, H)) + 2, jnp.float32))
  beta = jax.nn.sigmoid(jnp.asarray(rng.normal(size=(1, T, H)), jnp.float32))
  return (q, k, jnp.asarray(rng.normal(size=(1, T, H, Dv)), dtype), log_gamma, beta,
          jnp.asarray(rng.normal(size=(1, H, Dv, D)), jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def delta_run(implementation, *inputs):
  """Outputs and gradients under fixed cotangents."""
  def call(q, k, v, log_gamma, beta, state):
    return DELTA[implementation](q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state)

  outputs, vjp = jax.vjp(call, *inputs)
  rng = np.random.default_rng(9)
  return outputs, vjp(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in outputs))


def assert_near(actual, expected, tolerance):
  """Every array within `tolerance` of the expected one, relative to its norm (or to 1 where that is larger)."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1), path


def wide(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.cache
def delta_case(T, D, Dv):
  """Inputs of a case and what the oracle makes of them."""
  inputs = delta_inputs(T, D, Dv)
  return inputs, delta_run("reference", *inputs)


@every_delta
@pytest.mark.parametrize("T, D, Dv", [(150, 64, 128), (1, 128, 64)])
def test_delta_equals_oracle(implementation, T, D, Dv):
  inputs, expected = delta_case(T, D, Dv)
  assert_near(delta_run(implementation, *inputs), expected, 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_gpu"])
def test_delta_of_shared_keys_and_values_is_that_of_repeated_ones(implementation):
  q, k, v, *rest = delta_inputs(70, 64, 64, H=4)
  k, v = k[:, :, :2], v[:, :, :2]
  outputs, (dq, dk, dv, *others) = delta_run(implementation, q, repeat_heads(k, 4), repeat_heads(v, 4), *rest)
  dk, dv = (jnp.sum(x.reshape(*k.shape[:3], 2, -1), axis=3) for x in (dk, dv))
  assert_near(delta_run(implementation, q, k, v, *rest), (outputs, (dq, dk, dv, *others)), 1e-6)


@every_delta
def test_delta_in_bfloat16_is_within_its_rounding_and_repeats_bitwise(implementation):
  inputs = delta_inputs(130, 128, 128, jnp.bfloat16, H=1)
  first, second = (delta_run(implementation, *inputs) for _ in range(2))
  assert_near(first, delta_run("reference", *wide(inputs)), 2e-2)
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@every_delta
def test_delta_with_repeated_keys_is_as_stable_as_substitution(implementation):
  q, k, v, log_gamma, beta, state = delta_inputs(64, 64, 64)
  k = jnp.broadcast_to(k[:, :1], k.shape)
  inputs = q, k, v, jnp.zeros_like(log_gamma), jnp.ones_like(beta), state
  assert_near(delta_run(implementation, *inputs), delta_run("reference", *inputs), 2e-5)


@pytest.mark.parametrize("name, needs", [("pallas_gpu", "needs a GPU"), ("pallas_tpu", "needs a TPU")])
def test_without_their_device_the_kernels_are_refused(name, needs):
  q, k, v, log_gamma, beta, _ = delta_inputs(16, 64, 64)
  with pytest.raises(NotImplementedError, match=needs):
    gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, implementation=name)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def small_inputs(T, B=2, H=2, D=8):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, T, H, D)) for _ in range(3))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  k[:, 1::3] = k[:, :1]  # repeated keys are the hard case of the triangular solve
  gates = {"log_gamma": np.log(rng.uniform(0.8, 1, (B, T, H))), "beta": rng.uniform(0, 1, (B, T, H))}
  return [jnp.asarray(x, jnp.float32) for x in (q, k, v)], {n: jnp.asarray(x, jnp.float32) for n, x in gates.items()}


@pytest.mark.parametrize("T", [1, 8, 65, 130])
def test_chunked_equals_stepwise(T):
  arrays, gates = small_inputs(T)
  for a, b in zip(gated_delta(*arrays, **gates, implementation="reference"),
                  gated_delta(*arrays, **gates, implementation="xla"), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunk_size_and_split_sequence():
  arrays, gates = small_inputs(70)
  zero = jnp.zeros((2, 2, 8, 8))
  whole, final = xla.gated_delta(*arrays, **gates, initial_state=zero)
  small, _ = xla.gated_delta(*arrays, **gates, initial_state=zero, chunk=16)
  np.testing.assert_allclose(whole, small, atol=1e-5)
  head = [x[:, :29] for x in arrays], {n: x[:, :29] for n, x in gates.items()}
  tail = [x[:, 29:] for x in arrays], {n: x[:, 29:] for n, x in gates.items()}
  first, state = gated_delta(*head[0], **head[1])
  second, state = gated_delta(*tail[0], **tail[1], initial_state=state)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)
  np.testing.assert_allclose(state, final, atol=1e-5)


@pytest.mark.parametrize("layer, D, Dv, K", [(None, 64, 128, 4), (2, 128, 64, 2)])
def test_a_step_of_the_memory_equals_the_rule(layer, D, Dv, K):
  """In place in its layer of stacked states, with every other layer as it was; a row of gamma 1 and beta 0 stands still."""
  q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(0, 2, 1, 4, D), normal(1, 2, 1, K, D)))
  v, state = normal(2, 2, 1, K, Dv), normal(3, *(() if layer is None else (3,)), 2, 4, Dv, D)
  gates = {"log_gamma": -jnp.abs(normal(4, 2, 1, 4)).at[1].set(0), "beta": jax.nn.sigmoid(normal(5, 2, 1, 4)).at[1].set(0)}
  expected = reference.gated_delta(q, *(jnp.repeat(x, 4 // K, axis=2) for x in (k, v)), **gates,
                                   initial_state=state if layer is None else state[layer])
  for compute in (functools.partial(step_gpu.gated_delta_step, interpret=True), xla.gated_delta_step):
    readout, after = compute(q, k, v, **gates, state=state, layer=layer)
    np.testing.assert_allclose(readout, expected[0], atol=1e-5)
    np.testing.assert_allclose(after, expected[1] if layer is None else state.at[layer].set(expected[1]), atol=1e-5)
    np.testing.assert_array_equal(after[..., 1, :, :, :], state[..., 1, :, :, :])

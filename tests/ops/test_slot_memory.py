"""Routed slot memory: the chunked form equals the oracle, gradients included, and a state continues a sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops.slot_memory import reference, xla
from atma_jax.ops.slot_memory.api import slot_memory

B, H, D, M = 2, 3, 4, 5


def draw(T):
  rng = np.random.default_rng(T)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, H, D))) for _ in range(3))
  log_decay = -jnp.asarray(rng.exponential(8, (B, T, H, M)) * (rng.random((B, T, H, M)) < 0.4))  # some strong, most none
  state = tuple(jnp.asarray(rng.normal(size=(B, H, M, D))) for _ in range(2))
  weights = jnp.asarray(rng.normal(size=(B, T, H, D)))
  return (q, k, v, log_decay, state), weights


@pytest.mark.parametrize("T, chunk", [(1, 4), (11, 4), (8, 8), (23, 2)])
def test_chunks_equal_steps(x64, T, chunk):
  arrays, weights = draw(T)

  def loss(implementation, *arrays):
    q, k, v, log_decay, state = arrays
    options = {"chunk": chunk} if implementation is xla else {}
    out, state = implementation.slot_memory(q, k, v, log_decay=log_decay, scale=0.5, initial_state=state, **options)
    return jnp.sum(out * weights) + sum(jnp.sum(jnp.sin(s)) for s in state), (out, state)

  def both(*arrays):
    return tuple(jax.value_and_grad(lambda *a, f=f: loss(f, *a), argnums=range(5), has_aux=True)(*arrays)
                 for f in (reference, xla))

  a, b = jax.jit(both)(*arrays)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11), a, b)


def test_state_continues(x64):
  (q, k, v, log_decay, _), _ = draw(7)
  whole, end = slot_memory(q, k, v, log_decay=log_decay, scale=0.5)
  first, state = slot_memory(*(x[:, :3] for x in (q, k, v)), log_decay=log_decay[:, :3], scale=0.5)
  second, state = slot_memory(*(x[:, 3:] for x in (q, k, v)), log_decay=log_decay[:, 3:], scale=0.5, initial_state=state)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-12)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), state, end)


def test_untouched_slots_keep_what_they_hold(x64):
  (q, k, v, log_decay, state), _ = draw(5)
  _, (keys, values) = slot_memory(q, k, v, log_decay=log_decay.at[..., 2].set(0), scale=0.5, initial_state=state)
  np.testing.assert_array_equal(keys[:, :, 2], state[0][:, :, 2])
  np.testing.assert_array_equal(values[:, :, 2], state[1][:, :, 2])


def test_kernels_without_their_device_are_refused():
  (q, k, v, log_decay, _), _ = draw(3)
  for name in ("pallas_gpu", "pallas_tpu"):
    with pytest.raises(NotImplementedError, match=f"needs a {name[-3:].upper()}"):
      slot_memory(q, k, v, log_decay=log_decay, scale=0.5, implementation=name)

"""The gated delta rule one step at a time: the oracle of the other files."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta`; computed in the dtype of the initial state."""
  dtype = initial_state.dtype

  def step(state, inputs):
    q, k, v, log_gamma, beta = inputs  # (B, H, D) or (B, H)
    state = jnp.exp(log_gamma)[..., None, None] * state
    error = v - jnp.einsum("bhvd,bhd->bhv", state, k)
    state = state + jnp.einsum("bhv,bhd->bhvd", beta[..., None] * error, k)
    return state, jnp.einsum("bhvd,bhd->bhv", state, q)

  steps = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, log_gamma, beta)]
  final_state, readout = jax.lax.scan(step, initial_state, steps)
  return jnp.moveaxis(readout, 0, 1).astype(v.dtype), final_state

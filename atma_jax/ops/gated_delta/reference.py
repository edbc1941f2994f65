"""The gated delta rule one step at a time: the oracle that every other implementation must equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array, starts: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta` for K = H by a scan over time, in the dtype of the initial state."""
  dtype = initial_state.dtype

  def step(state: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    (q, k, v, log_gamma, beta), first = inputs  # (B, H, D) or (B, H); (B,)
    if first is not None:
      state = jnp.where(first[:, None, None, None], 0, state)
    state = jnp.exp(log_gamma)[..., None, None] * state
    error = v - jnp.einsum("bhvd,bhd->bhv", state, k)
    state = state + jnp.einsum("bhv,bhd->bhvd", beta[..., None] * error, k)
    return state, jnp.einsum("bhvd,bhd->bhv", state, q)

  inputs = tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, log_gamma, beta))
  first = None if starts is None else (starts == jnp.arange(q.shape[1])).T
  final_state, readout = jax.lax.scan(step, initial_state, (inputs, first))
  return jnp.moveaxis(readout, 0, 1).astype(v.dtype), final_state

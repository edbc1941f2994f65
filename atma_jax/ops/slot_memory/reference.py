"""Routed slot memory one token at a time: the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops.slot_memory.api import State


def slot_memory(q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, scale: float,
                initial_state: State) -> tuple[jax.Array, State]:
  """Implements `slot_memory.api.slot_memory` by a scan over time, in the dtype of the initial state."""
  dtype = initial_state[0].dtype

  def step(state: State, inputs: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
    q, k, v, f = inputs  # (B, H, D), (B, H, M)
    keys, values = (jnp.exp(f)[..., None] * slots - jnp.expm1(f)[..., None] * new[..., None, :]
                    for slots, new in zip(state, (k, v), strict=True))
    weights = jax.nn.softmax(scale * jnp.einsum("bhmd,bhd->bhm", keys, q), axis=-1)
    return (keys, values), jnp.einsum("bhm,bhmd->bhd", weights, values)

  state, out = jax.lax.scan(step, initial_state, tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, log_decay)))
  return jnp.moveaxis(out, 0, 1).astype(v.dtype), state

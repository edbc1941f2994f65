"""One step of the gated delta rule, for decoding: the state is read twice and written once.

``M k`` and ``M q`` come from one product; the readout after the write then needs no look at the new state, since
``M' q = gamma M q + u (k.q)`` with ``u = beta (v - gamma M k)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gated_delta_step(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                     state: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.gated_delta` of T = 1: readout (B, 1, H, Dv) in v's dtype and the state after, in the state's dtype."""
  dtype, out = state.dtype, v.dtype
  q, k, v = (x[:, 0].astype(dtype) for x in (q, k, v))
  gamma, beta = (x[:, 0, :, None].astype(dtype) for x in (jnp.exp(log_gamma), beta))
  known, read = jnp.unstack(jnp.einsum("bhvd,nbhd->nbhv", state, jnp.stack([k, q])))
  write = beta * (v - gamma * known)
  readout = gamma * read + write * jnp.sum(k * q, axis=-1, keepdims=True)
  state = gamma[..., None] * state + write[..., None] * k[..., None, :]
  return readout[:, None].astype(out), state

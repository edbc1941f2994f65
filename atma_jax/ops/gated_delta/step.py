"""One step of the gated delta rule, for decoding.

``M k`` and ``M q`` come from one look at the state; the readout after the write then needs none at the new state, since
``M' q = gamma M q + u (k.q)`` with ``u = beta (v - gamma M k)``. XLA reads the state twice and writes it once, the kernel
reads and writes it once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

_PACKAGE = "atma_jax.ops.gated_delta"
OP = dispatch.Op("gated_delta_step", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.step_gpu:gated_delta_step", platforms=("gpu",),
                                        supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.step:step"),
})


def gated_delta_step(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, state: jax.Array,
                     layer: int | None = None, implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.gated_delta` of T = 1.

  Args:
    q, k, v, log_gamma, beta: as there, or k and v of fewer heads (B, 1, K, ...), each of as many query heads.
    state: (B, H, Dv, D).
    layer: where the state is that of several layers, stacked along a first axis: which to step.
    implementation: one of `dispatch.NAMES`.

  Returns:
    readout (B, 1, H, Dv) in v's dtype and the state after, of the shape and dtype it came in.

  Raises:
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  return OP(implementation, q, k, v, log_gamma=log_gamma, beta=beta, state=state, layer=layer)


def step(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, state: jax.Array,
         layer: int | None) -> tuple[jax.Array, jax.Array]:
  """See `gated_delta_step`."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  stacked, state = state, state if layer is None else state[layer]
  dtype, out = state.dtype, v.dtype
  q, k, v = (x[:, 0].astype(dtype) for x in (q, k, v))
  gamma, beta = (x[:, 0, :, None].astype(dtype) for x in (jnp.exp(log_gamma), beta))
  known, read = jnp.unstack(jnp.einsum("bhvd,nbhd->nbhv", state, jnp.stack([k, q])))
  write = beta * (v - gamma * known)
  readout = gamma * read + write * jnp.sum(k * q, axis=-1, keepdims=True)
  state = gamma[..., None] * state + write[..., None] * k[..., None, :]
  return readout[:, None].astype(out), state if layer is None else stacked.at[layer].set(state)

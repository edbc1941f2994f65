"""One step of the gated delta rule as a GPU kernel: Pallas through Triton, the state updated in place.

A program takes some rows of one head's state, to which the rule applies one by one, and all of its columns.
"""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas as kernels

ROWS = 16  # of a state that a program takes: 8 KiB


def supports(q: jax.Array, k: jax.Array, v: jax.Array, *, state: jax.Array, **parameters) -> str | None:
  """Why the kernel cannot serve this call, or None if it can."""
  del k, parameters
  if state.dtype != jnp.float32:
    return f"takes a float32 state, not {state.dtype}"
  return kernels.head_refusal(q, v) or kernels.elsewhere("gpu")


def gated_delta_step(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, state: jax.Array,
                     layer: int | None, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta.step`."""
  (B, _, H, D), (K, Dv) = q.shape, v.shape[2:]
  query, key = (pl.BlockSpec((None, None, None, D), lambda i, h, b, n=n: (b, 0, h // n, 0)) for n in (1, H // K))
  out, value = (pl.BlockSpec((None, None, None, ROWS), lambda i, h, b, n=n: (b, 0, h // n, i)) for n in (1, H // K))
  scalar = pl.BlockSpec((None, None, None), lambda i, h, b: (b, 0, h))
  stacked = state if layer is not None else state[None]
  at = layer or 0
  matrix = pl.BlockSpec((None, None, None, ROWS, D), lambda i, h, b: (at, b, h, i, 0))
  readout, stacked = pl.pallas_call(
    _kernel, name="gated_delta_step", grid=(Dv // ROWS, H, B),
    out_shape=[jax.ShapeDtypeStruct((B, 1, H, Dv), v.dtype), jax.ShapeDtypeStruct(stacked.shape, stacked.dtype)],
    in_specs=[query, key, value, scalar, scalar, matrix], out_specs=[out, matrix], input_output_aliases={5: 1},
    interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
  )(q, k, v, log_gamma, beta, stacked)
  return readout, stacked if layer is not None else stacked[0]


def _kernel(q_ref, k_ref, v_ref, log_gamma_ref, beta_ref, state_ref, readout_ref, after_ref):
  q, k, v = (ref[...].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref))
  gamma, beta, state = jnp.exp(log_gamma_ref[...]), beta_ref[...], state_ref[...]
  known, read = jnp.sum(state * k[None, :], axis=1), jnp.sum(state * q[None, :], axis=1)
  write = beta * (v - gamma * known)
  readout_ref[...] = (gamma * read + write * jnp.sum(k * q)).astype(readout_ref.dtype)
  after_ref[...] = gamma * state + write[:, None] * k[None, :]

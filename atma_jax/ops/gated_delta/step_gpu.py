"""One step of gated-delta memory as a GPU kernel (Pallas through Triton) that updates the state in place.

Each program takes `ROWS` rows of one head's state and all its columns: the rule acts on every row by itself.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas as kernels

ROWS = 16  # rows of a state in one program: 8 KiB


def supports(q: jax.Array, k: jax.Array, v: jax.Array, *, state: jax.Array, **parameters: Any) -> str | None:
  """Returns why the kernel cannot serve this call, or None if it can."""
  del k, parameters
  if state.dtype != jnp.float32:
    return f"takes a float32 state, not {state.dtype}"
  return kernels.head_refusal(q, v) or kernels.device_refusal("gpu")


def gated_delta_step(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, state: jax.Array,
                     layer: int | None, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta.step.gated_delta_step`; `interpret` runs the kernel without a GPU."""
  (B, _, H, D), (K, Dv) = q.shape, v.shape[2:]

  def query_block(group: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, D), lambda i, h, b: (b, 0, h // group, 0))

  def value_block(group: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, ROWS), lambda i, h, b: (b, 0, h // group, i))

  group = H // K
  gate_block = pl.BlockSpec((None, None, None), lambda i, h, b: (b, 0, h))
  stacked = state if layer is not None else state[None]
  index = layer or 0
  state_block = pl.BlockSpec((None, None, None, ROWS, D), lambda i, h, b: (index, b, h, i, 0))
  readout, stacked = pl.pallas_call(
    _step_kernel, name="gated_delta_step", grid=(Dv // ROWS, H, B),
    out_shape=[jax.ShapeDtypeStruct((B, 1, H, Dv), v.dtype), jax.ShapeDtypeStruct(stacked.shape, stacked.dtype)],
    in_specs=[query_block(1), query_block(group), value_block(group), gate_block, gate_block, state_block],
    out_specs=[value_block(1), state_block], input_output_aliases={5: 1},
    interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
  )(q, k, v, log_gamma, beta, stacked)
  return readout, stacked if layer is not None else stacked[0]


def _step_kernel(q_ref: Any, k_ref: Any, v_ref: Any, log_gamma_ref: Any, beta_ref: Any, state_ref: Any, readout_ref: Any,
                 new_state_ref: Any) -> None:
  """Advances `ROWS` rows of a state by one step and reads them."""
  q, k, v = (ref[...].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref))
  gamma, beta, state = jnp.exp(log_gamma_ref[...]), beta_ref[...], state_ref[...]
  state_k, state_q = jnp.sum(state * k[None, :], axis=1), jnp.sum(state * q[None, :], axis=1)
  write = beta * (v - gamma * state_k)
  readout_ref[...] = (gamma * state_q + write * jnp.sum(k * q)).astype(readout_ref.dtype)
  new_state_ref[...] = gamma * state + write[:, None] * k[None, :]

"""The gate's gradients as a GPU kernel (Pallas through Triton): one pass over the arrays, without atomics.

A program takes some columns of some steps and goes from step to step. It keeps the columns' sums, which are its share of the
biases' gradients, in registers; XLA adds up the shares. The gradients of u and g are written side by side, so that one matrix
product backpropagates both through the projection they come from.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas as kernels

# Of one program.
COLUMNS = 512  # at most
THREAD_COLUMNS = 4
STEPS = 128
UNROLLED = 4  # steps that are loaded ahead of their use


def supports(u: jax.Array, h: jax.Array, dh: jax.Array, bias: jax.Array) -> str | None:
  """Returns why the kernel cannot serve this call, or None if it can."""
  dtypes = {z.dtype.name for z in (u, h, dh)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"takes u, h and dh all in bfloat16 or all in float32, not {', '.join(sorted(dtypes))}"
  if bias.dtype == jnp.float64:
    return "takes no float64"
  if u.shape[-1] % 64:
    return f"takes multiples of 64 columns, not {u.shape[-1]}"
  return kernels.device_refusal("gpu")


def squared_gate_gradients(u: jax.Array, h: jax.Array, dh: jax.Array, bias: jax.Array, *,
                           interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.squared_gate.api.squared_gate_gradients`, with one partial sum for each `STEPS` steps.

  `interpret` runs the kernel without a GPU.
  """
  B, T, F = u.shape
  columns = kernels.columns_of(F, COLUMNS)
  grid = F // columns, pl.cdiv(T, STEPS), B
  row = pl.BlockSpec((None, T, F), lambda c, t, b: (b, 0, 0))
  return pl.pallas_call(
    functools.partial(_gradients_kernel, columns=columns), name="squared_gate_gradients", grid=grid,
    in_specs=[row, row, row, pl.BlockSpec((columns,), lambda c, t, b: (c,))],
    out_shape=[jax.ShapeDtypeStruct((B, T, 2 * F), u.dtype), jax.ShapeDtypeStruct((B, grid[1], 2, F), jnp.float32)],
    out_specs=[pl.BlockSpec((None, T, 2 * F), lambda c, t, b: (b, 0, 0)),
               pl.BlockSpec((None, None, 2, columns), lambda c, t, b: (b, t, 0, c))],
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=max(1, columns // (32 * THREAD_COLUMNS)), num_stages=1),
  )(u, h, dh, bias.astype(jnp.float32))


def _gradients_kernel(u_ref: Any, h_ref: Any, dh_ref: Any, bias_ref: Any, gradients_ref: Any, sums_ref: Any, *,
                      columns: int) -> None:
  """Stores the gradients of u and g for this program's columns and steps, and their sums over the steps."""
  T, F = u_ref.shape
  bias, first = bias_ref[...], pl.program_id(1) * STEPS
  u_columns, g_columns = (pl.ds(start + pl.program_id(0) * columns, columns) for start in (0, F))

  def add_steps(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    times = [first + i * UNROLLED + j for j in range(UNROLLED)]
    masks = [jnp.broadcast_to(t < T, (columns,)) for t in times]
    loaded = [[plgpu.load(ref.at[t, u_columns], mask=mask, other=0).astype(jnp.float32) for ref in (u_ref, h_ref, dh_ref)]
              for t, mask in zip(times, masks, strict=True)]
    for t, mask, (u, h, dh) in zip(times, masks, loaded, strict=True):
      a = jnp.maximum(u + bias, 0)
      gradients = jnp.where(a > 0, 2 * dh * h / jnp.where(a > 0, a, 1), 0), dh * a * a
      for at, gradient in zip((u_columns, g_columns), gradients, strict=True):
        plgpu.store(gradients_ref.at[t, at], gradient.astype(gradients_ref.dtype), mask=mask)
      sums = sums[0] + gradients[0], sums[1] + gradients[1]
    return sums

  iterations = kernels.cdiv(jnp.minimum(T - first, STEPS), UNROLLED)
  zeros = jnp.zeros((columns,), jnp.float32)
  for i, total in enumerate(lax.fori_loop(0, iterations, add_steps, (zeros, zeros))):
    sums_ref[i, :] = total

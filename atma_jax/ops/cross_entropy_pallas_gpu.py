"""Gradients of a chunk's logits as a GPU kernel: Pallas through Triton, one pass over the head's output, no atomics.

XLA would make the bias's gradient in a pass of its own over what is stored. A program takes some columns of some rows, goes
from row to row and keeps the columns' sums in registers; XLA adds up those of all programs.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops import kernels

COLUMNS = 512  # of a program, at most
THREAD_COLUMNS = 4
ROWS = 128  # of a program
UNROLLED = 4  # rows whose loads are under way together


def supports(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array,
             **options) -> str | None:
  """Why the kernel cannot serve this call, or None if it can."""
  del log_partition, targets, weights, options
  if jnp.float64 in (head.dtype, bias.dtype):
    return "takes no float64"
  if head.shape[-1] % 128:
    return f"takes multiples of 128 logits, not {head.shape[-1]}"
  return kernels.elsewhere("gpu")


def logit_gradients(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array, *,
                    cap: float, z_loss: float, dtype: jnp.dtype, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.cross_entropy.logit_gradients`; `interpret` runs the kernel without a GPU."""
  V = head.shape[-1]
  R = targets.size
  columns = kernels.columns_of(V, COLUMNS)
  grid = V // columns, pl.cdiv(R, ROWS)
  block, row = pl.BlockSpec((R, columns), lambda c, r: (0, c)), pl.BlockSpec((R,), lambda c, r: (0,))
  scale = weights * (1 + 2 * z_loss * log_partition)
  dz, sums = pl.pallas_call(
    functools.partial(_kernel, cap=cap), name="logit_gradients", grid=grid,
    in_specs=[block, pl.BlockSpec((columns,), lambda c, r: (c,)), *[row] * 4],
    out_shape=[jax.ShapeDtypeStruct((R, V), dtype), jax.ShapeDtypeStruct((grid[1], V), jnp.float32)],
    out_specs=[block, pl.BlockSpec((None, columns), lambda c, r: (r, c))], interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=max(1, columns // (32 * THREAD_COLUMNS)), num_stages=1),
  )(head.reshape(R, V), bias.astype(jnp.float32), *(x.reshape(R) for x in (log_partition, scale, weights, targets)))
  return dz.reshape(head.shape), jnp.sum(sums, axis=0)


def _kernel(head_ref, bias_ref, log_partition_ref, scale_ref, weight_ref, target_ref, dz_ref, sums_ref, *, cap: float):
  R, columns = head_ref.shape
  bias, first = bias_ref[...], pl.program_id(1) * ROWS
  column = pl.program_id(0) * columns + jnp.arange(columns)

  def some_rows(i, sums):
    rows = [first + i * UNROLLED + j for j in range(UNROLLED)]
    inside = [jnp.broadcast_to(row < R, (columns,)) for row in rows]
    loaded = [plgpu.load(head_ref.at[row, :], mask=mask, other=0) for row, mask in zip(rows, inside, strict=True)]
    for row, mask, head in zip(rows, inside, loaded, strict=True):
      log_partition, scale, weight, target = (plgpu.load(ref.at[row], mask=row < R, other=0)
                                              for ref in (log_partition_ref, scale_ref, weight_ref, target_ref))
      z = head + bias
      slope = lax.rsqrt(1 + jnp.square(z * (1 / cap)))
      p = scale * jnp.exp(z * slope - log_partition)
      dz = (p - jnp.where(column == target, weight, 0)) * (slope * slope * slope)
      plgpu.store(dz_ref.at[row, :], dz.astype(dz_ref.dtype), mask=mask)
      sums += dz
    return sums

  iterations = kernels.cdiv(jnp.minimum(R - first, ROWS), UNROLLED)
  sums_ref[...] = lax.fori_loop(0, iterations, some_rows, jnp.zeros((columns,), jnp.float32))

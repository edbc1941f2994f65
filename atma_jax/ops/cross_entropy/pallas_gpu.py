"""The log-partition and the gradients of a chunk of logits as GPU kernels (Pallas through Triton), without atomics.

Each kernel reads the head's output once. XLA would make the bias's gradient in another pass over the stored gradients, and sums
exponentials more slowly than memory delivers them. A program takes some columns of some rows: for the gradients it walks over
rows and keeps sums of columns in registers, for the log-partition it walks over columns and keeps sums of rows. XLA adds up the
sums of all programs.
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

# Of the gradients' programs.
COLUMNS = 512  # at most
THREAD_COLUMNS = 4
ROWS = 128
UNROLLED = 4  # rows that are loaded ahead of their use

# Of the log-partition's programs.
LANES = 128  # columns of one block
SUMMED_ROWS, SUMMED_BLOCKS = 4, 64
SUMMED_UNROLLED = 2  # blocks of each row that are loaded ahead of their use
MOST_CAP = 40  # a sum of exp(logit - cap) then stays clear of the smallest numbers of float32


def supports(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array,
             **options: Any) -> str | None:
  """Returns why `logit_gradients` cannot serve this call, or None if it can."""
  del log_partition, targets, weights, options
  if jnp.float64 in (head.dtype, bias.dtype):
    return "takes no float64"
  if head.shape[-1] % 128:
    return f"takes multiples of 128 logits, not {head.shape[-1]}"
  return kernels.device_refusal("gpu")


def supports_log_partition(head: jax.Array, bias: jax.Array, targets: jax.Array, cap: float) -> str | None:
  """Returns why `log_partition` cannot serve this call, or None if it can."""
  if cap > MOST_CAP:
    return f"takes logits capped at {MOST_CAP} or less, not {cap}"
  return supports(head, bias, targets, targets, targets)


def log_partition(head: jax.Array, bias: jax.Array, targets: jax.Array, cap: float, *,
                  interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.cross_entropy.xla.log_partition`; `interpret` runs the kernel without a GPU."""
  V, bias = head.shape[-1], bias.astype(jnp.float32)
  R = targets.size
  columns = SUMMED_BLOCKS * LANES
  grid = pl.cdiv(R, SUMMED_ROWS), pl.cdiv(V, columns)
  sums = pl.pallas_call(
    functools.partial(_log_partition_kernel, cap=cap), name="log_partition", grid=grid,
    in_specs=[pl.BlockSpec((R, V), lambda r, c: (0, 0)), pl.BlockSpec((V,), lambda r, c: (0,))],
    out_shape=jax.ShapeDtypeStruct((grid[1], R), jnp.float32), out_specs=pl.BlockSpec((None, R), lambda r, c: (c, 0)),
    interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
  )(head.reshape(R, V), bias)
  z = jnp.take_along_axis(head, targets[..., None], axis=-1, mode="clip")[..., 0] + jnp.take(bias, targets, mode="clip")
  return cap + jnp.log(jnp.sum(sums, axis=0)).reshape(targets.shape), z * lax.rsqrt(1 + jnp.square(z / cap))


def _log_partition_kernel(head_ref: Any, bias_ref: Any, sums_ref: Any, *, cap: float) -> None:
  """Sums ``exp(logit - cap)`` over this program's columns, for each of its rows."""
  R, V = head_ref.shape
  rows = [pl.program_id(0) * SUMMED_ROWS + i for i in range(SUMMED_ROWS)]
  first, blocks = pl.program_id(1) * SUMMED_BLOCKS, V // LANES

  def add_blocks(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
    loaded = []
    for block in (first + i * SUMMED_UNROLLED + j for j in range(SUMMED_UNROLLED)):
      in_row, columns = block < blocks, pl.ds(block * LANES, LANES)
      masks = [jnp.broadcast_to(in_row & (row < R), (LANES,)) for row in rows]
      bias = plgpu.load(bias_ref.at[columns], mask=jnp.broadcast_to(in_row, (LANES,)), other=0)
      heads = [plgpu.load(head_ref.at[row, columns], mask=mask, other=0) for row, mask in zip(rows, masks, strict=True)]
      loaded.append((masks, bias, heads))
    for masks, bias, heads in loaded:
      z = [head + bias for head in heads]
      terms = [jnp.exp(y * lax.rsqrt(1 + jnp.square(y * (1 / cap))) - cap) for y in z]
      sums = [total + jnp.where(mask, term, 0) for total, mask, term in zip(sums, masks, terms, strict=True)]
    return sums

  iterations = kernels.cdiv(jnp.minimum(blocks - first, SUMMED_BLOCKS), SUMMED_UNROLLED)
  sums = lax.fori_loop(0, iterations, add_blocks, [jnp.zeros((LANES,), jnp.float32)] * SUMMED_ROWS)
  for row, total in zip(rows, sums, strict=True):
    plgpu.store(sums_ref.at[row], jnp.sum(total), mask=row < R)


def logit_gradients(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array, *,
                    cap: float, z_loss: float, dtype: jnp.dtype, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.cross_entropy.xla.logit_gradients`; `interpret` runs the kernel without a GPU."""
  V = head.shape[-1]
  R = targets.size
  columns = kernels.columns_of(V, COLUMNS)
  grid = V // columns, pl.cdiv(R, ROWS)
  block, row = pl.BlockSpec((R, columns), lambda c, r: (0, c)), pl.BlockSpec((R,), lambda c, r: (0,))
  scale = weights * (1 + 2 * z_loss * log_partition)
  dhead, sums = pl.pallas_call(
    functools.partial(_gradients_kernel, cap=cap), name="logit_gradients", grid=grid,
    in_specs=[block, pl.BlockSpec((columns,), lambda c, r: (c,)), *[row] * 4],
    out_shape=[jax.ShapeDtypeStruct((R, V), dtype), jax.ShapeDtypeStruct((grid[1], V), jnp.float32)],
    out_specs=[block, pl.BlockSpec((None, columns), lambda c, r: (r, c))], interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=max(1, columns // (32 * THREAD_COLUMNS)), num_stages=1),
  )(head.reshape(R, V), bias.astype(jnp.float32), *(x.reshape(R) for x in (log_partition, scale, weights, targets)))
  return dhead.reshape(head.shape), jnp.sum(sums, axis=0)


def _gradients_kernel(head_ref: Any, bias_ref: Any, log_partition_ref: Any, scale_ref: Any, weight_ref: Any, target_ref: Any,
                      dhead_ref: Any, sums_ref: Any, *, cap: float) -> None:
  """Stores the gradient of the head's output for this program's columns and rows, and its sums over the rows."""
  R, columns = head_ref.shape
  bias, first = bias_ref[...], pl.program_id(1) * ROWS
  column = pl.program_id(0) * columns + jnp.arange(columns)

  def add_rows(i: jax.Array, sums: jax.Array) -> jax.Array:
    rows = [first + i * UNROLLED + j for j in range(UNROLLED)]
    masks = [jnp.broadcast_to(row < R, (columns,)) for row in rows]
    loaded = [plgpu.load(head_ref.at[row, :], mask=mask, other=0) for row, mask in zip(rows, masks, strict=True)]
    for row, mask, head in zip(rows, masks, loaded, strict=True):
      log_partition, scale, weight, target = (plgpu.load(ref.at[row], mask=row < R, other=0)
                                              for ref in (log_partition_ref, scale_ref, weight_ref, target_ref))
      z = head + bias
      slope = lax.rsqrt(1 + jnp.square(z * (1 / cap)))
      p = scale * jnp.exp(z * slope - log_partition)
      dhead = (p - jnp.where(column == target, weight, 0)) * (slope * slope * slope)
      plgpu.store(dhead_ref.at[row, :], dhead.astype(dhead_ref.dtype), mask=mask)
      sums += dhead
    return sums

  iterations = kernels.cdiv(jnp.minimum(R - first, ROWS), UNROLLED)
  sums_ref[...] = lax.fori_loop(0, iterations, add_rows, jnp.zeros((columns,), jnp.float32))

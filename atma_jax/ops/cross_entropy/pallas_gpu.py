"""A chunk's log-partition and gradients as GPU kernels: Pallas through Triton, one pass each over the head's output, no atomics.

XLA would make the bias's gradient in a pass of its own over what is stored, and sums exponentials below the memory's speed. A
program takes some columns of some rows. For the gradients it goes from row to row and keeps the columns' sums in registers, for
the log-partition from columns to columns with the rows' sums; XLA adds up those of all programs.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas as kernels

COLUMNS = 512  # of a program, at most
THREAD_COLUMNS = 4
ROWS = 128  # of a program
UNROLLED = 4  # rows whose loads are under way together
SUMMED_ROWS, SUMMED_PIECES, SUMMED_UNROLLED = 4, 64, 2  # of the log-partition's programs; pieces are of `LANES` columns
LANES = 128
MOST_CAP = 40  # up to which sums of exponentials of logits less the cap stay clear of float32's smallest numbers


def supports(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array,
             **options) -> str | None:
  """Why the kernel cannot serve this call, or None if it can."""
  del log_partition, targets, weights, options
  if jnp.float64 in (head.dtype, bias.dtype):
    return "takes no float64"
  if head.shape[-1] % 128:
    return f"takes multiples of 128 logits, not {head.shape[-1]}"
  return kernels.elsewhere("gpu")


def sums_exponentials(head: jax.Array, bias: jax.Array, targets: jax.Array, cap: float) -> str | None:
  """Why `log_partition` cannot serve this call, or None if it can."""
  if cap > MOST_CAP:
    return f"takes logits capped at {MOST_CAP} or less, not {cap}"
  return supports(head, bias, targets, targets, targets)


def log_partition(head: jax.Array, bias: jax.Array, targets: jax.Array, cap: float, *,
                  interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.cross_entropy.api.log_partition`; `interpret` runs the kernel without a GPU."""
  V, bias = head.shape[-1], bias.astype(jnp.float32)
  R = targets.size
  columns = SUMMED_PIECES * LANES
  grid = pl.cdiv(R, SUMMED_ROWS), pl.cdiv(V, columns)
  sums = pl.pallas_call(
    functools.partial(_sum_kernel, cap=cap), name="log_partition", grid=grid,
    in_specs=[pl.BlockSpec((R, V), lambda r, c: (0, 0)), pl.BlockSpec((V,), lambda r, c: (0,))],
    out_shape=jax.ShapeDtypeStruct((grid[1], R), jnp.float32), out_specs=pl.BlockSpec((None, R), lambda r, c: (c, 0)),
    interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
  )(head.reshape(R, V), bias)
  z = jnp.take_along_axis(head, targets[..., None], axis=-1, mode="clip")[..., 0] + jnp.take(bias, targets, mode="clip")
  return cap + jnp.log(jnp.sum(sums, axis=0)).reshape(targets.shape), z * lax.rsqrt(1 + jnp.square(z / cap))


def _sum_kernel(head_ref, bias_ref, sums_ref, *, cap: float):
  R, V = head_ref.shape
  rows = [pl.program_id(0) * SUMMED_ROWS + i for i in range(SUMMED_ROWS)]
  first, pieces = pl.program_id(1) * SUMMED_PIECES, V // LANES

  def some_pieces(i, sums):
    loaded = []
    for piece in (first + i * SUMMED_UNROLLED + j for j in range(SUMMED_UNROLLED)):
      inside, at = piece < pieces, pl.ds(piece * LANES, LANES)
      masks = [jnp.broadcast_to(inside & (row < R), (LANES,)) for row in rows]
      bias = plgpu.load(bias_ref.at[at], mask=jnp.broadcast_to(inside, (LANES,)), other=0)
      loaded.append((masks, bias, [plgpu.load(head_ref.at[row, at], mask=mask, other=0) for row, mask in zip(rows, masks)]))
    for masks, bias, heads in loaded:
      z = [head + bias for head in heads]
      terms = [jnp.exp(y * lax.rsqrt(1 + jnp.square(y * (1 / cap))) - cap) for y in z]
      sums = [total + jnp.where(mask, term, 0) for total, mask, term in zip(sums, masks, terms, strict=True)]
    return sums

  iterations = kernels.cdiv(jnp.minimum(pieces - first, SUMMED_PIECES), SUMMED_UNROLLED)
  sums = lax.fori_loop(0, iterations, some_pieces, [jnp.zeros((LANES,), jnp.float32)] * SUMMED_ROWS)
  for row, total in zip(rows, sums, strict=True):
    plgpu.store(sums_ref.at[row], jnp.sum(total), mask=row < R)


def logit_gradients(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array, *,
                    cap: float, z_loss: float, dtype: jnp.dtype, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.cross_entropy.api.logit_gradients`; `interpret` runs the kernel without a GPU."""
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

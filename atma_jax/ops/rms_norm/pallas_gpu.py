"""Residual sum and RMS norm as GPU kernels (Pallas through Triton): one pass over the arrays each way, without atomics.

A program takes some rows, one after the other, and each row as a whole. The backward pass adds the stream's own cotangent to the
norm's gradient. Its programs keep their share of the weight's and the bias's gradients in registers, and XLA adds up the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import dispatch
from atma_jax.ops.core import pallas as kernels

BLOCK_COLUMNS = 2048  # at most; Triton values have a power of two of elements, so other rows are several blocks
THREAD_COLUMNS, MOST_THREAD_COLUMNS, MOST_WARPS = 8, 24, 8
ROWS = {"forward": 16, "backward": 128}  # of one program; the more there are, the fewer sums are left to add up
UNROLLED = 2  # rows that are loaded ahead of their use

Blocks = list[jax.Array]  # the blocks of one row, or of one vector


def supports(x: jax.Array, terms: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array, eps: float) -> str | None:
  """Returns why the kernels cannot serve this call, or None if they can."""
  del eps
  dtypes = {z.dtype.name for z in (x, *terms)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"takes x and its terms all in bfloat16 or all in float32, not {', '.join(sorted(dtypes))}"
  if jnp.float64 in (bias.dtype, weight.dtype):
    return "takes no float64"
  C = x.shape[-1]
  if C % 64 or MOST_THREAD_COLUMNS * 32 * _warps(C) < C:
    return f"takes widths that are a power of two, at least 64, times a small number, not {C}"
  return kernels.device_refusal("gpu")


def sum_and_norm(x: jax.Array, terms: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array, eps: float, *,
                 interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.sum_and_norm`; `interpret` runs the kernels without a GPU."""
  return _run(x, terms, bias.astype(jnp.float32), weight.astype(jnp.float32), eps, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _run(x: jax.Array, terms: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array, eps: float,
         interpret: bool) -> tuple[jax.Array, jax.Array]:
  return _run_forward(x, terms, bias, weight, eps, interpret)[0]


def _run_forward(x: jax.Array, terms: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array, eps: float,
                 interpret: bool) -> tuple[tuple[jax.Array, jax.Array], Any]:
  rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
  inverse_rms = jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)
  *s, normed, inverse_rms = _call("forward", functools.partial(_forward_kernel, eps=eps), (x, *terms), (bias, weight),
                                  (*[rows] * (1 + bool(terms)), inverse_rms), interpret)
  outputs = [z.reshape(x.shape) for z in s], normed.reshape(x.shape), inverse_rms
  s, normed, inverse_rms = checkpoint_name(outputs, dispatch.SUM_AND_NORM)
  s = s[0] if terms else x
  return (s, normed), (s, inverse_rms, bias, weight, (None,) * len(terms))


def _run_backward(eps: float, interpret: bool, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
  del eps
  (s, inverse_rms, bias, weight, terms), (ds, dnormed) = residuals, cotangents
  C, programs = s.shape[-1], pl.cdiv(inverse_rms.size, ROWS["backward"])
  rows, sums = jax.ShapeDtypeStruct((inverse_rms.size, C), s.dtype), jax.ShapeDtypeStruct((programs, 2, C), jnp.float32)
  dx, sums = _call("backward", _backward_kernel, (s, dnormed, ds), (inverse_rms, weight), (rows, sums), interpret)
  dweight, dbias = jnp.sum(sums, axis=0)
  dx = dx.reshape(s.shape)
  return dx, (dx,) * len(terms), dbias if terms else jnp.zeros_like(bias), dweight


_run.defvjp(_run_forward, _run_backward)


def _warps(C: int) -> int:
  """Returns the number of warps of a program for rows of C columns."""
  block = kernels.columns_of(C, BLOCK_COLUMNS)
  return max(1, min(block // 128, 1 << (-(-C // (32 * THREAD_COLUMNS)) - 1).bit_length(), MOST_WARPS))


def _call(direction: str, kernel: Callable[..., None], arrays: Sequence[jax.Array], vectors: Sequence[jax.Array],
          outputs: Sequence[jax.ShapeDtypeStruct], interpret: bool) -> Any:
  """Runs a kernel with one program for each `ROWS` rows.

  Args:
    direction: "forward" or "backward".
    kernel: takes references to `arrays`, `vectors` and the results.
    arrays: (..., C) each; their leading axes are flattened to rows.
    vectors: passed whole to every program.
    outputs: results; a program owns its (2, C) of a result (programs, 2, C), and sees the others whole.
    interpret: run without a GPU.
  """
  C = arrays[0].shape[-1]
  arrays = tuple(z.reshape(-1, C) for z in arrays)
  rows, R = ROWS[direction], arrays[0].shape[0]

  def spec(z: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    if z.ndim == 3:
      return pl.BlockSpec((None, *z.shape[1:]), lambda r: (r, 0, 0))
    return pl.BlockSpec(z.shape, lambda r: (0,) * z.ndim)

  return pl.pallas_call(
    functools.partial(kernel, rows=rows, block=kernels.columns_of(C, BLOCK_COLUMNS)),
    name="sum_and_norm" if direction == "forward" else "sum_and_norm_back", grid=(pl.cdiv(R, rows),),
    in_specs=[*map(spec, arrays), *map(spec, vectors)], out_shape=list(outputs), out_specs=list(map(spec, outputs)),
    interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=_warps(C), num_stages=1),
  )(*arrays, *vectors)


def _for_rows(R: int, rows: int, step: Callable[[list, list, Any], Any], start: Any) -> Any:
  """Folds ``step(row indices, their masks, carry) -> carry`` over the program's rows, `UNROLLED` at a time."""
  first = pl.program_id(0) * rows

  def some_rows(i: jax.Array, carry: Any) -> Any:
    indices = [first + i * UNROLLED + j for j in range(UNROLLED)]
    return step(indices, [row < R for row in indices], carry)

  return lax.fori_loop(0, kernels.cdiv(jnp.minimum(R - first, rows), UNROLLED), some_rows, start)


class _RowRef:
  """Loads and stores rows of an array (R, C), each as blocks of columns."""

  def __init__(self, ref: Any, block: int):
    self.ref, self.block, self.columns = ref, block, [pl.ds(i, block) for i in range(0, ref.shape[-1], block)]

  def load(self, row: jax.Array, valid: jax.Array) -> Blocks:
    """Returns a row in float32; zeros where it is not `valid`."""
    mask = jnp.broadcast_to(valid, (self.block,))
    return [plgpu.load(self.ref.at[row, at], mask=mask, other=0).astype(jnp.float32) for at in self.columns]

  def store(self, row: jax.Array, valid: jax.Array, values: Blocks) -> None:
    """Stores a row where it is `valid`."""
    mask = jnp.broadcast_to(valid, (self.block,))
    for at, value in zip(self.columns, values, strict=True):
      plgpu.store(self.ref.at[row, at], value.astype(self.ref.dtype), mask=mask)


def _mean(blocks: Blocks, C: int) -> jax.Array:
  """Returns the mean over a row of C columns."""
  return jnp.sum(functools.reduce(jnp.add, blocks)) * (1 / C)


def _forward_kernel(*refs: Any, eps: float, rows: int, block: int) -> None:
  """Takes references to x and its terms, bias, weight, the sum if there are terms, the norm, and the inverse RMS of each row."""
  count = next(i for i, ref in enumerate(refs) if ref.ndim == 1)
  bias_ref, weight_ref, *s_ref, normed_ref, inverse_rms_ref = refs[count:]
  arrays, normed_rows, (R, C) = [_RowRef(ref, block) for ref in refs[:count]], _RowRef(normed_ref, block), normed_ref.shape
  s_rows = [_RowRef(ref, block) for ref in s_ref]
  bias, weight = ([ref[at] for at in normed_rows.columns] for ref in (bias_ref, weight_ref))

  def step(indices: list, valid: list, carry: Any) -> Any:
    loaded = [[array.load(row, mask) for array in arrays] for row, mask in zip(indices, valid, strict=True)]
    for row, mask, terms in zip(indices, valid, loaded, strict=True):
      s = [functools.reduce(jnp.add, blocks) for blocks in zip(*terms, strict=True)]
      if s_rows:
        s = [(z + b).astype(normed_ref.dtype) for z, b in zip(s, bias, strict=True)]
        s_rows[0].store(row, mask, s)
        s = [z.astype(jnp.float32) for z in s]
      inverse_rms = lax.rsqrt(_mean([z * z for z in s], C) + eps)
      normed_rows.store(row, mask, [z * inverse_rms * w for z, w in zip(s, weight, strict=True)])
      plgpu.store(inverse_rms_ref.at[row], inverse_rms, mask=mask)
    return carry

  _for_rows(R, rows, step, 0)


def _backward_kernel(s_ref: Any, dnormed_ref: Any, ds_ref: Any, inverse_rms_ref: Any, weight_ref: Any, dx_ref: Any,
                     sums_ref: Any, *, rows: int, block: int) -> None:
  """Stores the gradient of each row, and this program's sums for the weight's and the bias's gradients."""
  (R, C), arrays = s_ref.shape, [_RowRef(ref, block) for ref in (s_ref, dnormed_ref, ds_ref)]
  dx_rows = _RowRef(dx_ref, block)
  weight = [weight_ref[at] for at in dx_rows.columns]

  def step(indices: list, valid: list, sums: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
    loaded = [([array.load(row, mask) for array in arrays], plgpu.load(inverse_rms_ref.at[row], mask=mask, other=0))
              for row, mask in zip(indices, valid, strict=True)]
    for row, mask, ((s, dnormed, ds), inverse_rms) in zip(indices, valid, loaded, strict=True):
      unit = [z * inverse_rms for z in s]
      dunit = [dz * w for dz, w in zip(dnormed, weight, strict=True)]
      along = _mean([a * b for a, b in zip(dunit, unit, strict=True)], C)
      dx = [(a - b * along) * inverse_rms + dz for a, b, dz in zip(dunit, unit, ds, strict=True)]
      dx_rows.store(row, mask, dx)
      dweight = [total + a * b for total, a, b in zip(sums[0], dnormed, unit, strict=True)]
      sums = dweight, [total + a for total, a in zip(sums[1], dx, strict=True)]
    return sums

  zeros = [jnp.zeros((block,), jnp.float32) for _ in weight]
  for i, totals in enumerate(_for_rows(R, rows, step, (zeros, zeros))):
    for at, total in zip(dx_rows.columns, totals, strict=True):
      sums_ref[i, at] = total

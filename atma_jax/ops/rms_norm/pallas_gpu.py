"""The residual sum and its norm as GPU kernels: Pallas through Triton, one pass over the arrays each way, no atomics.

A program takes some rows, one after the other, each at once. The backward pass adds the gradients that come along the stream
to the norm's; its programs keep the sums for the weight's and the bias's gradients in registers, and XLA adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
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

PIECE = 2048  # columns of a row in one value, at most; a row that is no power of two is several pieces
THREAD_COLUMNS, MOST_THREAD_COLUMNS, MOST_WARPS = 8, 24, 8
ROWS = {"forward": 16, "backward": 128}  # of a program; more make less that is summed afterwards
UNROLLED = 2  # rows whose loads are under way together


def supports(x: jax.Array, added: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array, eps: float) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  del eps
  dtypes = {z.dtype.name for z in (x, *added)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"takes x and what is added all in bfloat16 or all in float32, not {', '.join(sorted(dtypes))}"
  if jnp.float64 in (bias.dtype, weight.dtype):
    return "takes no float64"
  C = x.shape[-1]
  if C % 64 or MOST_THREAD_COLUMNS * 32 * _warps(C) < C:
    return f"takes widths of a power of two, from 64 on, times a small number, not {C}"
  return kernels.elsewhere("gpu")


def sum_and_norm(x: jax.Array, added: tuple[jax.Array, ...], bias: jax.Array, weight: jax.Array, eps: float, *,
                 interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.rms_norm.api.sum_and_norm`; `interpret` runs the kernels without a GPU."""
  return _run(x, added, bias.astype(jnp.float32), weight.astype(jnp.float32), eps, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _run(x, added, bias, weight, eps, interpret):
  return _run_forward(x, added, bias, weight, eps, interpret)[0]


def _run_forward(x, added, bias, weight, eps, interpret):
  rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
  inverse = jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)
  *s, normed, inverse = _call("forward", functools.partial(_forward_kernel, eps=eps), (x, *added), (bias, weight),
                              (*[rows] * (1 + bool(added)), inverse), interpret)
  s, normed, inverse = checkpoint_name(([z.reshape(x.shape) for z in s], normed.reshape(x.shape), inverse),
                                       dispatch.SUM_AND_NORM)
  s = s[0] if added else x
  return (s, normed), (s, inverse, bias, weight, (None,) * len(added))


def _run_backward(eps, interpret, residuals, cotangents):
  del eps
  (s, inverse, bias, weight, added), (ds, dnormed) = residuals, cotangents
  C, programs = s.shape[-1], pl.cdiv(inverse.size, ROWS["backward"])
  rows, sums = jax.ShapeDtypeStruct((inverse.size, C), s.dtype), jax.ShapeDtypeStruct((programs, 2, C), jnp.float32)
  dx, sums = _call("backward", _backward_kernel, (s, dnormed, ds), (inverse, weight), (rows, sums), interpret)
  dweight, dbias = jnp.sum(sums, axis=0)
  dx = dx.reshape(s.shape)
  return dx, (dx,) * len(added), dbias if added else jnp.zeros_like(bias), dweight


_run.defvjp(_run_forward, _run_backward)


def _warps(C: int) -> int:
  piece = kernels.columns_of(C, PIECE)
  return max(1, min(piece // 128, 1 << (-(-C // (32 * THREAD_COLUMNS)) - 1).bit_length(), MOST_WARPS))


def _call(direction: str, kernel: Callable[..., None], arrays: tuple, vectors: tuple, outputs: tuple, interpret: bool) -> Any:
  """One program for `ROWS` rows of all of `arrays`, (..., C) each; of what is (programs, 2, C) among the outputs it makes one."""
  C = arrays[0].shape[-1]
  arrays = tuple(z.reshape(-1, C) for z in arrays)
  rows, R = ROWS[direction], arrays[0].shape[0]

  def spec(z):
    if z.ndim == 3:
      return pl.BlockSpec((None, *z.shape[1:]), lambda r: (r, 0, 0))
    return pl.BlockSpec(z.shape, lambda r: (0,) * z.ndim)

  return pl.pallas_call(
    functools.partial(kernel, rows=rows, piece=kernels.columns_of(C, PIECE)),
    name="sum_and_norm" if direction == "forward" else "sum_and_norm_back", grid=(pl.cdiv(R, rows),),
    in_specs=[*map(spec, arrays), *map(spec, vectors)], out_shape=list(outputs), out_specs=list(map(spec, outputs)),
    interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=_warps(C), num_stages=1),
  )(*arrays, *vectors)


def _each(R: int, rows: int, step: Callable[[list, list, Any], Any], start: Any) -> Any:
  """``step(rows of one iteration, whether they are inside, carry) -> carry`` for all rows of the program."""
  first = pl.program_id(0) * rows

  def some_rows(i, carry):
    own = [first + i * UNROLLED + j for j in range(UNROLLED)]
    return step(own, [row < R for row in own], carry)

  return lax.fori_loop(0, kernels.cdiv(jnp.minimum(R - first, rows), UNROLLED), some_rows, start)


class _Row:
  """Pieces of rows of an array (R, C)."""

  def __init__(self, ref: Any, piece: int):
    self.ref, self.piece, self.at = ref, piece, [pl.ds(i, piece) for i in range(0, ref.shape[-1], piece)]

  def load(self, row: jax.Array, inside: jax.Array) -> list[jax.Array]:
    mask = jnp.broadcast_to(inside, (self.piece,))
    return [plgpu.load(self.ref.at[row, at], mask=mask, other=0).astype(jnp.float32) for at in self.at]

  def store(self, row: jax.Array, inside: jax.Array, values: list[jax.Array]) -> None:
    mask = jnp.broadcast_to(inside, (self.piece,))
    for at, value in zip(self.at, values, strict=True):
      plgpu.store(self.ref.at[row, at], value.astype(self.ref.dtype), mask=mask)


def _mean(pieces: list[jax.Array], C: int) -> jax.Array:
  return jnp.sum(functools.reduce(jnp.add, pieces)) * (1 / C)


def _forward_kernel(*refs, eps: float, rows: int, piece: int):
  count = next(i for i, ref in enumerate(refs) if ref.ndim == 1)
  bias_ref, weight_ref, *s_ref, normed_ref, inverse_ref = refs[count:]
  arrays, normed_rows, (R, C) = [_Row(ref, piece) for ref in refs[:count]], _Row(normed_ref, piece), normed_ref.shape
  s_rows = [_Row(ref, piece) for ref in s_ref]
  bias, weight = ([ref[at] for at in normed_rows.at] for ref in (bias_ref, weight_ref))

  def step(own, inside, carry):
    loaded = [[array.load(row, mask) for array in arrays] for row, mask in zip(own, inside, strict=True)]
    for row, mask, summands in zip(own, inside, loaded, strict=True):
      s = [functools.reduce(jnp.add, pieces) for pieces in zip(*summands, strict=True)]
      if s_rows:
        s = [(z + b).astype(normed_ref.dtype) for z, b in zip(s, bias, strict=True)]
        s_rows[0].store(row, mask, s)
        s = [z.astype(jnp.float32) for z in s]
      inverse = lax.rsqrt(_mean([z * z for z in s], C) + eps)
      normed_rows.store(row, mask, [z * inverse * w for z, w in zip(s, weight, strict=True)])
      plgpu.store(inverse_ref.at[row], inverse, mask=mask)
    return carry

  _each(R, rows, step, 0)


def _backward_kernel(s_ref, dnormed_ref, ds_ref, inverse_ref, weight_ref, dx_ref, sums_ref, *, rows: int, piece: int):
  (R, C), arrays, dx_rows = s_ref.shape, [_Row(ref, piece) for ref in (s_ref, dnormed_ref, ds_ref)], _Row(dx_ref, piece)
  weight = [weight_ref[at] for at in dx_rows.at]

  def step(own, inside, sums):
    loaded = [([array.load(row, mask) for array in arrays], plgpu.load(inverse_ref.at[row], mask=mask, other=0))
              for row, mask in zip(own, inside, strict=True)]
    for row, mask, ((s, dnormed, ds), inverse) in zip(own, inside, loaded, strict=True):
      unit = [z * inverse for z in s]
      dunit = [dz * w for dz, w in zip(dnormed, weight, strict=True)]
      along = _mean([a * b for a, b in zip(dunit, unit, strict=True)], C)
      dx = [(a - b * along) * inverse + dz for a, b, dz in zip(dunit, unit, ds, strict=True)]
      dx_rows.store(row, mask, dx)
      dweight = [total + a * b for total, a, b in zip(sums[0], dnormed, unit, strict=True)]
      sums = dweight, [total + a for total, a in zip(sums[1], dx, strict=True)]
    return sums

  nothing = [jnp.zeros((piece,), jnp.float32) for _ in weight]
  for i, totals in enumerate(_each(R, rows, step, (nothing, nothing))):
    for at, total in zip(dx_rows.at, totals, strict=True):
      sums_ref[i, at] = total

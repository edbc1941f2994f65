"""The gated short convolution as GPU kernels: Pallas through Triton, one pass over the arrays each way, no atomics.

A program takes some channels of some steps and goes from step to step, keeping the steps before that the taps reach in
registers, so that every array is read and written once. The backward pass is ``taps - 1`` steps late with the gradients of
what is filtered, which need the steps after. Every program writes its sums for the weight's and the biases' gradients, and
XLA adds those up.
"""

from __future__ import annotations

from collections.abc import Sequence
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

CHANNELS = 512  # of a program, at most
THREAD_CHANNELS = 4  # which leaves registers for enough programs at once to keep the memory busy
STEPS = {"forward": 64, "backward": 128}  # of a program; more make less of what is read twice or summed afterwards
UNROLLED = 4  # steps whose loads are under way together


def supports(projected: Sequence[jax.Array], weight: jax.Array, bias: jax.Array | None) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  dtypes = {z.dtype.name for z in projected}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"takes gates and x all in bfloat16 or all in float32, not {', '.join(sorted(dtypes))}"
  if any(z is not None and z.dtype == jnp.float64 for z in (weight, bias)):
    return "takes no float64"
  if weight.shape[1] % 64:
    return f"takes multiples of 64 channels, not {weight.shape[1]}"
  return kernels.elsewhere("gpu")


def gated_short_conv(projected: Sequence[jax.Array], weight: jax.Array, bias: jax.Array | None = None, *,
                     interpret: bool = False) -> jax.Array:
  """See `atma_jax.ops.gated_short_conv`; `interpret` runs the kernels without a GPU."""
  if bias is None:
    bias = jnp.zeros((3, weight.shape[1]), jnp.float32)
  return _run(tuple(projected), weight.astype(jnp.float32), bias.astype(jnp.float32), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run(projected, weight, bias, interpret):
  return _run_forward(projected, weight, bias, interpret)[0]


def _run_forward(projected, weight, bias, interpret):
  y = jax.ShapeDtypeStruct((*projected[0].shape[:2], weight.shape[1]), projected[0].dtype)
  (y,) = _call("forward", _forward_kernel, projected, (weight, bias), (y,), None, interpret)
  return checkpoint_name(y, dispatch.GATED_SHORT_CONV), (projected, weight, bias)


def _run_backward(interpret, residuals, dy):
  projected, weight, bias = residuals
  taps = weight.shape[0]
  *gradients, sums = _call("backward", _backward_kernel, (*projected, dy), (weight, bias), projected, taps + 3, interpret)
  sums = jnp.sum(sums, axis=(0, 1))
  return tuple(gradients), sums[:taps], sums[taps:]


_run.defvjp(_run_forward, _run_backward)


def _call(direction: str, kernel: Any, arrays: tuple, vectors: tuple, outputs: tuple, sums: int | None, interpret: bool) -> Any:
  """One program for `STEPS` of some channels of a row. Arrays and outputs are (B, T, C) or (B, T, 3 C), vectors (n, C); with
  `sums` so many vectors of every program come last, (B, programs along T, sums, C) in float32."""
  (B, T, _), C = arrays[0].shape, vectors[0].shape[1]
  steps = STEPS[direction]
  channels = kernels.columns_of(C, CHANNELS)
  grid = C // channels, pl.cdiv(T, steps), B
  shapes, specs = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in outputs], [_row(z) for z in outputs]
  if sums:
    shapes.append(jax.ShapeDtypeStruct((B, grid[1], sums, C), jnp.float32))
    specs.append(pl.BlockSpec((None, None, sums, channels), lambda c, t, b: (b, t, 0, c)))
  return pl.pallas_call(
    functools.partial(kernel, taps=vectors[0].shape[0], T=T, C=C, steps=steps),
    name="gated_short_conv" if direction == "forward" else "gated_short_conv_back", grid=grid,
    in_specs=[*map(_row, arrays), *(pl.BlockSpec((z.shape[0], channels), lambda c, t, b: (0, c)) for z in vectors)],
    out_shape=shapes, out_specs=specs, interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=max(1, channels // (32 * THREAD_CHANNELS)), num_stages=1),
  )(*arrays, *vectors)


def _row(x: Any) -> pl.BlockSpec:
  return pl.BlockSpec((None, *x.shape[1:]), lambda c, t, b: (b, 0, 0))


class _Columns:
  """A program's channels of some C of an array (T, ...)."""

  def __init__(self, ref: Any, part: int, C: int, channels: int):
    self.ref, self.T, self.shape = ref, ref.shape[0], (channels,)
    self.columns = pl.ds(pl.program_id(0) * channels + part * C, channels)

  def load(self, t: jax.Array) -> jax.Array:
    """Step t in float32; zeros outside the sequence."""
    inside = jnp.broadcast_to((t >= 0) & (t < self.T), self.shape)
    return plgpu.load(self.ref.at[jnp.maximum(t, 0), self.columns], mask=inside, other=0).astype(jnp.float32)

  def store(self, t: jax.Array, value: jax.Array, inside: jax.Array) -> None:
    """Step t, where it is `inside`."""
    plgpu.store(self.ref.at[jnp.maximum(t, 0), self.columns], value.astype(self.ref.dtype),
                mask=jnp.broadcast_to(inside, self.shape))


def _columns(refs: Sequence[Any], C: int, channels: int) -> list[_Columns]:
  """Of each array, or of all parts of one."""
  return [_Columns(ref, part, C, channels) for ref in refs for part in range(ref.shape[1] // C)]


def _vectors(ref: Any) -> list[jax.Array]:
  return [ref[i, :] for i in range(ref.shape[0])]


def _before(columns: _Columns, bias: jax.Array, first: jax.Array, taps: int) -> tuple[jax.Array, ...]:
  """The taps - 1 steps before `first`, bias added; zeros before the sequence."""
  return tuple(jnp.where(t >= 0, columns.load(t) + bias, 0) for t in (first - i for i in range(taps - 1, 0, -1)))


def _filtered(weight: list[jax.Array], values: tuple[jax.Array, ...]) -> jax.Array:
  return functools.reduce(jnp.add, (w * value for w, value in zip(weight, values, strict=True)))


def _forward_kernel(*refs, taps: int, T: int, C: int, steps: int):
  *array_refs, weight_ref, bias_ref, y_ref = refs
  weight, (of_gate, of_output_gate, of_x) = _vectors(weight_ref), _vectors(bias_ref)
  arrays, (y,) = (_columns(some, C, weight_ref.shape[1]) for some in (array_refs, (y_ref,)))
  first = pl.program_id(1) * steps

  def some_steps(i, products):
    times = [first + i * UNROLLED + j for j in range(UNROLLED)]
    loaded = [[array.load(t) for array in arrays] for t in times]
    for t, (gate, output_gate, x) in zip(times, loaded, strict=True):
      products = *products, (gate + of_gate) * (x + of_x)
      y.store(t, (output_gate + of_output_gate) * _filtered(weight, products), t < T)
      products = products[1:]
    return products

  before = (_before(array, bias, first, taps) for array, bias in ((arrays[0], of_gate), (arrays[2], of_x)))
  lax.fori_loop(0, _iterations(first, T, steps), some_steps, tuple(gate * x for gate, x in zip(*before, strict=True)))


def _backward_kernel(*refs, taps: int, T: int, C: int, steps: int):
  arrays = (len(refs) - 4) // 2  # one or three, and as many gradients
  weight_ref, bias_ref = refs[arrays + 1 : arrays + 3]
  weight, (of_gate, of_output_gate, of_x) = _vectors(weight_ref), _vectors(bias_ref)
  inputs, (dgates, doutput_gates, dxs) = (_columns(some, C, weight_ref.shape[1])
                                          for some in (refs[: arrays + 1], refs[arrays + 3 : -1]))
  first = pl.program_id(1) * steps

  def late(t, gate, x, dz, sums):
    """Stores the gradients of step t - taps + 1, the first of gate and x; `dz` are those of the filter's outputs from there."""
    t -= taps - 1
    du = jnp.where(t >= first, _filtered(weight[::-1], dz), 0)
    dgate, dx = du * x, du * gate
    for columns, gradient in ((dgates, dgate), (dxs, dx)):
      columns.store(t, gradient, (t >= first) & (t < T))
    return *sums[:taps], sums[taps] + dgate, sums[taps + 1], sums[taps + 2] + dx

  def some_steps(i, carry):
    gates, xs, dz, sums = carry
    times = [first + i * UNROLLED + j for j in range(UNROLLED)]
    loaded = [[columns.load(t) for columns in inputs] for t in times]
    for t, (gate, output_gate, x, dy) in zip(times, loaded, strict=True):
      gates, xs, dz = (*gates, gate + of_gate), (*xs, x + of_x), (*dz, dy * (output_gate + of_output_gate))
      products = tuple(gate * x for gate, x in zip(gates, xs, strict=True))
      doutput_gate = dy * _filtered(weight, products)
      doutput_gates.store(t, doutput_gate, t < T)
      dweight = (total + dz[-1] * product for total, product in zip(sums[:taps], products, strict=True))
      sums = *dweight, sums[taps], sums[taps + 1] + doutput_gate, sums[taps + 2]
      sums = late(t, gates[0], xs[0], dz, sums)
      gates, xs, dz = gates[1:], xs[1:], dz[1:]
    return gates, xs, dz, sums

  nothing, iterations = jnp.zeros(weight_ref.shape[1:], jnp.float32), _iterations(first, T, steps)
  before = (_before(columns, bias, first, taps) for columns, bias in ((inputs[0], of_gate), (inputs[2], of_x)))
  gates, xs, dz, sums = lax.fori_loop(0, iterations, some_steps, (*before, (nothing,) * (taps - 1), (nothing,) * (taps + 3)))
  for i in range(taps - 1):
    t = first + iterations * UNROLLED + i
    dz = *dz, inputs[3].load(t) * (inputs[1].load(t) + of_output_gate)
    sums = late(t, gates[i], xs[i], dz, sums)
    dz = dz[1:]
  for i, total in enumerate(sums):
    refs[-1][i, :] = total


def _iterations(first: jax.Array, T: int, steps: int) -> jax.Array:
  """How often `UNROLLED` steps are taken by the program of `steps` from `first` on."""
  return kernels.cdiv(jnp.minimum(T - first, steps), UNROLLED)

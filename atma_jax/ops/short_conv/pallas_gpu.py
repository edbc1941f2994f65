"""The gated short convolution as GPU kernels (Pallas through Triton): one pass over the arrays each way, without atomics.

A program takes some channels of some steps and goes from step to step, keeping in registers the previous steps that the filter
reaches, so that every array is read and written once. In the backward pass the gradient of a filter input needs the ``taps - 1``
steps after it, and is stored that many steps later. Every program writes its share of the weight's and the biases' gradients, and
XLA adds up the shares.
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

# Of one program.
CHANNELS = 512  # at most
THREAD_CHANNELS = 4  # leaves registers for enough concurrent programs to keep memory busy
STEPS = {"forward": 64, "backward": 128}  # the more there are, the less is read twice or left to add up
UNROLLED = 4  # steps that are loaded ahead of their use

Values = tuple[jax.Array, ...]  # float32 values of a program's channels: consecutive steps, or one value per tap


def supports(projected: Sequence[jax.Array], weight: jax.Array, bias: jax.Array | None, **_: Any) -> str | None:
  """Returns why the kernels cannot serve this call, or None if they can."""
  dtypes = {z.dtype.name for z in projected}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"takes gates and x all in bfloat16 or all in float32, not {', '.join(sorted(dtypes))}"
  if any(z is not None and z.dtype == jnp.float64 for z in (weight, bias)):
    return "takes no float64"
  if weight.shape[1] % 64:
    return f"takes multiples of 64 channels, not {weight.shape[1]}"
  return kernels.device_refusal("gpu")


def gated_short_conv(projected: Sequence[jax.Array], weight: jax.Array, bias: jax.Array | None = None, *,
                     starts: jax.Array | None = None, interpret: bool = False) -> jax.Array:
  """Implements `atma_jax.ops.gated_short_conv`; `interpret` runs the kernels without a GPU."""
  if bias is None:
    bias = jnp.zeros((3, weight.shape[1]), jnp.float32)
  starts = None if starts is None else starts.astype(jnp.int32)
  return _run(tuple(projected), weight.astype(jnp.float32), bias.astype(jnp.float32), starts, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _run(projected: tuple[jax.Array, ...], weight: jax.Array, bias: jax.Array, starts: jax.Array | None,
         interpret: bool) -> jax.Array:
  return _run_forward(projected, weight, bias, starts, interpret)[0]


def _run_forward(projected: tuple[jax.Array, ...], weight: jax.Array, bias: jax.Array, starts: jax.Array | None,
                 interpret: bool) -> tuple[jax.Array, tuple[Any, ...]]:
  y = jax.ShapeDtypeStruct((*projected[0].shape[:2], weight.shape[1]), projected[0].dtype)
  (y,) = _call("forward", _forward_kernel, projected, starts, (weight, bias), (y,), None, interpret)
  return checkpoint_name(y, dispatch.GATED_SHORT_CONV), (projected, weight, bias, starts)


def _run_backward(interpret: bool, residuals: tuple[Any, ...],
                  dy: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array, None]:
  projected, weight, bias, starts = residuals
  taps = weight.shape[0]
  *gradients, sums = _call("backward", _backward_kernel, (*projected, dy), starts, (weight, bias), projected, taps + 3, interpret)
  sums = jnp.sum(sums, axis=(0, 1))
  return tuple(gradients), sums[:taps], sums[taps:], None


_run.defvjp(_run_forward, _run_backward)


def _call(direction: str, kernel: Callable[..., None], arrays: Sequence[jax.Array], starts: jax.Array | None,
          vectors: Sequence[jax.Array], outputs: Sequence[Any], sums: int | None, interpret: bool) -> Any:
  """Runs a kernel with one program for some channels of each `STEPS` steps of a sequence.

  Args:
    direction: "forward" or "backward".
    kernel: takes references to `starts`, `arrays`, `vectors` and the results.
    arrays: (B, T, C) or (B, T, 3 C) each.
    starts: (B, T) int32 steps at which each step's document starts; None is 0.
    vectors: (n, C) each.
    outputs: shapes and dtypes of results (B, T, C) or (B, T, 3 C).
    sums: if given, a last result (B, programs along T, sums, C) in float32 has so many vectors of each program.
    interpret: run without a GPU.
  """
  (B, T, _), C = arrays[0].shape, vectors[0].shape[1]
  steps = STEPS[direction]
  channels = kernels.columns_of(C, CHANNELS)
  grid = C // channels, pl.cdiv(T, steps), B
  shapes, specs = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in outputs], [_sequence(z) for z in outputs]
  if sums:
    shapes.append(jax.ShapeDtypeStruct((B, grid[1], sums, C), jnp.float32))
    specs.append(pl.BlockSpec((None, None, sums, channels), lambda c, t, b: (b, t, 0, c)))
  return pl.pallas_call(
    functools.partial(kernel, taps=vectors[0].shape[0], T=T, C=C, steps=steps),
    name="gated_short_conv" if direction == "forward" else "gated_short_conv_back", grid=grid,
    in_specs=[None if starts is None else _sequence(starts), *map(_sequence, arrays),
              *(pl.BlockSpec((z.shape[0], channels), lambda c, t, b: (0, c)) for z in vectors)],
    out_shape=shapes, out_specs=specs, interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=max(1, channels // (32 * THREAD_CHANNELS)), num_stages=1),
  )(starts, *arrays, *vectors)


def _sequence(x: Any) -> pl.BlockSpec:
  """Gives a program its whole sequence of x (B, T, channels) or (B, T)."""
  return pl.BlockSpec((None, *x.shape[1:]), lambda c, t, b: (b, *(0,) * (x.ndim - 1)))


class _ChannelRef:
  """Loads and stores steps of a program's channels: of array (T, C), or of the `part`-th third of an array (T, 3 C)."""

  def __init__(self, ref: Any, part: int, C: int, channels: int):
    self.ref, self.T, self.shape = ref, ref.shape[0], (channels,)
    self.columns = pl.ds(pl.program_id(0) * channels + part * C, channels)

  def load(self, t: jax.Array) -> jax.Array:
    """Returns step t in float32; zeros outside the sequence."""
    mask = jnp.broadcast_to((t >= 0) & (t < self.T), self.shape)
    return plgpu.load(self.ref.at[jnp.maximum(t, 0), self.columns], mask=mask, other=0).astype(jnp.float32)

  def store(self, t: jax.Array, value: jax.Array, valid: jax.Array) -> None:
    """Stores step t where it is `valid`."""
    plgpu.store(self.ref.at[jnp.maximum(t, 0), self.columns], value.astype(self.ref.dtype),
                mask=jnp.broadcast_to(valid, self.shape))


def _channel_refs(refs: Sequence[Any], C: int, channels: int) -> list[_ChannelRef]:
  """Returns one `_ChannelRef` for each array (T, C), and three for an array (T, 3 C)."""
  return [_ChannelRef(ref, part, C, channels) for ref in refs for part in range(ref.shape[1] // C)]


class _Starts:
  """Where documents start: what keeps the filter from reaching over it."""

  def __init__(self, ref: Any, T: int):
    self.ref, self.T = ref, T

  def of(self, t: jax.Array, ahead: int = 0) -> jax.Array | None:
    """Returns the start of the document of step t + ahead, past the sequence that of its last step; None if none starts."""
    return None if self.ref is None else self.ref[jnp.clip(t + ahead, 0, self.T - 1)]

  def reached(self, value: jax.Array, t: jax.Array, before: int, start: jax.Array | None) -> jax.Array:
    """Returns `value` if step t - before is not before `start`, else zeros."""
    return value if start is None else jnp.where(t - before >= start, value, 0)


def _vectors(ref: Any) -> list[jax.Array]:
  """Returns the rows of a small array (n, channels)."""
  return [ref[i, :] for i in range(ref.shape[0])]


def _previous(array: _ChannelRef, bias: jax.Array, first: jax.Array, taps: int) -> Values:
  """Returns the taps - 1 steps before `first` with the bias added; zeros before the sequence."""
  return tuple(jnp.where(t >= 0, array.load(t) + bias, 0) for t in (first - i for i in range(taps - 1, 0, -1)))


def _filtered(weight: list[jax.Array], values: Values) -> jax.Array:
  """Applies the filter to as many consecutive steps as it has taps."""
  return functools.reduce(jnp.add, (w * value for w, value in zip(weight, values, strict=True)))


def _iterations(first: jax.Array, T: int, steps: int) -> jax.Array:
  """Returns the number of iterations, of `UNROLLED` steps each, of the program whose `steps` steps start at `first`."""
  return kernels.cdiv(jnp.minimum(T - first, steps), UNROLLED)


def _forward_kernel(starts_ref: Any, *refs: Any, taps: int, T: int, C: int, steps: int) -> None:
  """Takes references to starts or None, gate, output gate and x in one array or three, weight, bias, and the result."""
  *array_refs, weight_ref, bias_ref, y_ref = refs
  weight, (gate_bias, output_gate_bias, x_bias) = _vectors(weight_ref), _vectors(bias_ref)
  arrays, (y,) = (_channel_refs(some, C, weight_ref.shape[1]) for some in (array_refs, (y_ref,)))
  first, starts = pl.program_id(1) * steps, _Starts(starts_ref, T)

  def some_steps(i: jax.Array, products: Values) -> Values:
    times = [first + i * UNROLLED + j for j in range(UNROLLED)]
    loaded = [([array.load(t) for array in arrays], starts.of(t)) for t in times]
    for t, ((gate, output_gate, x), start) in zip(times, loaded, strict=True):
      products = *(starts.reached(product, t, i, start) for i, product in zip(range(taps - 1, 0, -1), products)), (
        gate + gate_bias) * (x + x_bias)
      y.store(t, (output_gate + output_gate_bias) * _filtered(weight, products), t < T)
      products = products[1:]
    return products

  iterations = _iterations(first, T, steps)
  gates, xs = (_previous(array, bias, first, taps) for array, bias in ((arrays[0], gate_bias), (arrays[2], x_bias)))
  lax.fori_loop(0, iterations, some_steps, tuple(gate * x for gate, x in zip(gates, xs, strict=True)))


def _backward_kernel(starts_ref: Any, *refs: Any, taps: int, T: int, C: int, steps: int) -> None:
  """Takes references to starts or None, gate, output gate and x in one array or three, dy, weight, bias, as many gradients, and
  sums.

  The sums are the gradients of the taps of the weight and of the three biases.
  """
  arrays = (len(refs) - 4) // 2
  weight_ref, bias_ref = refs[arrays + 1 : arrays + 3]
  weight, (gate_bias, output_gate_bias, x_bias) = _vectors(weight_ref), _vectors(bias_ref)
  inputs, (dgates, doutput_gates, dxs) = (_channel_refs(some, C, weight_ref.shape[1])
                                          for some in (refs[: arrays + 1], refs[arrays + 3 : -1]))
  first, starts = pl.program_id(1) * steps, _Starts(starts_ref, T)

  def store_delayed(t: jax.Array, gate: jax.Array, x: jax.Array, dfiltered: Values, sums: Values) -> Values:
    """Stores the gradients of gate and x at step t - taps + 1, given the filter outputs' gradients from there to t."""
    t -= taps - 1
    dfiltered = dfiltered[0], *(starts.reached(value, t, 0, starts.of(t, i)) for i, value in enumerate(dfiltered[1:], 1))
    dproduct = jnp.where(t >= first, _filtered(weight[::-1], dfiltered), 0)
    dgate, dx = dproduct * x, dproduct * gate
    for array, gradient in ((dgates, dgate), (dxs, dx)):
      array.store(t, gradient, (t >= first) & (t < T))
    return *sums[:taps], sums[taps] + dgate, sums[taps + 1], sums[taps + 2] + dx

  def some_steps(i: jax.Array, carry: tuple[Values, ...]) -> tuple[Values, ...]:
    gates, xs, dfiltered, sums = carry
    times = [first + i * UNROLLED + j for j in range(UNROLLED)]
    loaded = [[array.load(t) for array in inputs] for t in times]
    for t, (gate, output_gate, x, dy) in zip(times, loaded, strict=True):
      start = starts.of(t)
      gates, xs, dfiltered = (*gates, gate + gate_bias), (*xs, x + x_bias), (*dfiltered, dy * (output_gate + output_gate_bias))
      products = tuple(starts.reached(gate * x, t, i, start) if i else gate * x
                       for i, gate, x in zip(range(taps - 1, -1, -1), gates, xs, strict=True))
      doutput_gate = dy * _filtered(weight, products)
      doutput_gates.store(t, doutput_gate, t < T)
      dweight = (total + dfiltered[-1] * product for total, product in zip(sums[:taps], products, strict=True))
      sums = *dweight, sums[taps], sums[taps + 1] + doutput_gate, sums[taps + 2]
      sums = store_delayed(t, gates[0], xs[0], dfiltered, sums)
      gates, xs, dfiltered = gates[1:], xs[1:], dfiltered[1:]
    return gates, xs, dfiltered, sums

  zero, iterations = jnp.zeros(weight_ref.shape[1:], jnp.float32), _iterations(first, T, steps)
  previous = (_previous(array, bias, first, taps) for array, bias in ((inputs[0], gate_bias), (inputs[2], x_bias)))
  start = *previous, (zero,) * (taps - 1), (zero,) * (taps + 3)
  gates, xs, dfiltered, sums = lax.fori_loop(0, iterations, some_steps, start)
  for i in range(taps - 1):
    t = first + iterations * UNROLLED + i
    dfiltered = *dfiltered, inputs[3].load(t) * (inputs[1].load(t) + output_gate_bias)
    sums = store_delayed(t, gates[i], xs[i], dfiltered, sums)
    dfiltered = dfiltered[1:]
  for i, total in enumerate(sums):
    refs[-1][i, :] = total

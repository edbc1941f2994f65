"""The gated short convolution as shifted products, with a backward pass written for few passes over memory.

The forward pass multiplies gate and x again at every tap instead of storing their product. One pass over the four activations
makes all gradients but the weight's. Differentiated automatically, XLA would store each of the intermediate products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def gated_short_conv(projected: Sequence[jax.Array], weight: jax.Array, bias: jax.Array | None = None, *,
                     starts: jax.Array | None = None) -> jax.Array:
  """Implements `atma_jax.ops.gated_short_conv`."""
  arrays = projected if len(projected) == 3 else jnp.split(projected[0], 3, axis=-1)
  if bias is not None:
    arrays = [z + b.astype(z.dtype) for z, b in zip(arrays, bias, strict=True)]
  return _gated(*arrays, weight, starts)


@jax.custom_vjp
def _gated(gate: jax.Array, output_gate: jax.Array, x: jax.Array, weight: jax.Array, starts: jax.Array | None) -> jax.Array:
  return (output_gate * _filtered(gate, x, weight, starts)).astype(x.dtype)


def _gated_fwd(gate: jax.Array, output_gate: jax.Array, x: jax.Array, weight: jax.Array,
               starts: jax.Array | None) -> tuple[jax.Array, tuple[Any, ...]]:
  return _gated(gate, output_gate, x, weight, starts), (gate, output_gate, x, weight, starts)


def _gated_bwd(inputs: tuple[Any, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
  gate, output_gate, x, weight, starts = inputs
  dtype, taps = jnp.result_type(jnp.float32, x), weight.shape[0]
  dfiltered = dy.astype(dtype) * output_gate
  dweight = [jnp.sum(dfiltered * reached(_shifted(gate, i), starts, i) * _shifted(x, i), axis=(0, 1))
             for i in reversed(range(taps))]
  doutput_gate = dy * _filtered(gate, x, weight, starts)
  dproduct = sum(weight[taps - 1 - i].astype(dtype) * _shifted(reached(dy, starts, i), -i).astype(dtype)
                 * _shifted(output_gate, -i) for i in range(taps))
  gradients = (dproduct * x).astype(gate.dtype), doutput_gate.astype(output_gate.dtype), (dproduct * gate).astype(x.dtype)
  return *jax.lax.optimization_barrier(gradients), jnp.stack(dweight).astype(weight.dtype), None


_gated.defvjp(_gated_fwd, _gated_bwd)


def reached(x: jax.Array, starts: jax.Array | None, delay: int) -> jax.Array:
  """x (B, T, C) where the step `delay` before its own is still of the same document, else zero."""
  if starts is None or delay == 0:
    return x
  return jnp.where((jnp.arange(x.shape[1]) - delay >= starts)[..., None], x, 0)


def _filtered(gate: jax.Array, x: jax.Array, weight: jax.Array, starts: jax.Array | None) -> jax.Array:
  """Returns ``short_conv(gate * x, weight)`` in float32 or wider, without storing the product."""
  dtype, taps = jnp.result_type(jnp.float32, x), weight.shape[0]
  y: Any = sum(weight[i].astype(dtype) * reached(_shifted(gate, taps - 1 - i), starts, taps - 1 - i).astype(dtype)
               * _shifted(x, taps - 1 - i) for i in range(taps))
  return y


def _shifted(x: jax.Array, steps: int) -> jax.Array:
  """Delays x (B, T, C) by `steps`, or advances it if `steps` is negative, filling with zeros."""
  T = x.shape[1]
  padded = jnp.pad(x, ((0, 0), (max(steps, 0), max(-steps, 0)), (0, 0)))
  return padded[:, max(-steps, 0) :][:, :T]

"""The ops on the mesh that is set: every device computes its own rows, heads and piece of the sequence.

On several devices attention, memory and the gated convolution run inside `jax.shard_map`, batch over (data, fsdp) and heads or
channels over tensor, because accelerator kernels cannot be partitioned automatically; where the key/value heads do not divide
over tensor, a device holds all and takes those that its query heads read. With context > 1 whole sequences are split over time
as well, and `atma_jax.ops.context_parallel` takes the ops' place. Arguments and results are those of `atma_jax.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from atma_jax import ops
from atma_jax.ops.context_parallel import api as context_parallel
from atma_jax.ops.core import dispatch
from atma_jax.ops.gated_delta.api import repeated
from atma_jax.ops.squared_gate.api import RESULT, squared_gate, squared_gate_gradients
from atma_jax.sharding import LOGICAL_AXES, active_mesh, parts, spec

_CONTEXT, = LOGICAL_AXES["sequence"]
_TENSOR, = LOGICAL_AXES["heads"]


def check_length(T: int) -> None:
  """Raises ValueError unless a whole sequence of T tokens divides over the mesh that is set."""
  n = parts("sequence")
  if n > 1 and T % (2 * n):
    raise ValueError(f"a sequence of {T} tokens: must be a multiple of twice mesh context={n}, because causal attention deals "
                     "out two pieces to every device")


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None, null_length: int | None,
                    count_length: int | None, implementation: str, **raw: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.polar_attention` of whole sequences."""
  call = _attention(context_parallel.polar_attention, ops.polar_attention, implementation=implementation, window=window,
                    null_length=null_length, count_length=count_length)
  if active_mesh() is None:
    return call(q, k, v, **raw)
  heads = {name: ("heads", None) if value.ndim == 2 else ("heads",) for name, value in raw.items()}
  activations = _activations(q)
  return _over_heads(lambda q, k, v, raw: call(q, k, v, **raw), q, k, v, raw, heads, (activations, activations[:3]))


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None) -> jax.Array:
  """`atma_jax.ops.softmax_attention` of whole sequences."""
  call = _attention(context_parallel.softmax_attention, ops.softmax_attention, scale=scale, window=window)
  if active_mesh() is None:
    return call(q, k, v)
  return _over_heads(lambda q, k, v, _: call(q, k, v), q, k, v, {}, {}, _activations(q))


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array | None, implementation: str) -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.gated_delta`; without an initial state, of whole sequences."""
  if parts("heads") > 1 or parts("sequence") > 1:
    k, v = (repeated(z, q.shape[2]) for z in (k, v))  # which divide over tensor as the query heads do
  inputs = {"q": q, "k": k, "v": v, "log_gamma": log_gamma, "beta": beta}
  if initial_state is None and parts("sequence") > 1:
    op, time = functools.partial(context_parallel.gated_delta, axis=_CONTEXT), "sequence"
  else:
    op, time = ops.gated_delta, None
  call = functools.partial(op, implementation=implementation)
  rows, *_ = _activations(q)
  activations, state = (rows, time, "heads", None), (rows, "heads", None, None)
  axes = {name: activations[: x.ndim] for name, x in inputs.items()}
  if initial_state is not None:
    inputs, axes = inputs | {"initial_state": initial_state}, axes | {"initial_state": state}
  if active_mesh() is None:
    return call(**inputs)
  return _mapped(lambda inputs: call(**inputs), (inputs,), (axes,), (activations, state))


def short_conv(x: jax.Array, weight: jax.Array, *, channels: str) -> jax.Array:
  """`atma_jax.ops.short_conv` of whole sequences; `channels` is the logical axis of x's last dimension."""
  if parts("sequence") == 1:  # shifts along time and products along channels: nothing to communicate
    return ops.short_conv(x, weight)
  return _mapped(functools.partial(context_parallel.short_conv, axis=_CONTEXT), (x, weight),
                 ((*_activations(x)[:2], channels), (None, channels)), (*_activations(x)[:2], channels))


def gated_short_conv(project: Callable[[int], tuple[Sequence[jax.Array], jax.Array]], weight: jax.Array, *, channels: str,
                     implementation: str) -> jax.Array:
  """`atma_jax.ops.gated_short_conv` of whole sequences; `channels` as for `short_conv`.

  ``project(n)`` gives what the op takes in n arrays, and the bias. On a GPU that is one, so that a product makes it and two its
  gradients; elsewhere three, which XLA need not put side by side in the backward pass, nor a mesh take apart.
  """
  if parts("sequence") > 1:
    arrays, bias = project(3)
    gate, output_gate, x = (z + b.astype(z.dtype) for z, b in zip(arrays, bias, strict=True))
    return output_gate * short_conv(gate * x, weight, channels=channels)
  one = dispatch.platform() == "gpu" and implementation != "xla" and parts(channels) == 1
  arrays, bias = project(1 if one else 3)
  call = functools.partial(ops.gated_short_conv, implementation=implementation)
  if active_mesh() is None:
    return call(arrays, weight, bias)
  activations, vector = (*_activations(arrays[0])[:2], channels), (None, channels)
  return _mapped(call, (list(arrays), weight, bias), ([activations] * len(arrays), vector, vector), activations)


def gated_projection(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, implementation: str) -> jax.Array:
  """``squared_gate(u, g)`` with ``[u, g] = split(x @ kernel + bias)``: x (B, T, C), kernel (C, 2 F), bias (2 F,) -> (B, T, F).

  Where `makes_gradients_side_by_side`; the mesh may then split anything but F.
  """
  return _gated_projection(x, kernel, bias, implementation)


def makes_gradients_side_by_side(implementation: str) -> bool:
  """Whether the gradients of u and g are best made in one array: on a GPU, unless the mesh splits hidden units."""
  return dispatch.platform() == "gpu" and implementation != "xla" and parts("mlp") == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gated_projection(x, kernel, bias, implementation):
  return _gated_projection_fwd(x, kernel, bias, implementation)[0]


def _gated_projection_fwd(x, kernel, bias, implementation):
  del implementation
  u, g = (x @ w for w in jnp.split(kernel, 2, axis=1))
  of_u, of_g = jnp.split(bias.astype(x.dtype), 2)
  h = checkpoint_name(squared_gate(u + of_u, g + of_g), RESULT)
  return h, (x, kernel, bias, u, h)


def _gated_projection_bwd(implementation, residuals, dh):
  x, kernel, bias, u, h = residuals
  call = functools.partial(squared_gate_gradients, implementation=implementation)
  arguments = u, h, dh, bias.astype(x.dtype)[: u.shape[-1]]
  if active_mesh() is None:
    gradients, sums = call(*arguments)
  else:
    rows, time, *_ = _activations(u)
    activations = rows, time, None
    gradients, sums = _mapped(call, arguments, ((activations,) * 3 + ((None,),)), (activations, (rows, time, None, None)))
  dkernel = jnp.einsum("btc,btf->cf", x, gradients)
  return gradients @ kernel.T, dkernel, jnp.sum(sums, axis=(0, 1)).reshape(-1).astype(bias.dtype)


_gated_projection.defvjp(_gated_projection_fwd, _gated_projection_bwd)


def sum_and_norm(x: jax.Array, added: Sequence[jax.Array], bias: jax.Array, weight: jax.Array, *, eps: float,
                 implementation: str) -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.sum_and_norm`, where rows may be split over the mesh."""
  call = functools.partial(ops.sum_and_norm, eps=eps, implementation=implementation)
  if active_mesh() is None:
    return call(x, added, bias, weight)
  if parts("mlp") > 1 and added:  # a device has its share of each sum: one exchange
    added = [functools.reduce(jnp.add, added)]
  activations = *_activations(x)[:2], None
  return _mapped(call, (x, list(added), bias, weight), (activations, [activations] * len(added), (None,), (None,)),
                 (activations, activations))


def sums_where_it_norms(implementation: str) -> bool:
  """Whether what a layer adds to the residual stream is best added where the sum is normed: on a GPU."""
  return dispatch.platform() == "gpu" and implementation != "xla"


def _attention(split: Callable, whole: Callable, **options) -> Callable:
  op = whole if parts("sequence") == 1 else functools.partial(split, axis=_CONTEXT)
  return functools.partial(op, **options)


def _activations(x: jax.Array) -> tuple[str | None, ...]:
  """Logical axes of (B, T, H, D); rows that do not divide over the mesh, as in generation, are computed by every device."""
  return ("batch" if x.shape[0] % parts("batch") == 0 else None, "sequence", "heads", None)


def _over_heads(call: Callable, q: jax.Array, k: jax.Array, v: jax.Array, raw: dict[str, jax.Array], raw_axes: dict[str, Any],
                out_axes: Any) -> Any:
  """`call` of q (B, T, H, D), k and v (B, T, K, D) and per-head parameters on every device's own heads."""
  (H, K), n = (q.shape[2], k.shape[2]), parts("heads")
  if H % n:
    raise ValueError(f"{H} query heads do not divide over mesh {_TENSOR}={n}")
  axes, own = _activations(q), H // n
  kv_axes = axes if K % n == 0 else (*axes[:2], None, None)

  def take(x):
    if K % n == 0:
      return x
    group, first = H // K, jax.lax.axis_index(_TENSOR) * own
    if group % own == 0:
      return jax.lax.dynamic_slice_in_dim(x, first // group, 1, axis=2)
    return jnp.take(x, (first + jnp.arange(own)) // group, axis=2)

  return _mapped(lambda q, k, v, raw: call(q, take(k), take(v), raw), (q, k, v, raw), (axes, kv_axes, kv_axes, raw_axes),
                 out_axes)


def _mapped(function: Callable, arguments: tuple, axes: Any, out_axes: Any) -> Any:
  """`jax.shard_map` on the mesh that is set, with logical axes for specs."""
  def specs(axes):
    return jax.tree.map(spec, axes, is_leaf=lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x))

  # Kernels do not say over which axes their results vary, so that cannot be checked.
  return jax.shard_map(function, in_specs=specs(axes), out_specs=specs(out_axes), check_vma=False)(*arguments)

"""The ops of whole sequences on the current mesh: every device computes its own rows, heads and piece of the sequence.

On several devices attention, memory and the gated convolution run inside `jax.shard_map`, the batch over (data, fsdp) and heads
or channels over tensor, because accelerator kernels cannot be partitioned automatically. Where the key/value heads do not divide
over tensor, a device holds all of them and takes those that its query heads read. With context > 1 sequences are split over time
as well, and `atma_jax.ops.context_parallel` takes the place of the ops. Arguments and results are those of `atma_jax.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import chex
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax import ops
from atma_jax.errors import divides_over_context
from atma_jax.ops import context_parallel
from atma_jax.ops.core import dispatch
from atma_jax.ops.gated_delta.api import repeat_heads
from atma_jax.ops.polar_attention.api import attend
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams
from atma_jax.ops.squared_gate.api import CHECKPOINT_NAME, squared_gate, squared_gate_gradients
from atma_jax.sharding import LOGICAL_AXES, active_mesh, shard_count, spec

Documents = dict[str, Any]  # the keyword `starts` of an op, or nothing
_CONTEXT, = LOGICAL_AXES["sequence"]
_TENSOR, = LOGICAL_AXES["heads"]


def check_length(T: int) -> None:
  """Raises ValueError unless a whole sequence of T tokens divides over the current mesh."""
  n = shard_count("sequence")
  if not divides_over_context(T, n):
    raise ValueError(f"a sequence of {T} tokens: must be a multiple of twice mesh context={n}, because causal attention deals "
                     "out two pieces to every device")


def polar_attention(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], params: PolarParams,
                    spec: AttentionSpec, *, starts: Int[Array, "B T"] | None = None,
                    implementation: str) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """`atma_jax.ops.polar_attention` of whole sequences."""
  chex.assert_rank([q, k, v], 4)
  check_documents(starts)
  op = attend if shard_count("sequence") == 1 else functools.partial(context_parallel.polar_attention, axis=_CONTEXT)

  def call(q: jax.Array, k: jax.Array, v: jax.Array, others: tuple[PolarParams, Documents]) -> tuple[jax.Array, jax.Array]:
    params, documents = others
    return op(q, k, v, params, spec, **documents, implementation=implementation)

  others = params, _documents(starts)
  if active_mesh() is None:
    return call(q, k, v, others)
  axes, activations = jax.tree.map(lambda x: ("heads", *(None,) * (x.ndim - 1)), params), _activations(q)
  return _over_heads(call, q, k, v, others, (axes, dict.fromkeys(others[1], activations[:2])), (activations, activations[:3]))


def softmax_attention(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], *, scale: float,
                      spec: AttentionSpec, starts: Int[Array, "B T"] | None = None,
                      implementation: str) -> Float[Array, "B T H D"]:
  """`atma_jax.ops.softmax_attention` of whole sequences."""
  chex.assert_rank([q, k, v], 4)
  check_documents(starts)
  if shard_count("sequence") == 1:
    op = functools.partial(ops.softmax_attention, scale=scale, window=spec.window, implementation=implementation)
  else:
    op = functools.partial(context_parallel.softmax_attention, scale=scale, spec=spec, axis=_CONTEXT,
                           implementation=implementation)
  documents = _documents(starts)
  if active_mesh() is None:
    return op(q, k, v, **documents)
  activations = _activations(q)
  return _over_heads(lambda q, k, v, documents: op(q, k, v, **documents), q, k, v, documents,
                     dict.fromkeys(documents, activations[:2]), activations)


def gated_delta(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], *,
                log_gamma: Float[Array, "B T H"], beta: Float[Array, "B T H"], initial_state: Float[Array, "B H Dv D"] | None,
                starts: Int[Array, "B T"] | None = None,
                implementation: str) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Dv D"]]:
  """`atma_jax.ops.gated_delta`: of whole sequences without an initial state, else of tokens that follow those behind it."""
  chex.assert_rank([q, k, v, log_gamma, beta], [4, 4, 4, 3, 3])
  check_documents(starts)
  if shard_count("heads") > 1 or shard_count("sequence") > 1:
    k, v = (repeat_heads(z, q.shape[2]) for z in (k, v))  # which divide over tensor as the query heads do
  inputs = {"q": q, "k": k, "v": v, "log_gamma": log_gamma, "beta": beta}
  if initial_state is None and shard_count("sequence") > 1:
    op, time = functools.partial(context_parallel.gated_delta, axis=_CONTEXT), "sequence"
  else:
    op, time = ops.gated_delta, None
  call = functools.partial(op, implementation=implementation)
  rows, *_ = _activations(q)
  activations, state = (rows, time, "heads", None), (rows, "heads", None, None)
  axes = {name: activations[: x.ndim] for name, x in inputs.items()}
  if initial_state is not None:
    inputs, axes = inputs | {"initial_state": initial_state}, axes | {"initial_state": state}
  if starts is not None:
    inputs, axes = inputs | {"starts": starts}, axes | {"starts": activations[:2]}
  if active_mesh() is None:
    return call(**inputs)
  return _mapped(lambda inputs: call(**inputs), (inputs,), (axes,), (activations, state))


def short_conv(x: Float[Array, "B T C"], weight: Float[Array, "taps C"], *, channels: str,
               starts: Int[Array, "B T"] | None = None) -> Float[Array, "B T C"]:
  """`atma_jax.ops.short_conv`; `channels` is the logical axis of x's last dimension."""
  chex.assert_rank([x, weight], [3, 2])
  check_documents(starts)
  if shard_count("sequence") == 1:  # shifts along time and products along channels: nothing to communicate
    return ops.short_conv(x, weight, starts=starts)
  return _mapped(functools.partial(context_parallel.short_conv, axis=_CONTEXT), (x, weight),
                 ((*_activations(x)[:2], channels), (None, channels)), (*_activations(x)[:2], channels))


def gated_short_conv(project: Callable[[int], tuple[Sequence[jax.Array], jax.Array]], weight: Float[Array, "taps C"], *,
                     channels: str, starts: Int[Array, "B T"] | None = None, implementation: str) -> Float[Array, "B T C"]:
  """`atma_jax.ops.gated_short_conv`.

  Args:
    project: ``project(n)`` returns gates and x in n arrays, 1 or 3, and their bias (3, C). On a GPU one array is asked for, which
      one product makes and two products take the gradients of; elsewhere three, which XLA need not concatenate in the backward
      pass, nor a mesh split again.
    weight: of the convolution.
    channels: logical axis of C.
    starts: where each token's document starts; None is 0.
    implementation: one of `dispatch.NAMES`.
  """
  check_documents(starts)
  if shard_count("sequence") > 1:
    arrays, bias = project(3)
    gate, output_gate, x = (z + b.astype(z.dtype) for z, b in zip(arrays, bias, strict=True))
    return output_gate * short_conv(gate * x, weight, channels=channels)
  one = dispatch.may_run_kernels(implementation, "gpu") and shard_count(channels) == 1
  arrays, bias = project(1 if one else 3)
  documents = _documents(starts)

  def call(arrays: Sequence[jax.Array], weight: jax.Array, bias: jax.Array, documents: Documents) -> jax.Array:
    return ops.gated_short_conv(arrays, weight, bias, **documents, implementation=implementation)

  if active_mesh() is None:
    return call(arrays, weight, bias, documents)
  activations, vector = (*_activations(arrays[0])[:2], channels), (None, channels)
  return _mapped(call, (list(arrays), weight, bias, documents),
                 ([activations] * len(arrays), vector, vector, dict.fromkeys(documents, activations[:2])), activations)


def gated_projection(x: Float[Array, "B T C"], kernel: Float[Array, "C 2*F"], bias: Float[Array, " 2*F"], *,
                     implementation: str) -> Float[Array, "B T F"]:
  """``squared_gate(u, g)`` with ``[u, g] = split(x @ kernel + bias)``, whose backward pass makes the gradients of u and g in one
  array.

  To be used where `concatenates_gradients` says so; the mesh may then split anything but F.
  """
  chex.assert_rank([x, kernel, bias], [3, 2, 1])
  return _gated_projection(x, kernel, bias, implementation)


def concatenates_gradients(implementation: str) -> bool:
  """Whether `gated_projection` is the faster form of the MLP's gate: on a GPU, unless the mesh splits hidden units."""
  return dispatch.may_run_kernels(implementation, "gpu") and shard_count("mlp") == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gated_projection(x: jax.Array, kernel: jax.Array, bias: jax.Array, implementation: str) -> jax.Array:
  return _gated_projection_fwd(x, kernel, bias, implementation)[0]


def _gated_projection_fwd(x: jax.Array, kernel: jax.Array, bias: jax.Array,
                          implementation: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  del implementation
  u, g = (x @ w for w in jnp.split(kernel, 2, axis=1))
  of_u, of_g = jnp.split(bias.astype(x.dtype), 2)
  h = checkpoint_name(squared_gate(u + of_u, g + of_g), CHECKPOINT_NAME)
  return h, (x, kernel, bias, u, h)


def _gated_projection_bwd(implementation: str, residuals: tuple[jax.Array, ...],
                          dh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
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


def sum_and_norm(x: Float[Array, "B T C"], added: Sequence[Float[Array, "B T C"]], bias: Float[Array, " C"],
                 weight: Float[Array, " C"], *, eps: float,
                 implementation: str) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
  """`atma_jax.ops.sum_and_norm`; the mesh may split B and T."""
  chex.assert_equal_shape([x, *added])
  call = functools.partial(ops.sum_and_norm, eps=eps, implementation=implementation)
  if active_mesh() is None:
    return call(x, added, bias, weight)
  if shard_count("mlp") > 1 and added:  # a device has its share of each sum: one exchange
    added = [functools.reduce(jnp.add, added)]
  activations = *_activations(x)[:2], None
  return _mapped(call, (x, list(added), bias, weight), (activations, [activations] * len(added), (None,), (None,)),
                 (activations, activations))


def sums_in_norms(implementation: str) -> bool:
  """Whether sums of the residual stream are best made by the kernel that norms them: on a GPU."""
  return dispatch.may_run_kernels(implementation, "gpu")


def check_documents(starts: Int[Array, "B T"] | None) -> None:
  """Raises ValueError where rows pack documents and the mesh splits time, which the ops over a context axis do not serve."""
  if starts is not None and shard_count("sequence") > 1:
    raise ValueError(f"document masks: must be off with mesh {_CONTEXT}={shard_count('sequence')}, which knows no documents")


def _documents(starts: Int[Array, "B T"] | None) -> Documents:
  """The keywords of an op for `starts`: none without documents, so that a program without them stays as it is."""
  return {} if starts is None else {"starts": starts}


def _activations(x: jax.Array) -> tuple[str | None, ...]:
  """Logical axes of (B, T, H, D); rows that do not divide over the mesh, as in generation, are computed by every device."""
  return ("batch" if x.shape[0] % shard_count("batch") == 0 else None, "sequence", "heads", None)


def _over_heads(call: Callable[..., Any], q: jax.Array, k: jax.Array, v: jax.Array, params: Any, params_axes: Any,
                out_axes: Any) -> Any:
  """``call(q, k, v, params)`` on every device's own heads; `params` is a pytree of arrays, `params_axes` that of their axes."""
  (H, K), n = (q.shape[2], k.shape[2]), shard_count("heads")
  if H % n:
    raise ValueError(f"{H} query heads do not divide over mesh {_TENSOR}={n}")
  axes, own = _activations(q), H // n
  kv_axes = axes if K % n == 0 else (*axes[:2], None, None)

  def take(x: jax.Array) -> jax.Array:
    """Of key or value heads, those that the device's query heads read."""
    if K % n == 0:
      return x
    group, first = H // K, jax.lax.axis_index(_TENSOR) * own
    if group % own == 0:
      return jax.lax.dynamic_slice_in_dim(x, first // group, 1, axis=2)
    return jnp.take(x, (first + jnp.arange(own)) // group, axis=2)

  return _mapped(lambda q, k, v, params: call(q, take(k), take(v), params), (q, k, v, params),
                 (axes, kv_axes, kv_axes, params_axes), out_axes)


def _mapped(function: Callable[..., Any], arguments: tuple[Any, ...], axes: Any, out_axes: Any) -> Any:
  """`jax.shard_map` on the current mesh, with logical axes in the place of specs."""
  def specs(axes: Any) -> Any:
    return jax.tree.map(spec, axes, is_leaf=lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x))

  # Kernels do not say over which axes their results vary, so that cannot be checked.
  return jax.shard_map(function, in_specs=specs(axes), out_specs=specs(out_axes), check_vma=False)(*arguments)

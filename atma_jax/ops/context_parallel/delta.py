"""The gated-delta memory over a sequence that is split over devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.ops.context_parallel.layout import receive
from atma_jax.ops.core import dispatch
from atma_jax.ops.gated_delta.api import OP as MEMORY

_PACKAGE = "atma_jax.ops.gated_delta"
# ``transition(k, v, log_gamma=, beta=) -> (A, N)``: what the steps do to the state M before them, ``M A + N``.
TRANSITION = dispatch.Op("gated_delta over a split sequence", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:transition"),
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.pallas_tpu:transition"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:transition"),
})


def gated_delta(q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H V"], *,
                log_gamma: Float[Array, "B T H"], beta: Float[Array, "B T H"], axis: str,
                implementation: str = "auto") -> tuple[Float[Array, "B T H V"], Float[Array, "B H V D"]]:
  """`atma_jax.ops.gated_delta`, from a zero state, of a sequence split over mesh axis `axis`.

  Returns:
    The readout of this device's steps, and the state after the whole sequence, which is the same on every device.
  """
  (B, _, H, D), Dv = q.shape, v.shape[-1]
  state = jax.ShapeDtypeStruct((B, H, Dv, D), jnp.result_type(jnp.float32, q, k, v))
  name = MEMORY.resolve(implementation, q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state)
  outputs: Any = _memory(q, k, v, log_gamma, beta, axis, TRANSITION.resolve(name))
  readout, final = outputs
  last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
  return readout, jax.lax.psum(jnp.where(last, final, 0), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _memory(q: jax.Array, k: jax.Array, v: jax.Array, log_gamma: jax.Array, beta: jax.Array, axis: str,
            implementation: str) -> tuple[jax.Array, jax.Array]:
  """Readouts of this device's steps and the state after them."""
  return _memory_fwd(q, k, v, log_gamma, beta, axis, implementation)[0]


def _memory_fwd(q: jax.Array, k: jax.Array, v: jax.Array, log_gamma: jax.Array, beta: jax.Array, axis: str,
                implementation: str) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, jax.Array]]:
  A, N = TRANSITION.implementations[implementation].function(k, v, log_gamma=log_gamma, beta=beta)
  A, start = checkpoint_name((A, _states_before(A, N, axis)), dispatch.GATED_DELTA)

  def run(q: jax.Array, k: jax.Array, v: jax.Array, log_gamma: jax.Array, beta: jax.Array,
          state: jax.Array) -> tuple[jax.Array, jax.Array]:
    op = MEMORY.implementations[implementation].function
    return op(q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state)

  outputs, vjp = jax.vjp(run, q, k, v, log_gamma, beta, start)
  return outputs, (vjp, A)


def _memory_bwd(axis: str, implementation: str, residuals: tuple[Any, jax.Array],
                cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
  """Brings the cotangents of later devices to this one's final state, back through the states between them.

  With X the cotangent of a piece's initial state, ``X = own + X_next A^T``, where own comes from the piece's own outputs. So the
  op's backward pass runs twice, the first time for own alone.
  """
  del implementation
  (vjp, A), (dreadout, dfinal) = residuals, cotangents
  *_, own = vjp((dreadout, dfinal))
  return vjp((dreadout, dfinal + _states_before(A.mT, own, axis, reverse=True)))[:5]


_memory.defvjp(_memory_fwd, _memory_bwd)


def _states_before(A: jax.Array, N: jax.Array, axis: str, reverse: bool = False) -> jax.Array:
  """The state in which the devices before this one leave a zero state that each takes from M to ``M A + N``.

  With `reverse`, the devices after this one, last to first. A prefix sum by doubling: after step s a device's pair stands for up
  to 2^s devices, itself the last.
  """
  n, way = jax.lax.axis_size(axis), -1 if reverse else 1
  rank = jax.lax.axis_index(axis)
  rank = n - 1 - rank if reverse else rank
  hop = 1
  while hop < n:
    earlier_A, earlier_N = receive((A, N), axis, way * hop)
    N = jnp.matmul(earlier_N, A, precision=jax.lax.Precision.HIGHEST) + N
    A = jnp.where(rank >= hop, jnp.matmul(earlier_A, A, precision=jax.lax.Precision.HIGHEST), A)
    hop *= 2
  return receive(N, axis, way)

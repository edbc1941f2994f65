"""Polar and softmax attention over a sequence that is split over devices: keys and values go round a ring."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.errors import divides_over_context
from atma_jax.ops.context_parallel.layout import rotate, unzigzag, zigzag
from atma_jax.ops.core import dispatch, streaming
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

_POLAR = "atma_jax.ops.polar_attention"
# Each target is a class with the methods of `streaming.RingSteps`; all serve the same ring.
ATTENTION = dispatch.Op("attention over a split sequence", {
  "pallas_gpu": dispatch.Implementation(f"{_POLAR}.gpu.ring_gpu:RingSteps", platforms=("gpu",), supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_POLAR}.tpu.ring_tpu:RingSteps", platforms=("tpu",), supports="supports"),
  "xla": dispatch.Implementation("atma_jax.ops.core.streaming:RingSteps"),
})


def polar_attention(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], params: PolarParams,
                    spec: AttentionSpec, *, axis: str,
                    implementation: str = "auto") -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """`atma_jax.ops.polar_attention.api.attend` of a sequence split over mesh axis `axis`."""
  dispatch.check_attention("polar_attention", q, k, v)
  ring = _ring_of(q, k, v, spec.window, axis, implementation)
  q, k, v = map(ring.deal, (q, k, v))
  per_query = formula.of_positions(params, ring.positions(), spec, formula.accumulator(q))
  statistics = _statistics(q, k, v, per_query.temp * q.shape[-1]**-0.5, ring)
  direction, magnitude = jax.checkpoint(formula.finalise)(statistics, per_query, params.v_null)
  return ring.collect(direction.astype(q.dtype)), ring.collect(magnitude)


def softmax_attention(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], *, scale: float,
                      spec: AttentionSpec, axis: str, implementation: str = "auto") -> Float[Array, "B T H D"]:
  """`atma_jax.ops.softmax_attention` of a sequence split over mesh axis `axis`, with the window of `spec`."""
  dispatch.check_attention("softmax_attention", q, k, v)
  ring = _ring_of(q, k, v, spec.window, axis, implementation)
  q, k, v = map(ring.deal, (q, k, v))
  scales = jnp.full(q.shape[1:3], scale, jnp.result_type(jnp.float32, q))
  statistics = _statistics(q, k, v, scales, ring)
  return ring.collect((statistics.S / statistics.L[..., None]).astype(q.dtype))


@dataclasses.dataclass(frozen=True)
class _Ring:
  """How attention deals a sequence out to the devices of a mesh axis; hashable, as a static argument must be.

  Attributes:
    length: tokens of a device.
    axis: name of the mesh axis.
    devices: its size.
    window: keys a query may see; None where every query sees back to the start.
    implementation: a name of `ATTENTION`.
  """

  length: int
  axis: str
  devices: int
  window: int | None
  implementation: str

  @property
  def zigzag(self) -> bool:
    """Whether every device gets an early and a late piece: a window of at most half the sequence is even enough without."""
    return self.devices > 1 and (self.window is None or 2 * self.window > self.length * self.devices)

  @property
  def segment(self) -> int:
    """Tokens of a segment of consecutive positions."""
    return self.length // 2 if self.zigzag else self.length

  @property
  def hops(self) -> int:
    """How many devices' keys a device looks at, its own included."""
    if self.zigzag or self.window is None:
      return self.devices
    return min(self.devices, 1 + -(-(self.window - 1) // self.length))

  def deal(self, x: jax.Array) -> jax.Array:
    """From consecutive pieces to the layout of the ring."""
    return zigzag(x, self.axis) if self.zigzag else x

  def collect(self, x: jax.Array) -> jax.Array:
    """The inverse of `deal`."""
    return unzigzag(x, self.axis) if self.zigzag else x

  def starts(self, hop: jax.typing.ArrayLike = 0) -> tuple[jax.Array, ...]:
    """Positions at which the segments of the device `hop` before this one, in the ring, start."""
    device = (jax.lax.axis_index(self.axis) - hop) % self.devices
    segments = (device, 2 * self.devices - 1 - device) if self.zigzag else (device,)
    return tuple(self.segment * segment for segment in segments)

  def positions(self) -> jax.Array:
    """(T,) positions of this device's tokens."""
    return jnp.concatenate([start + jnp.arange(self.segment) for start in self.starts()])

  def steps(self, q: jax.Array, k: jax.Array) -> streaming.RingSteps:
    """The implementation's work on this device."""
    return ATTENTION.implementations[self.implementation].function(q, k, window=self.window, query_starts=self.starts())


def _ring_of(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, axis: str, implementation: str) -> _Ring:
  name, length, devices = ATTENTION.resolve(implementation, q, k, v), q.shape[1], jax.lax.axis_size(axis)
  window = None if window is None or window >= length * devices else window
  ring = _Ring(length, axis, devices, window, name)
  if ring.zigzag and not divides_over_context(length * devices, devices):
    raise ValueError(f"a sequence of {length * devices} tokens over {devices} devices: its length must be a multiple of "
                     f"{2 * devices}, because causal attention gives every device two chunks")
  return ring


def _statistics(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, ring: _Ring) -> Statistics:
  gathered: Any = _gather(q, k, v, scale, ring)
  return Statistics(*gathered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gather(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, ring: _Ring) -> Statistics:
  """Statistics of the local queries over all keys they see; scale (T, H)."""
  return _gather_fwd(q, k, v, scale, ring)[0]


def _gather_fwd(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array,
                ring: _Ring) -> tuple[Statistics, tuple[jax.Array, ...]]:
  steps = ring.steps(q, k)
  (rows, statistics), keys = steps.queries(q, scale), steps.keys(k, v)

  def hop(carry: Any, index: jax.Array) -> tuple[Any, None]:
    statistics, keys = carry
    coming = rotate(keys, ring.axis, 1)  # needs nothing computed here, so it overlaps with what is
    return (steps.gather(rows, statistics, keys, ring.starts(index)), coming), None

  # All hops in one loop: the last need not pass its keys on, but a body of its own would double the program.
  (statistics, _), _ = jax.lax.scan(hop, (statistics, keys), jnp.arange(ring.hops))
  statistics = checkpoint_name(statistics, dispatch.POLAR_ATTENTION)
  return steps.statistics(statistics), (q, k, v, scale, statistics)


def _gather_bwd(ring: _Ring, residuals: tuple[jax.Array, ...], cotangents: Statistics) -> tuple[jax.Array, ...]:
  q, k, v, scale, statistics = residuals
  steps = ring.steps(q, k)
  (rows, dqueries), keys = steps.cotangents(q, scale, statistics, cotangents[1:]), steps.keys(k, v)

  def hop(carry: Any, index: jax.Array) -> tuple[Any, None]:
    dqueries, keys, dkeys = carry
    coming = rotate(keys, ring.axis, 1)
    dqueries, dkeys = steps.add_gradients(rows, dqueries, keys, dkeys, ring.starts(index))
    return (dqueries, coming, rotate(dkeys, ring.axis, 1)), None

  (dqueries, _, dkeys), _ = jax.lax.scan(hop, (dqueries, keys, steps.zero_gradients(keys)), jnp.arange(ring.hops))
  if ring.hops < ring.devices:
    dkeys = rotate(dkeys, ring.axis, -ring.hops)  # back to where the keys belong
  (dq, total), (dk, dv) = steps.query_gradients(dqueries), steps.key_gradients(dkeys)
  dscale = _scale_gradient(jnp.sum(q * dq, axis=-1), total / scale, steps.statistics(statistics), cotangents, scale)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dscale


_gather.defvjp(_gather_fwd, _gather_bwd)


def _scale_gradient(q_dq: jax.Array, total: jax.Array, statistics: Statistics, cotangents: Statistics,
                    scale: jax.Array) -> jax.Array:
  """Gradient of scale (T, H); `total` is ``sum_j dlogit_j`` as rounded, what it should be follows from the statistics."""
  _, L, Q, S = statistics
  exact = cotangents[1] * L + 2 * cotangents[2] * Q + jnp.sum(cotangents[3] * S, axis=-1)
  lse = statistics.M + jnp.log(L)
  return jnp.sum(formula.temperature_gradient(q_dq, total, exact, lse, Q / (L * L), scale), axis=0)

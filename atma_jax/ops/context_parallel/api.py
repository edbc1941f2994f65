"""The ops over a sequence that is split over devices: exact, forward and backward, a device never holds it whole.

To be called inside `jax.shard_map`. Device i of the n of a mesh axis holds the i-th of n equal pieces of the sequence; all
arrays are those of one device, T and S their lengths. What each op sends to other devices, a layer:

* Attention: keys and values go round a ring (`jax.lax.ppermute`), each stop folding them into the statistics of the local
  queries (`streaming.RingSteps`, or kernels with its methods), which is exact because statistics over disjoint keys merge
  exactly. A ring moves the bytes of an all-gather, (n - 1) 2 K D T, but holds two pieces instead of n and computes while
  it moves; queries would be H / K times heavier to move. The backward pass takes the gradients of keys and values along, in
  float32. A window ends the ring after as many stops as it reaches over.
* Causal work is even only if every device has early and late queries. So for the attention alone the sequence is dealt out
  anew (`zigzag`): device i gets pieces i and 2n - 1 - i of 2n, for (2 H + 2 K) D T more elements a layer and two hops.
  All else, convolutions, memory, rotary positions and loss, keeps consecutive pieces, where a neighbour's last
  tokens are enough. Attention with a window of at most half the sequence keeps them too: its work is even enough.
* Gated-delta memory: a piece acts on the state as ``M -> M A + N``; the pairs (A, N), 2 D D H numbers in float32, are combined
  over the devices by doubling, in ceil(log2 n) exchanges, and the op then runs from the right state.
* Convolutions: the last taps - 1 inputs of the device before.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from atma_jax.ops import short_conv as unsplit_short_conv
from atma_jax.ops.core import dispatch, streaming
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.gated_delta.api import OP as MEMORY
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.api import check

_POLAR = "atma_jax.ops.polar_attention"
# Each target is a class with the methods of `streaming.RingSteps`; all serve the same ring.
ATTENTION = dispatch.Op("attention over a split sequence", {
  "pallas_gpu": dispatch.Implementation(f"{_POLAR}.gpu.ring_gpu:RingSteps", platforms=("gpu",), supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_POLAR}.tpu.ring_tpu:RingSteps", platforms=("tpu",), supports="supports"),
  "xla": dispatch.Implementation("atma_jax.ops.core.streaming:RingSteps"),
})
_DELTA = "atma_jax.ops.gated_delta"
# ``transition(k, v, log_gamma=, beta=) -> (A, N)``: what the steps do to the state M before them, ``M A + N``.
TRANSITION = dispatch.Op("gated_delta over a split sequence", {
  "pallas_gpu": dispatch.Implementation(f"{_DELTA}.pallas_gpu:transition"),
  "pallas_tpu": dispatch.Implementation(f"{_DELTA}.pallas_tpu:transition"),
  "xla": dispatch.Implementation(f"{_DELTA}.xla:transition"),
})


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    null_length: int | None = None, count_length: int | None = None, axis: str,
                    implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.polar_attention` of a sequence split over mesh axis `axis`; q (B, T, H, D), k and v (B, T, K, D)."""
  check(q, k, v, window, null_length, count_length)
  split = _Split(q.shape[1], axis, window, ATTENTION.resolve(implementation, q, k, v))
  q, k, v = map(split.deal, (q, k, v))
  visible = split.positions() + 1
  temp, null, rate = formula.of_counts(null_base, null_slope, len_gain, mag_beta,
                                       visible if window is None else jnp.minimum(visible, window), null_length, count_length)
  dtype = formula.accumulator(q)
  statistics = Statistics(*_ring(q, k, v, temp.astype(dtype) * q.shape[-1]**-0.5, split))
  direction, magnitude = jax.checkpoint(formula.finalise)(statistics, null.astype(dtype), v_null, rate.astype(dtype))
  return split.collect(direction.astype(q.dtype)), split.collect(magnitude)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None = None,
                      axis: str, implementation: str = "auto") -> jax.Array:
  """`atma_jax.ops.softmax_attention` of a sequence split over mesh axis `axis`; q (B, T, H, D), k and v (B, T, K, D)."""
  dispatch.check_attention("softmax_attention", q, k, v, window)
  split = _Split(q.shape[1], axis, window, ATTENTION.resolve(implementation, q, k, v))
  q, k, v = map(split.deal, (q, k, v))
  scales = jnp.full(q.shape[1:3], scale, jnp.result_type(jnp.float32, q))
  statistics = Statistics(*_ring(q, k, v, scales, split))
  return split.collect((statistics.S / statistics.L[..., None]).astype(q.dtype))


def short_conv(x: jax.Array, weight: jax.Array, *, axis: str) -> jax.Array:
  """`atma_jax.ops.short_conv` of a sequence split over mesh axis `axis`; x (B, T, C), weight (taps, C)."""
  return unsplit_short_conv(x, weight, history=halo(x, weight.shape[0] - 1, axis))


def halo(x: jax.Array, steps: int, axis: str) -> jax.Array:
  """The `steps` steps (B, steps, ...) before those of x (B, T, ...), from as many devices as they lie on; zeros at the start."""
  T, pieces, hop = x.shape[1], [], 1
  while steps > 0:
    pieces.append(_receive(x[:, -min(steps, T):], axis, hop))
    steps, hop = steps - T, hop + 1
  return jnp.concatenate(pieces[::-1], axis=1) if pieces else x[:, :0]


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, axis: str,
                implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """`atma_jax.ops.gated_delta`, from a zero state, of a sequence split over mesh axis `axis`.

  The final state is that of the whole sequence, on every device.
  """
  (B, _, H, D), Dv = q.shape, v.shape[-1]
  state = jax.ShapeDtypeStruct((B, H, Dv, D), jnp.result_type(jnp.float32, q, k, v))
  name = MEMORY.resolve(implementation, q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state)
  readout, final = _memory(q, k, v, log_gamma, beta, axis, TRANSITION.resolve(name))
  last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
  return readout, jax.lax.psum(jnp.where(last, final, 0), axis)


def zigzag(x: jax.Array, axis: str) -> jax.Array:
  """Pieces i and 2n - 1 - i of 2n, one after the other, of x (B, T, ...) of which device i holds pieces 2i and 2i + 1."""
  n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  even, odd = (jax.lax.ppermute(half, axis, _owners(n, parity)) for parity, half in enumerate(jnp.split(x, 2, axis=1)))
  return jnp.concatenate(_swap(i % 2, even, odd), axis=1)


def unzigzag(x: jax.Array, axis: str) -> jax.Array:
  """The inverse of `zigzag`."""
  n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  halves = _swap(i % 2, *jnp.split(x, 2, axis=1))
  return jnp.concatenate([jax.lax.ppermute(half, axis, [(b, a) for a, b in _owners(n, parity)])
                          for parity, half in enumerate(halves)], axis=1)


def _owners(n: int, parity: int) -> list[tuple[int, int]]:
  """Where the piece 2i + parity of device i belongs in the zigzag layout."""
  return [(i, min(2 * i + parity, 2 * n - 1 - 2 * i - parity)) for i in range(n)]


def _swap(swapped: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.where(swapped, b, a), jnp.where(swapped, a, b)


def _receive(x: Any, axis: str, hop: int) -> Any:
  """The x of the device `hop` before this one (after it, if negative); zeros beyond the ends."""
  n = jax.lax.axis_size(axis)
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, [(i, i + hop) for i in range(n) if 0 <= i + hop < n]), x)


def _rotate(x: Any, axis: str, hop: int) -> Any:
  """The x of the device `hop` before this one, in a ring."""
  n = jax.lax.axis_size(axis)
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, [(i, (i + hop) % n) for i in range(n)]), x)


class _Split:
  """How attention deals a sequence out to the devices; equal for equal calls, so that it can be a static argument."""

  def __init__(self, length: int, axis: str, window: int | None, implementation: str):
    """`length` is that of a device's piece; `implementation` a name of `ATTENTION`."""
    self.axis, self.devices, self.implementation = axis, jax.lax.axis_size(axis), implementation
    whole = length * self.devices
    self.window, self.windowed = whole if window is None else min(window, whole), window is not None and window < whole
    self.zigzag = self.devices > 1 and 2 * self.window > whole
    if self.zigzag and length % 2:
      raise ValueError(f"a sequence of {whole} does not divide into two pieces for each of {self.devices} devices: its length "
                       f"must be a multiple of {2 * self.devices}")
    self.segment = length // 2 if self.zigzag else length
    self.stops = self.devices if self.zigzag else min(self.devices, 1 + -(-(self.window - 1) // length))
    self._key = (length, axis, self.devices, self.window, implementation)

  def __hash__(self) -> int:
    return hash(self._key)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Split) and self._key == other._key

  def deal(self, x: jax.Array) -> jax.Array:
    return zigzag(x, self.axis) if self.zigzag else x

  def collect(self, x: jax.Array) -> jax.Array:
    return unzigzag(x, self.axis) if self.zigzag else x

  def starts(self, hop: jax.typing.ArrayLike = 0) -> tuple[jax.Array, ...]:
    """Positions at which the segments start of the device `hop` before this one, in a ring."""
    device = (jax.lax.axis_index(self.axis) - hop) % self.devices
    segments = (device, 2 * self.devices - 1 - device) if self.zigzag else (device,)
    return tuple(self.segment * segment for segment in segments)

  def positions(self) -> jax.Array:
    """(T,) of this device."""
    return jnp.concatenate([start + jnp.arange(self.segment) for start in self.starts()])

  def steps(self, q: jax.Array, k: jax.Array) -> streaming.RingSteps:
    return ATTENTION.implementations[self.implementation].function(
      q, k, window=self.window if self.windowed else None, query_starts=self.starts())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q, k, v, scale, split: _Split) -> Statistics:
  """Statistics of the local queries over all keys they see; scale (T, H)."""
  return _ring_fwd(q, k, v, scale, split)[0]


def _ring_fwd(q, k, v, scale, split):
  steps = split.steps(q, k)
  (rows, statistics), keys = steps.queries(q, scale), steps.keys(k, v)

  def stop(carry, hop):
    statistics, keys = carry
    coming = _rotate(keys, split.axis, 1)  # needs nothing computed here, so it overlaps with what is
    return (steps.gather(rows, statistics, keys, split.starts(hop)), coming), None

  # All stops in one loop: the last need not pass its keys on, but a body of its own would double the program.
  (statistics, _), _ = jax.lax.scan(stop, (statistics, keys), jnp.arange(split.stops))
  statistics = checkpoint_name(statistics, dispatch.POLAR_ATTENTION)
  return steps.statistics(statistics), (q, k, v, scale, statistics)


def _ring_bwd(split, residuals, cotangents):
  q, k, v, scale, statistics = residuals
  steps = split.steps(q, k)
  (rows, dqueries), keys = steps.cotangents(q, scale, statistics, cotangents[1:]), steps.keys(k, v)

  def stop(carry, hop):
    dqueries, keys, dkeys = carry
    coming = _rotate(keys, split.axis, 1)
    dqueries, dkeys = steps.spread(rows, dqueries, keys, dkeys, split.starts(hop))
    return (dqueries, coming, _rotate(dkeys, split.axis, 1)), None

  (dqueries, _, dkeys), _ = jax.lax.scan(stop, (dqueries, keys, steps.no_gradients(keys)), jnp.arange(split.stops))
  if split.stops < split.devices:
    dkeys = _rotate(dkeys, split.axis, -split.stops)  # back to where the keys belong
  (dq, total), (dk, dv) = steps.query_gradients(dqueries), steps.key_gradients(dkeys)
  dscale = _scale_gradient(jnp.sum(q * dq, axis=-1), total / scale, steps.statistics(statistics), cotangents, scale)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dscale


def _scale_gradient(q_dq: jax.Array, total: jax.Array, statistics: Statistics, cotangents: Statistics,
                    scale: jax.Array) -> jax.Array:
  """Gradient of scale (T, H); `total` is ``sum_j dlogit_j`` as rounded, what it should be follows from the statistics."""
  _, L, Q, S = statistics
  exact = cotangents[1] * L + 2 * cotangents[2] * Q + jnp.sum(cotangents[3] * S, axis=-1)
  lse = statistics.M + jnp.log(L)
  return jnp.sum(formula.temperature_gradient(q_dq, total, exact, lse, Q / (L * L), scale), axis=0)


_ring.defvjp(_ring_fwd, _ring_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _memory(q, k, v, log_gamma, beta, axis, implementation):
  """Readouts of this device's steps and the state after them."""
  return _memory_fwd(q, k, v, log_gamma, beta, axis, implementation)[0]


def _memory_fwd(q, k, v, log_gamma, beta, axis, implementation):
  A, N = TRANSITION.implementations[implementation].function(k, v, log_gamma=log_gamma, beta=beta)
  A, start = checkpoint_name((A, _states_before(A, N, axis)), dispatch.GATED_DELTA)

  def run(q, k, v, log_gamma, beta, state):
    op = MEMORY.implementations[implementation].function
    return op(q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state)

  outputs, vjp = jax.vjp(run, q, k, v, log_gamma, beta, start)
  return outputs, (vjp, A)


def _memory_bwd(axis, implementation, residuals, cotangents):
  """A later device's cotangents reach this one's final state only, by way of the states between: they take the way back.

  With X the cotangent of a piece's initial state, ``X = own + X_next A^T``, own being the share of its own outputs. So the op's
  backward pass runs twice, the first time for own alone.
  """
  del implementation
  (vjp, A), (dreadout, dfinal) = residuals, cotangents
  *_, own = vjp((dreadout, dfinal))
  return vjp((dreadout, dfinal + _states_before(A.mT, own, axis, reverse=True)))[:5]


_memory.defvjp(_memory_fwd, _memory_bwd)


def _states_before(A: jax.Array, N: jax.Array, axis: str, reverse: bool = False) -> jax.Array:
  """The state that the devices before this one leave, from zero, each taking M to ``M A + N``; or those after it, backwards.

  A prefix "sum" by doubling: after step s a device's pair stands for up to 2^s devices, itself the last.
  """
  n, way = jax.lax.axis_size(axis), -1 if reverse else 1
  rank = jax.lax.axis_index(axis)
  rank = n - 1 - rank if reverse else rank
  hop = 1
  while hop < n:
    earlier_A, earlier_N = _receive((A, N), axis, way * hop)
    N = jnp.matmul(earlier_N, A, precision=jax.lax.Precision.HIGHEST) + N
    A = jnp.where(rank >= hop, jnp.matmul(earlier_A, A, precision=jax.lax.Precision.HIGHEST), A)
    hop *= 2
  return _receive(N, axis, way)

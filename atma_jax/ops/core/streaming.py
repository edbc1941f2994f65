"""Causal attention statistics in O(block) memory: the engine under polar and softmax attention.

For every query, over the keys it sees, with ``logit_j = scale * q.k_j``:

    M = max_j logit_j,   L = sum_j p_j,   Q = sum_j p_j^2,   S = sum_j p_j v_j,   p_j = exp(logit_j - M)

(Polar Attention, arXiv 2606.25156, streaming form). What is built from them must not change when M is raised by m and
L, S are scaled by e^-m, Q by e^-2m, as softmax and polar attention do not: then M counts as a constant in the backward
pass, which recomputes p block by block from q, k and M.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Statistics(NamedTuple):
  """What a query has gathered from a set of keys, in float32 or wider."""

  M: jax.Array  # (B, T, H)
  L: jax.Array  # (B, T, H)
  Q: jax.Array  # (B, T, H)
  S: jax.Array  # (B, T, H, D)


def merge(a: Statistics, b: Statistics) -> Statistics:
  """The statistics over the union of two disjoint sets of keys."""
  M = jnp.maximum(a.M, b.M)
  u, w = jnp.exp(a.M - M), jnp.exp(b.M - M)
  return Statistics(M, u * a.L + w * b.L, u**2 * a.Q + w**2 * b.Q, u[..., None] * a.S + w[..., None] * b.S)


def attention_statistics(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, *, window: int | None = None,
                         block_q: int | None = None, block_k: int | None = None) -> Statistics:
  """Statistics of every query over the keys it sees; blocks without a visible key cost nothing.

  Args:
    q: (B, T, H, D), the last T of S positions.
    k, v: (B, S, K, D); H is a multiple of K and the heads of a group stay together, k and v are never repeated.
    scale: (T, H) factor of the scores, positive, in the dtype of the statistics.
    window: keys a query may see, itself included; None is all up to its own.
    block_q, block_k: queries and keys at a time; None leaves it to `block_size`.

  Returns:
    The statistics, differentiable in q, k, v and scale through L, Q and S.
  """
  T, S = q.shape[1], k.shape[1]
  blocks = (block_q or block_size(T), block_k or block_size(S))
  return Statistics(*_statistics(q, k, v, scale, window, blocks))


def block_size(length: int) -> int:
  """Equal blocks of at most 512 rounded up to a multiple of 8: large enough for matrix units, small for memory."""
  blocks = -(-length // 512)
  return -(-length // (8 * blocks)) * 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _statistics(q, k, v, scale, window, blocks):
  return _statistics_fwd(q, k, v, scale, window, blocks)[0]


def _statistics_fwd(q, k, v, scale, window, blocks):
  cut = _cut(q, k, window, blocks)
  statistics = cut.unqueries(cut.gather(None, cut.queries((q, scale[None])), cut.keys((k, v)), (0,)))
  return statistics, (q, k, v, scale, statistics.M)


def _statistics_bwd(window, blocks, residuals, cotangents):
  q, k, v, scale, M = residuals
  cut, (_, *cotangents) = _cut(q, k, window, blocks), cotangents
  rows, keys = cut.queries((q, scale[None], M, *cotangents)), cut.keys((k, v))
  (dq, _), dkeys = cut.spread(rows, keys, cut.no_gradients(keys), (0,))
  dq, (dk, dv) = cut.unqueries(dq), cut.unkeys(dkeys)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), scale_gradient(q, dq, scale)


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


def scale_gradient(q: jax.Array, dq: jax.Array, scale: jax.Array) -> jax.Array:
  """Gradient of scale (T, H), ``sum_j dlogit_j q.k_j``, read off ``dq = sum_j dlogit_j scale k_j``."""
  return jnp.sum(q * dq, axis=(0, 3)) / scale


def _cut(q, k, window, blocks) -> Blocks:
  T, S = q.shape[1], k.shape[1]
  return Blocks(q, k, S if window is None else window, blocks, query_starts=(S - T,), key_segments=1)


class Blocks:
  """The cut of queries and keys into blocks, and which pairs of blocks meet.

  Queries, and keys, are equal segments of consecutive positions one after the other, each cut into blocks by itself: one
  segment in an unsplit sequence, two where a device holds an early and a late piece of it (`ops.context_parallel`). Positions
  where segments start may be traced. Trees of arrays are cut leaf by leaf.
  """

  def __init__(self, q: jax.Array, k: jax.Array, window: int, blocks: tuple[int, int], *,
               query_starts: Sequence[jax.typing.ArrayLike], key_segments: int):
    self.B, self.H, self.K = q.shape[0], q.shape[2], k.shape[2]
    self.G = self.H // self.K
    self.window, (self.block_q, self.block_k) = window, blocks
    self.query_starts, self.key_segments = query_starts, key_segments
    self.T, self.S = q.shape[1] // len(query_starts), k.shape[1] // key_segments  # of a segment
    self.count_q, self.count_k = -(-self.T // self.block_q), -(-self.S // self.block_k)  # in a segment
    self.dtype = jnp.result_type(jnp.float32, q, k)

  def queries(self, tree):
    """(B, T, H, ...) -> (blocks, B, K, G, block_q, ...), padded with zeros."""
    def cut(x):
      B, rest = x.shape[0], x.shape[3:]
      x = _pad(x.reshape(B, -1, self.T, *x.shape[2:]), 2, self.count_q * self.block_q)
      return jnp.moveaxis(x.reshape(B, -1, self.block_q, self.K, self.G, *rest), (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
    return jax.tree.map(cut, tree)

  def unqueries(self, tree):
    """The inverse of `queries`."""
    def uncut(x):
      rest = x.shape[5:]
      x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2))
      x = x.reshape(self.B, -1, self.count_q * self.block_q, self.H, *rest)[:, :, : self.T]
      return x.reshape(self.B, -1, self.H, *rest)
    return jax.tree.map(uncut, tree)

  def keys(self, tree):
    """(B, S, K, D) -> (B, K, blocks * block_k, D), padded with zeros."""
    def cut(x):
      x = _pad(x.reshape(self.B, -1, self.S, *x.shape[2:]), 2, self.count_k * self.block_k)
      return jnp.swapaxes(x.reshape(self.B, -1, *x.shape[3:]), 1, 2)
    return jax.tree.map(cut, tree)

  def unkeys(self, tree):
    """The inverse of `keys`."""
    def uncut(x):
      x = jnp.swapaxes(x, 1, 2)
      x = x.reshape(self.B, -1, self.count_k * self.block_k, *x.shape[2:])[:, :, : self.S]
      return x.reshape(self.B, -1, *x.shape[3:])
    return jax.tree.map(uncut, tree)

  def no_statistics(self, rows) -> Statistics:
    """Of cut queries that have seen no key: M is finite, so that exp(M - M) is a number."""
    shape = rows[0].shape
    zeros = jnp.zeros(shape[:-1], self.dtype)
    return Statistics(jnp.full_like(zeros, jnp.finfo(self.dtype).min), zeros, zeros, jnp.zeros(shape, self.dtype))

  def no_gradients(self, keys):
    """Zeros for the gradients of cut keys and values."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, self.dtype), keys)

  def gather(self, statistics: Statistics | None, rows, keys, key_starts: Sequence[jax.typing.ArrayLike]) -> Statistics:
    """Adds keys to the statistics of all queries; everything cut.

    Args:
      statistics: over other keys; None is `no_statistics`.
      rows: queries and scales.
      keys: keys and values.
      key_starts: positions at which the segments of the keys start.
    """
    keys, values = keys

    def query_block(inputs):
      first, (q, scale), statistics = inputs

      def key_block(segment, j, carry):
        M, L, Q, S = carry
        v = self._take(values, segment, j)
        logits = self._logits(first - key_starts[segment], j, q, self._take(keys, segment, j), scale)
        M, old = jnp.maximum(M, jnp.max(logits, axis=-1)), M
        a, p = jnp.exp(old - M), jnp.exp(logits - M[..., None])
        found = jnp.einsum("bkgts,bksd->bkgtd", p.astype(v.dtype), v, preferred_element_type=self.dtype)
        return Statistics(M, a * L + jnp.sum(p, -1), a * a * Q + jnp.sum(p * p, -1), a[..., None] * S + found)

      return self._loop(first, key_starts, key_block, statistics or self.no_statistics((q,)))

    return jax.lax.map(query_block, (self._firsts(), rows, statistics))

  def spread(self, rows, keys, gradients, key_starts: Sequence[jax.typing.ArrayLike]):
    """Gradients of the queries and ``scale sum_j dlogit_j``, cut, and `gradients` of keys and values with their share added.

    Args:
      rows: queries, scales, the final M, and the cotangents of L, Q and S.
      keys, gradients, key_starts: keys and values, their gradients so far, and where their segments start.
    """
    keys, values = keys

    def query_block(carry, inputs):
      first, (q, scale, M, gL, gQ, gS) = inputs
      gS = gS.astype(values.dtype)

      def key_block(segment, j, carry):
        dq, total, dk, dv = carry
        k, v = self._take(keys, segment, j), self._take(values, segment, j)
        p = jnp.exp(self._logits(first - key_starts[segment], j, q, k, scale) - M[..., None])
        dp = jnp.einsum("bkgtd,bksd->bkgts", gS, v, preferred_element_type=self.dtype)
        dscore = (scale[..., None] * p * (dp + gL[..., None] + 2 * gQ[..., None] * p)).astype(q.dtype)
        dq += jnp.einsum("bkgts,bksd->bkgtd", dscore, k, preferred_element_type=self.dtype)
        total += jnp.sum(dscore.astype(self.dtype), axis=-1)
        dk_j = jnp.einsum("bkgts,bkgtd->bksd", dscore, q, preferred_element_type=self.dtype)
        dv_j = jnp.einsum("bkgts,bkgtd->bksd", p.astype(v.dtype), gS, preferred_element_type=self.dtype)

        def add(x, y):
          at = (segment * self.count_k + j) * self.block_k
          return jax.lax.dynamic_update_slice_in_dim(x, self._take(x, segment, j) + y, at, axis=2)

        return dq, total, add(dk, dk_j), add(dv, dv_j)

      zeros = jnp.zeros(q.shape, self.dtype), jnp.zeros(q.shape[:-1], self.dtype)
      dq, total, *carry = self._loop(first, key_starts, key_block, (*zeros, *carry))
      return tuple(carry), (dq, total)

    gradients, dq = jax.lax.scan(query_block, tuple(gradients), (self._firsts(), rows))
    return dq, gradients

  def _firsts(self) -> jax.Array:
    """Position of the first query of every block."""
    starts = jnp.stack([jnp.asarray(start, jnp.int32) for start in self.query_starts])
    return (starts[:, None] + self.block_q * jnp.arange(self.count_q)).reshape(-1)

  def _take(self, x, segment, j):
    """Block j of a segment of `keys`."""
    return jax.lax.dynamic_slice_in_dim(x, (segment * self.count_k + j) * self.block_k, self.block_k, axis=2)

  def _loop(self, first, key_starts, body, carry):
    """Folds `body(segment, j, carry)` over the key blocks that the query block at position `first` sees a key of."""
    for segment, start in enumerate(key_starts):
      query = first - start
      low = jnp.maximum(query - self.window + 1, 0) // self.block_k
      high = (jnp.minimum(query + self.block_q, self.S) - 1) // self.block_k + 1
      carry = jax.lax.fori_loop(low, high, functools.partial(body, segment), carry)
    return carry

  def _logits(self, query, j, q, k, scale):
    """(B, K, G, block_q, block_k) for a first query so many positions into the segment; -inf where not visible."""
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=self.dtype)
    key = j * self.block_k + jnp.arange(self.block_k)
    distance = query + jnp.arange(self.block_q)[:, None] - key
    visible = (distance >= 0) & (distance < self.window)
    if self.S % self.block_k:
      visible &= key < self.S
    return jnp.where(visible, scale[..., None] * scores, -jnp.inf)


class RingSteps:
  """One device's work in a ring of keys and values: what `ops.context_parallel` asks of an implementation.

  Queries, and keys, are ``len(query_starts)`` equal segments of consecutive positions. Between `queries` and `statistics`, and
  between `cotangents` and `query_gradients`, everything is in the implementation's own layout, keys and their gradients too.
  """

  def __init__(self, q: jax.Array, k: jax.Array, *, window: int | None, query_starts: Sequence[jax.typing.ArrayLike]):
    """q (B, T, H, D) and k (B, S, K, D) say shapes only; `window` is None where no query's sight ends."""
    segments = len(query_starts)
    sizes = block_size(q.shape[1] // segments), block_size(k.shape[1] // segments)
    window = jnp.iinfo(jnp.int32).max // 2 if window is None else window
    self._blocks = Blocks(q, k, window, sizes, query_starts=query_starts, key_segments=segments)

  def queries(self, q: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
    """From q and scale (T, H): what `gather` takes, and the statistics over no keys."""
    rows = self._blocks.queries((q, scale[None]))
    return rows, self._blocks.no_statistics(rows)

  def keys(self, k: jax.Array, v: jax.Array) -> Any:
    """What goes round the ring."""
    return self._blocks.keys((k, v))

  def gather(self, rows: Any, statistics: Any, keys: Any, key_starts: Sequence[jax.typing.ArrayLike]) -> Any:
    """Adds keys, whose segments start at these positions, to the statistics."""
    return self._blocks.gather(statistics, rows, keys, key_starts)

  def statistics(self, statistics: Any) -> Statistics:
    """(B, T, H) and (B, T, H, D)."""
    return self._blocks.unqueries(statistics)

  def cotangents(self, q: jax.Array, scale: jax.Array, statistics: Any,
                 cotangents: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
    """From the statistics over all keys and cotangents of L, Q and S: what `spread` takes, and zeros it adds to."""
    rows = (*self._blocks.queries((q, scale[None])), statistics.M, *self._blocks.queries(cotangents))
    return rows, (jnp.zeros(rows[0].shape, self._blocks.dtype), jnp.zeros(rows[0].shape[:-1], self._blocks.dtype))

  def no_gradients(self, keys: Any) -> Any:
    """Zeros for the gradients of `keys`."""
    return self._blocks.no_gradients(keys)

  def spread(self, rows: Any, dqueries: Any, keys: Any, dkeys: Any,
             key_starts: Sequence[jax.typing.ArrayLike]) -> tuple[Any, Any]:
    """Adds what these keys give to the gradients of the queries, and get to their own."""
    share, dkeys = self._blocks.spread(rows, keys, dkeys, key_starts)
    return jax.tree.map(jnp.add, dqueries, share), dkeys

  def query_gradients(self, dqueries: Any) -> tuple[jax.Array, jax.Array]:
    """dq (B, T, H, D) and ``scale sum_j dlogit_j`` (B, T, H), in the dtype of the statistics."""
    return self._blocks.unqueries(dqueries)

  def key_gradients(self, dkeys: Any) -> tuple[jax.Array, jax.Array]:
    """dk and dv (B, S, K, D), in the dtype of the statistics."""
    return self._blocks.unkeys(dkeys)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
  return jnp.pad(x, [(0, length - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

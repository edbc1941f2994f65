"""Causal attention statistics in O(block) memory: the engine under polar and softmax attention.

For every query, over the keys it sees, with ``logit_j = scale * q.k_j``:

    M = max_j logit_j,   L = sum_j p_j,   Q = sum_j p_j^2,   S = sum_j p_j v_j,   p_j = exp(logit_j - M)

(Polar Attention, arXiv 2606.25156, streaming form). What is built from them must not change when M is raised by m and L, S are
scaled by e^-m, Q by e^-2m; softmax and polar attention do not. M may then be treated as a constant in the backward pass, which
recomputes p block by block from q, k and M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import visibility


class Statistics(NamedTuple):
  """What each query has gathered from a set of keys, in float32 or wider."""

  M: Float[Array, "B T H"]
  L: Float[Array, "B T H"]
  Q: Float[Array, "B T H"]
  S: Float[Array, "B T H D"]


def merge(a: Statistics, b: Statistics) -> Statistics:
  """The statistics over the union of two disjoint sets of keys."""
  M = jnp.maximum(a.M, b.M)
  u, w = jnp.exp(a.M - M), jnp.exp(b.M - M)
  return Statistics(M, u * a.L + w * b.L, u**2 * a.Q + w**2 * b.Q, u[..., None] * a.S + w[..., None] * b.S)


def attention_statistics(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"],
                         scale: Float[Array, "*B T H"], *, window: int | None = None, starts: Int[Array, "B T"] | None = None,
                         block_q: int | None = None, block_k: int | None = None) -> Statistics:
  """Statistics of every query over the keys it sees; blocks without a visible key cost nothing.

  Args:
    q: the last T of S positions.
    k, v: H is a multiple of K and the heads of a group are adjacent; k and v are never repeated.
    scale: factor of the scores, positive, in the dtype of the statistics.
    window: keys a query may see, its own included; None is all up to its own.
    starts: position of the first key that each query may see (`visibility.document_starts`); None is 0.
    block_q, block_k: queries and keys at a time; None leaves it to `block_size`.

  Returns:
    The statistics, differentiable in q, k, v and scale through L, Q and S.
  """
  T, S = q.shape[1], k.shape[1]
  blocks = (block_q or block_size(T), block_k or block_size(S))
  gathered: Any = _statistics(q, k, v, scale, starts, window, blocks)
  return Statistics(*gathered)


def block_size(length: int) -> int:
  """Size of equal blocks of at most 512, a multiple of 8: large enough for matrix units, small for memory."""
  blocks = -(-length // 512)
  return -(-length // (8 * blocks)) * 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _statistics(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, starts: jax.Array | None, window: int | None,
                blocks: tuple[int, int]) -> Statistics:
  return _statistics_fwd(q, k, v, scale, starts, window, blocks)[0]


def _statistics_fwd(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, starts: jax.Array | None, window: int | None,
                    blocks: tuple[int, int]) -> tuple[Statistics, tuple[Any, ...]]:
  cut = _whole(q, k, window, blocks)
  rows, keys = cut.cut_queries((q, _batched(scale))), cut.cut_keys((k, v))
  statistics = cut.join_queries(cut.gather(None, rows, keys, (0,), cut.cut_starts(starts)))
  return statistics, (q, k, v, scale, starts, statistics.M)


def _statistics_bwd(window: int | None, blocks: tuple[int, int], residuals: tuple[Any, ...],
                    cotangents: Statistics) -> tuple[jax.Array | None, ...]:
  q, k, v, scale, starts, M = residuals
  cut, (_, gL, gQ, gS) = _whole(q, k, window, blocks), cotangents
  rows, keys = cut.cut_queries((q, _batched(scale), M, gL, gQ, gS)), cut.cut_keys((k, v))
  (dq, _), dkeys = cut.add_gradients(rows, keys, cut.zero_gradients(keys), (0,), cut.cut_starts(starts))
  dq, (dk, dv) = cut.join_queries(dq), cut.join_keys(dkeys)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), scale_gradient(q, dq, scale), None


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


def scale_gradient(q: Float[Array, "B T H D"], dq: Float[Array, "B T H D"], scale: Float[Array, "*B T H"]) -> jax.Array:
  """Gradient of scale, ``sum_j dlogit_j q.k_j``, read off ``dq = sum_j dlogit_j scale k_j``."""
  return jnp.sum(q * dq, axis=(0, 3) if scale.ndim == 2 else 3) / scale


def _batched(scale: Float[Array, "*B T H"]) -> jax.Array:
  """The scale with an axis in front for the rows of the batch."""
  return scale[None] if scale.ndim == 2 else scale


def _whole(q: jax.Array, k: jax.Array, window: int | None, blocks: tuple[int, int]) -> Blocks:
  T, S = q.shape[1], k.shape[1]
  return Blocks(q, k, S if window is None else window, blocks, query_starts=(S - T,), key_segments=1)


class Blocks:
  """Cuts queries and keys into blocks, and says which pairs of blocks meet.

  Queries, and keys, are equal segments of consecutive positions one after the other, each cut into blocks of its own: one
  segment in an unsplit sequence, two where a device holds an early and a late piece of it (`ops.context_parallel`). The
  positions at which segments start may be traced. Trees of arrays are cut leaf by leaf.
  """

  def __init__(self, q: jax.Array, k: jax.Array, window: int, blocks: tuple[int, int], *,
               query_starts: Sequence[jax.typing.ArrayLike], key_segments: int):
    """Takes the shapes of q (B, T, H, D) and k (B, S, K, D), and block sizes for each."""
    self.B, self.H, self.K = q.shape[0], q.shape[2], k.shape[2]
    self.G = self.H // self.K
    self.window, (self.block_q, self.block_k) = window, blocks
    self.query_starts, self.key_segments = query_starts, key_segments
    self.T, self.S = q.shape[1] // len(query_starts), k.shape[1] // key_segments  # of a segment
    self.count_q, self.count_k = -(-self.T // self.block_q), -(-self.S // self.block_k)  # in a segment
    self.dtype = jnp.result_type(jnp.float32, q, k)

  def cut_queries(self, tree: Any) -> Any:
    """(B, T, H, ...) -> (blocks, B, K, G, block_q, ...), padded with zeros."""
    def cut(x: jax.Array) -> jax.Array:
      B, rest = x.shape[0], x.shape[3:]
      x = _pad(x.reshape(B, -1, self.T, *x.shape[2:]), 2, self.count_q * self.block_q)
      return jnp.moveaxis(x.reshape(B, -1, self.block_q, self.K, self.G, *rest), (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
    return jax.tree.map(cut, tree)

  def cut_starts(self, starts: jax.Array | None) -> jax.Array | None:
    """(B, T) -> (blocks, B, 1, 1, block_q) of queries in one segment; padding repeats the last."""
    if starts is None:
      return None
    padded = jnp.pad(starts, ((0, 0), (0, self.count_q * self.block_q - self.T)), mode="edge")
    return jnp.moveaxis(padded.reshape(self.B, 1, 1, self.count_q, self.block_q), 3, 0)

  def join_queries(self, tree: Any) -> Any:
    """The inverse of `cut_queries`."""
    def join(x: jax.Array) -> jax.Array:
      rest = x.shape[5:]
      x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2))
      x = x.reshape(self.B, -1, self.count_q * self.block_q, self.H, *rest)[:, :, : self.T]
      return x.reshape(self.B, -1, self.H, *rest)
    return jax.tree.map(join, tree)

  def cut_keys(self, tree: Any) -> Any:
    """(B, S, K, D) -> (B, K, blocks * block_k, D), padded with zeros."""
    def cut(x: jax.Array) -> jax.Array:
      x = _pad(x.reshape(self.B, -1, self.S, *x.shape[2:]), 2, self.count_k * self.block_k)
      return jnp.swapaxes(x.reshape(self.B, -1, *x.shape[3:]), 1, 2)
    return jax.tree.map(cut, tree)

  def join_keys(self, tree: Any) -> Any:
    """The inverse of `cut_keys`."""
    def join(x: jax.Array) -> jax.Array:
      x = jnp.swapaxes(x, 1, 2)
      x = x.reshape(self.B, -1, self.count_k * self.block_k, *x.shape[2:])[:, :, : self.S]
      return x.reshape(self.B, -1, *x.shape[3:])
    return jax.tree.map(join, tree)

  def empty_statistics(self, rows: tuple[jax.Array, ...]) -> Statistics:
    """Statistics of cut queries that have seen no key: M is finite, so that exp(M - M) is a number."""
    shape = rows[0].shape
    zeros = jnp.zeros(shape[:-1], self.dtype)
    return Statistics(jnp.full_like(zeros, jnp.finfo(self.dtype).min), zeros, zeros, jnp.zeros(shape, self.dtype))

  def zero_gradients(self, keys: Any) -> Any:
    """Zeros for the gradients of cut keys and values."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, self.dtype), keys)

  def gather(self, statistics: Statistics | None, rows: tuple[jax.Array, jax.Array], keys: tuple[jax.Array, jax.Array],
             key_starts: Sequence[jax.typing.ArrayLike], starts: jax.Array | None = None) -> Statistics:
    """Adds keys to the statistics of all queries; all arrays are cut.

    Args:
      statistics: over other keys; None is `empty_statistics`.
      rows: queries and scales.
      keys: keys and values.
      key_starts: positions at which the segments of the keys start.
      starts: position of the first key that each query may see, where there is one segment; None is 0.
    """
    all_keys, all_values = keys

    def query_block(inputs: Any) -> Statistics:
      first, (q, scale), statistics, starts = inputs

      def key_block(segment: int, j: jax.Array, carry: Statistics) -> Statistics:
        M, L, Q, S = carry
        v = self._take(all_values, segment, j)
        logits = self._logits(first - key_starts[segment], j, q, self._take(all_keys, segment, j), scale, starts)
        M, old = jnp.maximum(M, jnp.max(logits, axis=-1)), M
        a, p = jnp.exp(old - M), jnp.exp(logits - M[..., None])
        found = jnp.einsum("bkgts,bksd->bkgtd", p.astype(v.dtype), v, preferred_element_type=self.dtype)
        return Statistics(M, a * L + jnp.sum(p, -1), a * a * Q + jnp.sum(p * p, -1), a[..., None] * S + found)

      return self._loop(first, key_starts, starts, key_block, statistics or self.empty_statistics((q,)))

    return jax.lax.map(query_block, (self._firsts(), rows, statistics, starts))

  def add_gradients(self, rows: tuple[jax.Array, ...], keys: tuple[jax.Array, jax.Array], gradients: tuple[jax.Array, jax.Array],
                    key_starts: Sequence[jax.typing.ArrayLike],
                    starts: jax.Array | None = None) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Backpropagates through `gather`; all arrays are cut.

    Args:
      rows: queries, scales, the final M, and the cotangents of L, Q and S.
      keys: keys and values.
      gradients: of keys and values, from other queries.
      key_starts: positions at which the segments of the keys start.
      starts: as for `gather`.

    Returns:
      The gradient of the queries with ``scale sum_j dlogit_j`` of each, and `gradients` plus what these queries add.
    """
    all_keys, all_values = keys

    def query_block(carry: Any, inputs: Any) -> tuple[Any, Any]:
      first, (q, scale, M, gL, gQ, gS), starts = inputs
      gS = gS.astype(all_values.dtype)

      def key_block(segment: int, j: jax.Array, carry: Any) -> Any:
        dq, total, dk, dv = carry
        k, v = self._take(all_keys, segment, j), self._take(all_values, segment, j)
        p = jnp.exp(self._logits(first - key_starts[segment], j, q, k, scale, starts) - M[..., None])
        dp = jnp.einsum("bkgtd,bksd->bkgts", gS, v, preferred_element_type=self.dtype)
        dscore = (scale[..., None] * p * (dp + gL[..., None] + 2 * gQ[..., None] * p)).astype(q.dtype)
        dq += jnp.einsum("bkgts,bksd->bkgtd", dscore, k, preferred_element_type=self.dtype)
        total += jnp.sum(dscore.astype(self.dtype), axis=-1)
        dk_j = jnp.einsum("bkgts,bkgtd->bksd", dscore, q, preferred_element_type=self.dtype)
        dv_j = jnp.einsum("bkgts,bkgtd->bksd", p.astype(v.dtype), gS, preferred_element_type=self.dtype)

        def add(x: jax.Array, y: jax.Array) -> jax.Array:
          at = (segment * self.count_k + j) * self.block_k
          return jax.lax.dynamic_update_slice_in_dim(x, self._take(x, segment, j) + y, at, axis=2)

        return dq, total, add(dk, dk_j), add(dv, dv_j)

      zeros = jnp.zeros(q.shape, self.dtype), jnp.zeros(q.shape[:-1], self.dtype)
      dq, total, *carry = self._loop(first, key_starts, starts, key_block, (*zeros, *carry))
      return tuple(carry), (dq, total)

    gradients, dq = jax.lax.scan(query_block, tuple(gradients), (self._firsts(), rows, starts))
    return dq, gradients

  def _firsts(self) -> jax.Array:
    """Position of the first query of every block."""
    starts = jnp.stack([jnp.asarray(start, jnp.int32) for start in self.query_starts])
    return (starts[:, None] + self.block_q * jnp.arange(self.count_q)).reshape(-1)

  def _take(self, x: jax.Array, segment: int, j: jax.Array) -> jax.Array:
    """Block j of a segment of cut keys."""
    return jax.lax.dynamic_slice_in_dim(x, (segment * self.count_k + j) * self.block_k, self.block_k, axis=2)

  def _loop(self, first: jax.Array, key_starts: Sequence[jax.typing.ArrayLike], starts: jax.Array | None,
            body: Callable[..., Any], carry: Any) -> Any:
    """Folds ``body(segment, j, carry)`` over the blocks with a key that the query block at position `first` sees."""
    for segment, start in enumerate(key_starts):
      query = first - start
      low = visibility.first_key(query, self.window)
      low = (low if starts is None else jnp.maximum(low, jnp.min(starts))) // self.block_k
      high = (jnp.minimum(query + self.block_q, self.S) - 1) // self.block_k + 1
      carry = jax.lax.fori_loop(low, high, functools.partial(body, segment), carry)
    return carry

  def _logits(self, query: jax.Array, j: jax.Array, q: jax.Array, k: jax.Array, scale: jax.Array,
              starts: jax.Array | None) -> jax.Array:
    """(B, K, G, block_q, block_k) logits with block j, `query` being the first query's position in the keys' segment; -inf where
    a key is not visible."""
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=self.dtype)
    key = j * self.block_k + jnp.arange(self.block_k)
    distance = query + jnp.arange(self.block_q)[:, None] - key
    visible = visibility.sees(distance, self.window)
    if self.S % self.block_k:
      visible &= key < self.S
    if starts is not None:
      visible &= key >= starts[..., None]
    return jnp.where(visible, scale[..., None] * scores, -jnp.inf)


class RingSteps:
  """One device's work in a ring of keys and values: what `ops.context_parallel` asks of an implementation.

  Queries, and keys, are ``len(query_starts)`` equal segments of consecutive positions. Between `queries` and `statistics`, and
  between `cotangents` and `query_gradients`, every array is in the implementation's own layout, keys and their gradients too.
  """

  def __init__(self, q: jax.Array, k: jax.Array, *, window: int | None, query_starts: Sequence[jax.typing.ArrayLike]):
    """Takes the shapes of q (B, T, H, D) and k (B, S, K, D); `window` is None where every query sees back to the start."""
    segments = len(query_starts)
    sizes = block_size(q.shape[1] // segments), block_size(k.shape[1] // segments)
    window = jnp.iinfo(jnp.int32).max // 2 if window is None else window
    self._blocks = Blocks(q, k, window, sizes, query_starts=query_starts, key_segments=segments)

  def queries(self, q: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
    """From q and scale (T, H): what `gather` takes, and the statistics over no keys."""
    rows = self._blocks.cut_queries((q, scale[None]))
    return rows, self._blocks.empty_statistics(rows)

  def keys(self, k: jax.Array, v: jax.Array) -> Any:
    """What goes round the ring."""
    return self._blocks.cut_keys((k, v))

  def gather(self, rows: Any, statistics: Any, keys: Any, key_starts: Sequence[jax.typing.ArrayLike]) -> Any:
    """Adds keys, whose segments start at the positions `key_starts`, to the statistics."""
    return self._blocks.gather(statistics, rows, keys, key_starts)

  def statistics(self, statistics: Any) -> Statistics:
    """The statistics as (B, T, H) and (B, T, H, D)."""
    return self._blocks.join_queries(statistics)

  def cotangents(self, q: jax.Array, scale: jax.Array, statistics: Any,
                 cotangents: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
    """From the statistics over all keys and cotangents of L, Q and S: what `add_gradients` takes, and the zeros it adds to."""
    rows = (*self._blocks.cut_queries((q, scale[None])), statistics.M, *self._blocks.cut_queries(cotangents))
    return rows, (jnp.zeros(rows[0].shape, self._blocks.dtype), jnp.zeros(rows[0].shape[:-1], self._blocks.dtype))

  def zero_gradients(self, keys: Any) -> Any:
    """Zeros for the gradients of `keys`."""
    return self._blocks.zero_gradients(keys)

  def add_gradients(self, rows: Any, dqueries: Any, keys: Any, dkeys: Any,
                    key_starts: Sequence[jax.typing.ArrayLike]) -> tuple[Any, Any]:
    """Adds what these queries and keys contribute to each other's gradients."""
    share, dkeys = self._blocks.add_gradients(rows, keys, dkeys, key_starts)
    return jax.tree.map(jnp.add, dqueries, share), dkeys

  def query_gradients(self, dqueries: Any) -> tuple[jax.Array, jax.Array]:
    """dq (B, T, H, D) and ``scale sum_j dlogit_j`` (B, T, H), in the dtype of the statistics."""
    return self._blocks.join_queries(dqueries)

  def key_gradients(self, dkeys: Any) -> tuple[jax.Array, jax.Array]:
    """dk and dv (B, S, K, D), in the dtype of the statistics."""
    return self._blocks.join_keys(dkeys)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
  return jnp.pad(x, [(0, length - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

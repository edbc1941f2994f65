"""Causal attention statistics in O(block) memory: the engine under polar and softmax attention.

For every query, over the keys it sees, with ``logit_j = scale * q.k_j``:

    M = max_j logit_j,   L = sum_j p_j,   Q = sum_j p_j^2,   S = sum_j p_j v_j,   p_j = exp(logit_j - M)

(Polar Attention, arXiv 2606.25156, streaming form). What is built from them must not change when M is raised by m and
L, S are scaled by e^-m, Q by e^-2m, as softmax and polar attention do not: then M counts as a constant in the backward
pass, which recomputes p block by block from q, k and M.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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
  return _forward(q, k, v, scale, window, blocks)


def _statistics_fwd(q, k, v, scale, window, blocks):
  statistics = _forward(q, k, v, scale, window, blocks)
  return statistics, (q, k, v, scale, statistics.M)


def _statistics_bwd(window, blocks, residuals, cotangents):
  q, k, v, scale, M = residuals
  dq, dk, dv = _backward(q, k, v, scale, M, cotangents, window, blocks)
  # sum_j dlogit_j q.k_j, read off dq = sum_j dlogit_j scale k_j
  dscale = jnp.sum(q * dq, axis=(0, 3)) / scale
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dscale


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


class _Blocks:
  """The cut of T queries (the last of S positions) and S keys into blocks, and which pairs of blocks meet."""

  def __init__(self, q, k, window, blocks):
    self.B, self.T, self.H, _ = q.shape
    self.S, self.K = k.shape[1:3]
    self.G = self.H // self.K
    self.window = self.S if window is None else window
    self.block_q, self.block_k = blocks
    self.count_q, self.count_k = -(-self.T // self.block_q), -(-self.S // self.block_k)
    self.dtype = jnp.result_type(jnp.float32, q, k)

  def queries(self, x):
    """(B, T, H, ...) -> (blocks, B, K, G, block_q, ...), padded with zeros."""
    x = _pad(x, 1, self.count_q * self.block_q)
    x = x.reshape(x.shape[0], self.count_q, self.block_q, self.K, self.G, *x.shape[3:])
    return jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))

  def unqueries(self, x):
    """The inverse of `queries`."""
    x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2))
    return x.reshape(self.B, self.count_q * self.block_q, self.H, *x.shape[5:])[:, : self.T]

  def keys(self, x):
    """(B, S, K, D) -> (B, K, blocks * block_k, D), padded with zeros."""
    return jnp.swapaxes(_pad(x, 1, self.count_k * self.block_k), 1, 2)

  def unkeys(self, x):
    """The inverse of `keys`."""
    return jnp.swapaxes(x, 1, 2)[:, : self.S]

  def take(self, x, j):
    """Block j of `keys`."""
    return jax.lax.dynamic_slice_in_dim(x, j * self.block_k, self.block_k, axis=2)

  def loop(self, i, body, carry):
    """Folds `body(j, carry)` over the key blocks j that query block i sees a key of."""
    first = self.S - self.T + i * self.block_q  # position of the block's first query
    low = jnp.maximum(first - self.window + 1, 0) // self.block_k
    high = (jnp.minimum(first + self.block_q, self.S) - 1) // self.block_k + 1
    return jax.lax.fori_loop(low, high, body, carry)

  def logits(self, i, j, q, k, scale):
    """(B, K, G, block_q, block_k), -inf where the key is not visible. Keys of the padding lie after every query."""
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=self.dtype)
    query = self.S - self.T + i * self.block_q + jnp.arange(self.block_q)[:, None]
    distance = query - j * self.block_k - jnp.arange(self.block_k)
    return jnp.where((distance >= 0) & (distance < self.window), scale[..., None] * scores, -jnp.inf)


def _forward(q, k, v, scale, window, blocks) -> Statistics:
  cut = _Blocks(q, k, window, blocks)
  keys, values = cut.keys(k), cut.keys(v)

  def query_block(inputs):
    i, q, scale = inputs

    def key_block(j, carry):
      M, L, Q, S = carry
      logits = cut.logits(i, j, q, cut.take(keys, j), scale)
      M, old = jnp.maximum(M, jnp.max(logits, axis=-1)), M
      a, p = jnp.exp(old - M), jnp.exp(logits - M[..., None])
      found = jnp.einsum("bkgts,bksd->bkgtd", p.astype(v.dtype), cut.take(values, j), preferred_element_type=cut.dtype)
      return Statistics(M, a * L + jnp.sum(p, -1), a * a * Q + jnp.sum(p * p, -1), a[..., None] * S + found)

    zeros = jnp.zeros(q.shape[:-1], cut.dtype)
    lowest = jnp.full_like(zeros, jnp.finfo(cut.dtype).min)  # finite: exp(lowest - lowest) is a number
    return cut.loop(i, key_block, Statistics(lowest, zeros, zeros, jnp.zeros(q.shape, cut.dtype)))

  rows = (jnp.arange(cut.count_q), cut.queries(q), cut.queries(scale[None]))
  return jax.tree.map(cut.unqueries, jax.lax.map(query_block, rows))


def _backward(q, k, v, scale, M, cotangents, window, blocks):
  cut = _Blocks(q, k, window, blocks)
  keys, values = cut.keys(k), cut.keys(v)
  _, gL, gQ, gS = cotangents

  def query_block(carry, inputs):
    i, q, scale, M, gL, gQ, gS = inputs
    gS = gS.astype(v.dtype)

    def key_block(j, carry):
      dq, dk, dv = carry
      k, v = cut.take(keys, j), cut.take(values, j)
      p = jnp.exp(cut.logits(i, j, q, k, scale) - M[..., None])
      dp = jnp.einsum("bkgtd,bksd->bkgts", gS, v, preferred_element_type=cut.dtype)
      dscore = (scale[..., None] * p * (dp + gL[..., None] + 2 * gQ[..., None] * p)).astype(q.dtype)
      dq += jnp.einsum("bkgts,bksd->bkgtd", dscore, k, preferred_element_type=cut.dtype)
      dk_j = jnp.einsum("bkgts,bkgtd->bksd", dscore, q, preferred_element_type=cut.dtype)
      dv_j = jnp.einsum("bkgts,bkgtd->bksd", p.astype(v.dtype), gS, preferred_element_type=cut.dtype)

      def add(x, y):
        return jax.lax.dynamic_update_slice_in_dim(x, cut.take(x, j) + y, j * cut.block_k, axis=2)

      return dq, add(dk, dk_j), add(dv, dv_j)

    dq, dk, dv = cut.loop(i, key_block, (jnp.zeros(q.shape, cut.dtype), *carry))
    return (dk, dv), dq

  rows = (jnp.arange(cut.count_q), *map(cut.queries, (q, scale[None], M, gL, gQ, gS)))
  zeros = jnp.zeros(keys.shape, cut.dtype)
  (dk, dv), dq = jax.lax.scan(query_block, (zeros, zeros), rows)
  return cut.unqueries(dq), cut.unkeys(dk), cut.unkeys(dv)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
  return jnp.pad(x, [(0, length - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

"""Causal attention over blocks of keys: the running statistics that polar and softmax attention both finish from.

Per query and head, over the visible keys j with ``logit_j = temp * scale * q.k_j``, relative to a maximum M:
``L = sum p_j``, ``Q = sum p_j^2``, ``S = sum p_j v_j`` with ``p_j = exp(logit_j - M)``. Whatever is finished from them must not
depend on M, which is therefore a constant to the derivative. No more than one block of scores exists at a time, blocks that
the causal mask or the window hides are never visited, and grouped key/value heads are never repeated.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row that has seen no key yet subtracts to 0 and not to NaN
BLOCK = 512


class Statistics(NamedTuple):
  """M, L, Q (B, T, H) and S (B, T, H, D), float32 or wider."""

  M: jax.Array
  L: jax.Array
  Q: jax.Array
  S: jax.Array


def merge(a: Statistics, b: Statistics) -> Statistics:
  """The statistics over the union of two disjoint sets of keys, exactly."""
  M = jnp.maximum(a.M, b.M)
  x, y = jnp.exp(a.M - M), jnp.exp(b.M - M)
  return Statistics(M, x * a.L + y * b.L, x * x * a.Q + y * y * b.Q, x[..., None] * a.S + y[..., None] * b.S)


def statistics(q: jax.Array, k: jax.Array, v: jax.Array, temp: jax.Array, *, scale: float, window: int | None,
               block: int = BLOCK) -> Statistics:
  """Statistics of every query over the keys it may see.

  Args:
    q: (B, T, H, D), the last T of the S positions.
    k, v: (B, S, K, D), H a multiple of K.
    temp: (T, H) factor on the scores, float32 or wider.
    scale: factor on the scores.
    window: keys a query may see, itself included, or None.
    block: queries and keys in a block at most.

  Returns:
    `Statistics`, differentiable in q, k, v and temp through L, Q and S.
  """
  (B, T, H, D), (_, S, K, _) = q.shape, k.shape
  block_q, block_k = (min(block, -(-n // 16) * 16) for n in (T, S))
  plan = _Plan(T, S, block_q, block_k, S if window is None else window, scale)
  grouped = _pad(q.reshape(B, T, K, H // K, D), plan.padded_q).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, D)
  k, v = (_pad(x, plan.padded_k).transpose(0, 2, 1, 3) for x in (k, v))  # (B, K, S, D)
  temp = _pad(temp.reshape(1, T, K, H // K), plan.padded_q)[0].transpose(1, 2, 0)  # (K, G, T)
  M, L, Q, S_ = _statistics(plan, grouped, k, v, temp)

  def ungroup(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x[:, :, :, :T], 3, 1).reshape(B, T, H, *x.shape[4:])

  return Statistics(*(ungroup(x) for x in (M, L, Q, S_)))


class _Plan(NamedTuple):
  queries: int
  keys: int
  block_q: int
  block_k: int
  window: int
  scale: float

  @property
  def padded_q(self) -> int:
    return -(-self.queries // self.block_q) * self.block_q

  @property
  def padded_k(self) -> int:
    return -(-self.keys // self.block_k) * self.block_k

  def positions(self, index: jax.Array) -> jax.Array:
    """Absolute positions of a query block; padding repeats the last one, so that it too sees a key."""
    start = self.keys - self.queries + index * self.block_q
    return jnp.minimum(start + jnp.arange(self.block_q), self.keys - 1)

  def key_blocks(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and past-the-last key block that any of these queries sees."""
    first = jnp.maximum(positions[0] - self.window + 1, 0) // self.block_k
    return first, positions[-1] // self.block_k + 1

  def visible(self, positions: jax.Array, index: jax.Array) -> jax.Array:
    distance = positions[:, None] - (index * self.block_k + jnp.arange(self.block_k))
    return (distance >= 0) & (distance < self.window)


def _pad(x: jax.Array, length: int) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _block(x: jax.Array, index: jax.Array, size: int, axis: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(plan, q, k, v, temp):
  return _forward(plan, q, k, v, temp)[0]


def _forward(plan, q, k, v, temp):
  wide = temp.dtype
  dot = functools.partial(jnp.einsum, preferred_element_type=wide)

  def query_block(_, index):
    q_block = _block(q, index, plan.block_q, 3)
    factor = _block(temp, index, plan.block_q, 2)[..., None] * plan.scale
    positions = plan.positions(index)

    def key_block(j, carry):
      M, L, Q, S = carry
      logits = dot("bkgqd,bksd->bkgqs", q_block, _block(k, j, plan.block_k, 2)) * factor
      visible = plan.visible(positions, j)
      M_new = jnp.maximum(M, jnp.max(jnp.where(visible, logits, MASKED), axis=-1))
      p = jnp.where(visible, jnp.exp(logits - M_new[..., None]), 0)
      a = jnp.exp(M - M_new)
      S = a[..., None] * S + dot("bkgqs,bksd->bkgqd", p.astype(v.dtype), _block(v, j, plan.block_k, 2))
      return M_new, a * L + jnp.sum(p, axis=-1), a * a * Q + jnp.sum(p * p, axis=-1), S

    rows = q_block.shape[:4]
    start = (jnp.full(rows, MASKED, wide), jnp.zeros(rows, wide), jnp.zeros(rows, wide), jnp.zeros(q_block.shape, wide))
    return None, jax.lax.fori_loop(*plan.key_blocks(positions), key_block, start)

  _, blocks = jax.lax.scan(query_block, None, jnp.arange(plan.padded_q // plan.block_q))

  def join(x):  # (blocks, B, K, G, block, ...) -> (B, K, G, T, ...)
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], plan.padded_q, *x.shape[5:])

  out = tuple(join(x) for x in blocks)
  return out, (q, k, v, temp, out[0])


def _backward(plan, residuals, cotangents):
  q, k, v, temp, M = residuals
  _, gL, gQ, gS = cotangents
  wide = temp.dtype
  dot = functools.partial(jnp.einsum, preferred_element_type=wide)

  def query_block(carry, index):
    def rows(x):
      return _block(x, index, plan.block_q, 3)

    q_block, M_block, gL_block, gQ_block, gS_block = (rows(x) for x in (q, M, gL, gQ, gS.astype(v.dtype)))
    factor = _block(temp, index, plan.block_q, 2)[..., None] * plan.scale
    positions = plan.positions(index)

    def key_block(j, carry):
      dq, dtemp, dk, dv = carry
      k_block, v_block = (_block(x, j, plan.block_k, 2) for x in (k, v))
      scores = dot("bkgqd,bksd->bkgqs", q_block, k_block)
      p = jnp.where(plan.visible(positions, j), jnp.exp(scores * factor - M_block[..., None]), 0)
      dp = dot("bkgqd,bksd->bkgqs", gS_block, v_block) + gL_block[..., None] + 2 * gQ_block[..., None] * p
      dlogits = p * dp
      dscores = (dlogits * factor).astype(k.dtype)
      dq += dot("bkgqs,bksd->bkgqd", dscores, k_block)
      dtemp += plan.scale * jnp.sum(dlogits * scores, axis=-1)
      dk, dv = (_add_block(x, j * plan.block_k, dot(equation, a, b)) for x, equation, a, b in (
        (dk, "bkgqs,bkgqd->bksd", dscores, q_block), (dv, "bkgqs,bkgqd->bksd", p.astype(v.dtype), gS_block)))
      return dq, dtemp, dk, dv

    start = (jnp.zeros(q_block.shape, wide), jnp.zeros(M_block.shape, wide), *carry)
    dq, dtemp, *carry = jax.lax.fori_loop(*plan.key_blocks(positions), key_block, start)
    return tuple(carry), (dq, jnp.sum(dtemp, axis=0))

  start = (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
  (dk, dv), (dq, dtemp) = jax.lax.scan(query_block, start, jnp.arange(plan.padded_q // plan.block_q))
  dq = jnp.moveaxis(dq, 0, 3).reshape(q.shape)
  dtemp = jnp.moveaxis(dtemp, 0, 2).reshape(temp.shape)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dtemp


def _add_block(x: jax.Array, start: jax.Array, update: jax.Array) -> jax.Array:
  old = jax.lax.dynamic_slice_in_dim(x, start, update.shape[2], 2)
  return jax.lax.dynamic_update_slice_in_dim(x, old + update, start, 2)


_statistics.defvjp(_forward, _backward)

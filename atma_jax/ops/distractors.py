"""Distractor losses: random keys that a query should not find (ATMA, arXiv 2606.25156).

The R random keys are the same for every row of the batch and visible to every query. Scores exist for one block of queries at a
time and are recomputed in the backward pass: memory is O(block x R), never (T, R).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.ops.core import streaming
from atma_jax.ops.core.streaming import Statistics

BLOCK = 128  # queries at a time


def polar_distractor_loss(q: Float[Array, "B T H D"], keys: Float[Array, "R K D"], temperature: Float[Array, "T H"],
                          null: Float[Array, "T H"]) -> Float[Array, ""]:
  """Mean over queries and heads of the softmax mass that the random keys take from the null.

  Args:
    q: queries.
    keys: random keys; no gradient flows into them.
    temperature: factor of the scores, ``temp / sqrt(D)``.
    null: null logits, already times the temperature.
  """
  M, L, *_ = _statistics(q, keys, None, temperature)
  return jnp.mean(jax.nn.sigmoid(M + jnp.log(L) - null))


def softmax_distractor_loss(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"],
                            keys: Float[Array, "R K D"], values: Float[Array, "R K D"], *, scale: float,
                            window: int | None = None) -> Float[Array, ""]:
  """Mean squared change of causal softmax attention's output when random keys and values are added.

  Args:
    q, k, v: as the attention takes them.
    keys, values: random ones; no gradient flows into them.
    scale: factor of the scores.
    window: keys a query may see besides the random ones, its own included; None is all up to its own.
  """
  scales = jnp.full(q.shape[1:3], scale, jnp.result_type(jnp.float32, q))
  real = streaming.attention_statistics(q, k, v, scales, window=window)
  M, L, S = _statistics(q, keys, values, scales)
  both = streaming.merge(real._replace(M=jax.lax.stop_gradient(real.M)), Statistics(M, L, L, S))
  return jnp.mean(jnp.square(both.S / both.L[..., None] - real.S / real.L[..., None]))


def _statistics(q: jax.Array, keys: jax.Array, values: jax.Array | None,
                scale: jax.Array) -> tuple[jax.Array, ...]:
  """Statistics over all random keys: M and L (B, T, H), and S (B, T, H, D) where there are values; M carries no gradient."""
  (B, T, H, _), (R, K, D) = q.shape, keys.shape
  dtype = jnp.result_type(jnp.float32, q)
  keys = jax.lax.stop_gradient(keys)
  values = None if values is None else jax.lax.stop_gradient(values)
  size = min(BLOCK, T)
  count = -(-T // size)

  def blocks(x: jax.Array, axis: int) -> jax.Array:
    """Cuts time, which is `axis`, into blocks along a new first axis."""
    x = jnp.pad(x, [(0, count * size - T if a == axis else 0) for a in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1:]), axis, 0)

  def join(x: jax.Array) -> jax.Array:
    """The inverse of `blocks`."""
    return jnp.moveaxis(x, 0, 1).reshape(B, count * size, *x.shape[3:])[:, :T]

  @jax.checkpoint
  def block(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    q, scale = inputs
    grouped = q.reshape(B, size, K, H // K, D)
    scores = jnp.einsum("btkgd,rkd->btkgr", grouped, keys.astype(q.dtype), preferred_element_type=dtype)
    logits = scale[..., None] * scores.reshape(B, size, H, R)
    M = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    p = jnp.exp(logits - M[..., None])
    if values is None:
      return M, jnp.sum(p, axis=-1)
    found = jnp.einsum("btkgr,rkd->btkgd", p.reshape(B, size, K, H // K, R).astype(values.dtype), values,
                       preferred_element_type=dtype)
    return M, jnp.sum(p, axis=-1), found.reshape(B, size, H, D)

  return jax.tree.map(join, jax.lax.map(block, (blocks(q, 1), blocks(scale, 0))))

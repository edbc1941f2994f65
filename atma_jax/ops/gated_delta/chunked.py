"""The gated delta rule by chunks: triangular solves for all chunks at once, then a scan that carries the state.

With ``g_p`` the product of the decays up to and including step p of a chunk and ``D[p, s] = (g_p / g_s) k_p.k_s`` for s < p,
``(I + diag(beta) D) U = diag(beta) (V - diag(g) K M_0^T)``; U splits into a part of the inputs and a part linear in the
carry, so that one solve serves both (arXiv 2606.25156). Decays are kept as logarithms and only ratios are exponentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK = 64


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta`; `chunk` steps are solved together."""
  B, T, H, _ = q.shape
  wide = initial_state.dtype
  chunk = min(chunk, -(-T // 8) * 8)
  chunks = -(-T // chunk)

  def split(x: jax.Array) -> jax.Array:
    """(B, T, H, ...) -> (chunks, B, H, chunk, ...); padding decays nothing and writes nothing."""
    x = jnp.pad(x.astype(wide), ((0, 0), (0, chunks * chunk - T)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(B, chunks, chunk, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

  q, k, v_, log_gamma, beta = (split(x) for x in (q, k, v, log_gamma, beta))
  log_g = jnp.cumsum(log_gamma, axis=-1)
  causal = jnp.tril(jnp.ones((chunk, chunk), bool))
  ratio = jnp.exp(jnp.where(causal, log_g[..., :, None] - log_g[..., None, :], -jnp.inf))  # g_p / g_s for s <= p
  g = jnp.exp(log_g)[..., None]
  to_end = jnp.exp(log_g[..., -1:] - log_g)[..., None]  # g_n / g_s

  strict = jnp.tril(beta[..., None] * ratio * (k @ k.mT), -1)
  right = beta[..., None] * jnp.concatenate([v_, g * k], axis=-1)
  solved = jax.lax.linalg.triangular_solve(strict + jnp.eye(chunk, dtype=wide), right, left_side=True, lower=True,
                                           unit_diagonal=True)
  u_inputs, u_carry = jnp.split(solved, [v_.shape[-1]], axis=-1)  # U = u_inputs - u_carry M_0^T
  read = ratio * (q @ k.mT)

  def step(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    u_inputs, u_carry, read, q_decayed, k_to_end, g_end = inputs
    u = u_inputs - u_carry @ state.mT
    readout = q_decayed @ state.mT + read @ u
    return g_end * state + u.mT @ k_to_end, readout

  per_chunk = (u_inputs, u_carry, read, g * q, to_end * k, g[..., -1:, :])
  state, readout = jax.lax.scan(step, initial_state, per_chunk)
  readout = jnp.moveaxis(jnp.moveaxis(readout, 0, 1), 2, 3).reshape(B, chunks * chunk, H, -1)[:, :T]
  return readout.astype(v.dtype), state

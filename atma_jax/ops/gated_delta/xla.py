"""The gated delta rule in chunks: everything inside a chunk in parallel, only the state from chunk to chunk in turn.

Within a chunk of n steps, with ``g_p`` the product of the decays up to p and M the state before it, the writes solve
the unit lower-triangular system ``(I + diag(beta) D) U = diag(beta) (V - diag(g) K M^T)``, where
``D[p, s] = (g_p / g_s) k_p.k_s`` for s < p. With X its inverse, ``U = X diag(beta) V - X diag(beta g) K M^T`` is affine
in M. Decay enters through differences of logarithms only. On a TPU this moves three to eight times the bytes of the kernels
of `pallas_tpu`, whose docstring has the figures.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64


class _Chunks(NamedTuple):
  """What the chunks say without knowing their states; leading axes (N, B, H), N the number of chunks."""

  writes: jax.Array  # (n, Dv) U for a zero state
  erases: jax.Array  # (n, D) U falls by erases M^T
  keys: jax.Array  # (n, D) k_s g_n / g_s
  decay: jax.Array  # () g_n
  queries: jax.Array  # (n, D) g_p q_p
  attention: jax.Array  # (n, n) g_p / g_s k_s.q_p for s <= p


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta`; saves its inputs and one state per chunk for the backward pass."""
  inputs = _cut(q, k, v, log_gamma, beta, initial_state.dtype, chunk)
  readout, final_state = _run(inputs, initial_state)
  return _uncut(readout, v), final_state


def transition(k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
               chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
  """What all steps do to the state M before them: A (B, H, D, D) and N (B, H, Dv, D) of ``M A + N``.

  Arguments are those of `gated_delta`; made for `ops.context_parallel`, which needs no gradient of it.
  """
  (B, _, H, D), Dv, dtype = k.shape, v.shape[-1], jnp.result_type(jnp.float32, k, v)
  chunks = _within(_cut(k, k, v, log_gamma, beta, dtype, chunk))

  def step(carried, chunk):
    A, N = carried
    return (_carry(A, chunk._replace(writes=jnp.zeros((), dtype)))[0], _carry(N, chunk)[0]), None

  start = jnp.broadcast_to(jnp.eye(D, dtype=dtype), (B, H, D, D)), jnp.zeros((B, H, Dv, D), dtype)
  return jax.lax.scan(step, start, chunks)[0]


def _cut(q: jax.Array, k: jax.Array, v: jax.Array, log_gamma: jax.Array, beta: jax.Array, dtype: jnp.dtype,
         chunk: int = CHUNK) -> tuple[jax.Array, ...]:
  """Each (B, T, H, ...) in chunks (N, B, H, n, ...), the gates in `dtype`.

  A padded step has gamma 1 and beta 0 and leaves the state alone.
  """
  T = q.shape[1]
  chunk = min(chunk, 1 << (T - 1).bit_length())
  count = -(-T // chunk)

  def chunks(x):
    x = jnp.pad(x, ((0, 0), (0, count * chunk - T), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(x.shape[0], count, chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))

  return tuple(map(chunks, (q, k, v, log_gamma.astype(dtype), beta.astype(dtype))))


def _uncut(readout: jax.Array, v: jax.Array) -> jax.Array:
  """Readouts of chunks (N, B, H, n, Dv) as one of v's shape and dtype."""
  readout = jnp.moveaxis(readout, (0, 2), (1, 3))
  return readout.reshape(v.shape[0], -1, *v.shape[2:])[:, :v.shape[1]].astype(v.dtype)


@jax.custom_vjp
def _run(inputs, initial_state):
  chunks = _within(inputs)
  final_state, states = jax.lax.scan(_carry, initial_state, chunks)
  return _read(chunks, states), final_state


def _run_fwd(inputs, initial_state):
  chunks = _within(inputs)
  final_state, states = jax.lax.scan(_carry, initial_state, chunks)
  return (_read(chunks, states), final_state), (inputs, states)


def _run_bwd(residuals, cotangents):
  inputs, states = residuals
  dreadout, dfinal_state = cotangents
  chunks, within_vjp = jax.vjp(_within, inputs)
  dchunks, dstates = jax.vjp(_read, chunks, states)[1](dreadout)

  def step(dstate, inputs):
    state, chunk, from_read = inputs
    dcarry, dchunk = jax.vjp(lambda s, c: _carry(s, c)[0], state, chunk)[1](dstate)
    return dcarry + from_read, dchunk

  dinitial_state, from_carry = jax.lax.scan(step, dfinal_state, (states, chunks, dstates), reverse=True)
  return *within_vjp(jax.tree.map(jnp.add, dchunks, from_carry)), dinitial_state


_run.defvjp(_run_fwd, _run_bwd)


def _within(inputs) -> _Chunks:
  """All chunks at once: q, k (N, B, H, n, D), v (N, B, H, n, Dv), log_gamma and beta (N, B, H, n)."""
  q, k, v, log_gamma, beta = inputs
  dtype = log_gamma.dtype
  log_g = jnp.cumsum(log_gamma, axis=-1)
  difference = log_g[..., :, None] - log_g[..., None, :]
  n = difference.shape[-1]
  causal = jnp.tri(n, dtype=bool)
  ratio = jnp.exp(jnp.where(causal, difference, -jnp.inf))  # masked first: g_p / g_s overflows for s > p
  dots = jnp.einsum("...pd,...sd->...ps", k, k, preferred_element_type=dtype)
  inverse = _unit_lower_inverse(jnp.where(jnp.tri(n, k=-1, dtype=bool), beta[..., None] * ratio * dots, 0))
  g = jnp.exp(log_g)[..., None]
  beta = beta[..., None]
  return _Chunks(
    writes=inverse @ (beta * v),
    erases=inverse @ (beta * g * k),
    keys=jnp.exp(log_g[..., -1:] - log_g)[..., None] * k,
    decay=g[..., -1, 0],
    queries=g * q,
    attention=ratio * jnp.einsum("...pd,...sd->...ps", q, k, preferred_element_type=dtype),
  )


def _carry(state: jax.Array, chunk: _Chunks) -> tuple[jax.Array, jax.Array]:
  """The state (B, H, Dv, D) after a chunk, and the one before it."""
  writes = _writes(chunk, state)
  after = chunk.decay[..., None, None] * state + jnp.einsum("...nv,...nd->...vd", writes, chunk.keys)
  return after, state


def _read(chunks: _Chunks, states: jax.Array) -> jax.Array:
  """Readouts (N, B, H, n, Dv) of all chunks from the states before them."""
  return jnp.einsum("...nd,...vd->...nv", chunks.queries, states) + chunks.attention @ _writes(chunks, states)


def _writes(chunk: _Chunks, state: jax.Array) -> jax.Array:
  return chunk.writes - jnp.einsum("...nd,...vd->...nv", chunk.erases, state)


@jax.custom_vjp
def _unit_lower_inverse(lower: jax.Array) -> jax.Array:
  """Inverse of ``I + lower``, lower (..., n, n) strictly lower triangular and n a power of two.

  By halves, ``[[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]``: log2 n rounds of matrix products on every
  platform, and as stable as substitution, which a product of powers of `lower` is not when keys repeat.
  """
  n = lower.shape[-1]
  if n == 1:
    return jnp.ones_like(lower)
  h = n // 2
  corner = lower[..., h:, :h]
  a, b = jnp.unstack(_unit_lower_inverse(jnp.stack([lower[..., :h, :h], lower[..., h:, h:]])))
  top = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([-(b @ (corner @ a)), b], axis=-1)], axis=-2)


def _unit_lower_inverse_fwd(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
  inverse = _unit_lower_inverse(lower)
  return inverse, inverse


def _unit_lower_inverse_bwd(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
  return (-(inverse.mT @ cotangent @ inverse.mT),)


_unit_lower_inverse.defvjp(_unit_lower_inverse_fwd, _unit_lower_inverse_bwd)

"""The gated delta rule in chunks, as XLA runs it: chunks work in parallel, only the state passes from one to the next.

Take a chunk of n steps. Let ``g_p`` be the product of its decays up to step p and M the state before its first step. What the
chunk writes, U (n, Dv), solves the unit lower-triangular system ``(I + diag(beta) D) U = diag(beta) (V - diag(g) K M^T)`` with
``D[p, s] = (g_p / g_s) k_p.k_s`` for s < p. With X the inverse of the left-hand matrix, ``U = X diag(beta) V -
X diag(beta g) K M^T`` is affine in M. Decays only enter as exponentials of differences of logarithms.

Where documents are packed, the three kinds of decay are 0 across a start: g_p / g_s if the document of p starts after s, g_p if
it starts in the chunk, and g_n / g_s if the last document of the chunk starts after s. Nothing is added to logarithms for it.

On a TPU this moves three to eight times the bytes of the kernels in `pallas_tpu`, whose docstring has the figures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64


class _ChunkTerms(NamedTuple):
  """What each chunk computes before it knows the state M that enters it; leading axes (N, B, H) for N chunks."""

  writes: jax.Array  # (n, Dv): U for M = 0
  erases: jax.Array  # (n, D): U = writes - erases M^T
  keys: jax.Array  # (n, D): k_s g_n / g_s
  decay: jax.Array  # (): g_n
  queries: jax.Array  # (n, D): g_p q_p
  attention: jax.Array  # (n, n): g_p / g_s k_s.q_p for s <= p, else 0


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array, starts: jax.Array | None = None, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta` for K = H, saving its inputs and one state per chunk for the backward pass."""
  inputs = _split_chunks(q, k, v, log_gamma, beta, initial_state.dtype, chunk)
  n = inputs[0].shape[-2]
  readout, final_state = _run((*inputs, None if starts is None else chunk_starts(starts, n)), initial_state)
  return _join_chunks(readout, v), final_state


def gated_delta_step(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, state: jax.Array,
                     layer: int | None) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta.step.gated_delta_step`."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  stacked, state = state, state if layer is None else state[layer]
  dtype, out_dtype = state.dtype, v.dtype
  q, k, v = (x[:, 0].astype(dtype) for x in (q, k, v))
  gamma, beta = (x[:, 0, :, None].astype(dtype) for x in (jnp.exp(log_gamma), beta))
  state_k, state_q = jnp.unstack(jnp.einsum("bhvd,nbhd->nbhv", state, jnp.stack([k, q])))
  write = beta * (v - gamma * state_k)
  readout = gamma * state_q + write * jnp.sum(k * q, axis=-1, keepdims=True)
  state = gamma[..., None] * state + write[..., None] * k[..., None, :]
  return readout[:, None].astype(out_dtype), state if layer is None else stacked.at[layer].set(state)


def transition(k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
               chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
  """Summarises a sequence as the affine map ``M -> M A + N`` of the state before it to the state after it.

  `atma_jax.ops.context_parallel` composes the maps of consecutive shards. It never differentiates them.

  Args:
    k, v, log_gamma, beta: as for `gated_delta`, with K = H.
    chunk: steps in a chunk.

  Returns:
    A (B, H, D, D) and N (B, H, Dv, D), in float32 or wider.
  """
  (B, _, H, D), Dv, dtype = k.shape, v.shape[-1], jnp.result_type(jnp.float32, k, v)
  chunks = _chunk_terms((*_split_chunks(k, k, v, log_gamma, beta, dtype, chunk), None))

  def step(carry: tuple[jax.Array, jax.Array], chunk: _ChunkTerms) -> tuple[tuple[jax.Array, jax.Array], None]:
    A, N = carry
    return (_advance(A, chunk._replace(writes=jnp.zeros((), dtype)))[0], _advance(N, chunk)[0]), None

  start = jnp.broadcast_to(jnp.eye(D, dtype=dtype), (B, H, D, D)), jnp.zeros((B, H, Dv, D), dtype)
  return jax.lax.scan(step, start, chunks)[0]


def _split_chunks(q: jax.Array, k: jax.Array, v: jax.Array, log_gamma: jax.Array, beta: jax.Array, dtype: jnp.dtype,
                  chunk: int = CHUNK) -> tuple[jax.Array, ...]:
  """Cuts each (B, T, H, ...) into chunks (N, B, H, n, ...) and casts the gates to `dtype`.

  Padded steps have gamma 1 and beta 0, which leaves the state as it is.
  """
  T = q.shape[1]
  chunk = min(chunk, 1 << (T - 1).bit_length())
  count = -(-T // chunk)

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, count * chunk - T), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(x.shape[0], count, chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))

  return tuple(map(split, (q, k, v, log_gamma.astype(dtype), beta.astype(dtype))))


def chunk_starts(starts: jax.Array, n: int) -> jax.Array:
  """Cuts starts (B, T) into chunks of n steps (N, B, 1, n), counted from the chunk's first step; below 0 is before the chunk.

  Padded steps belong to the last document.
  """
  padded = jnp.pad(starts, ((0, 0), (0, -starts.shape[1] % n)), mode="edge")
  chunks = padded.reshape(starts.shape[0], -1, 1, n)
  return jnp.moveaxis(chunks - n * jnp.arange(chunks.shape[1])[:, None, None], 1, 0)


def _join_chunks(readout: jax.Array, v: jax.Array) -> jax.Array:
  """Joins the chunks' readouts (N, B, H, n, Dv) into one of v's shape and dtype."""
  readout = jnp.moveaxis(readout, (0, 2), (1, 3))
  return readout.reshape(v.shape[0], -1, *v.shape[2:])[:, :v.shape[1]].astype(v.dtype)


@jax.custom_vjp
def _run(inputs: tuple[Any, ...], initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
  chunks = _chunk_terms(inputs)
  final_state, states = jax.lax.scan(_advance, initial_state, chunks)
  return _read(chunks, states), final_state


def _run_fwd(inputs: tuple[Any, ...], initial_state: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
  chunks = _chunk_terms(inputs)
  final_state, states = jax.lax.scan(_advance, initial_state, chunks)
  return (_read(chunks, states), final_state), (inputs, states)


def _run_bwd(residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], jax.Array]:
  inputs, states = residuals
  dreadout, dfinal_state = cotangents
  chunks, terms_vjp = jax.vjp(_chunk_terms, inputs)
  dchunks, dstates = jax.vjp(_read, chunks, states)[1](dreadout)

  def step(dafter: jax.Array, inputs: tuple[jax.Array, _ChunkTerms, jax.Array]) -> tuple[jax.Array, _ChunkTerms]:
    state, chunk, dread = inputs
    dstate, dchunk = jax.vjp(lambda state, chunk: _advance(state, chunk)[0], state, chunk)[1](dafter)
    return dstate + dread, dchunk

  dinitial_state, from_advance = jax.lax.scan(step, dfinal_state, (states, chunks, dstates), reverse=True)
  return *terms_vjp(jax.tree.map(jnp.add, dchunks, from_advance)), dinitial_state


_run.defvjp(_run_fwd, _run_bwd)


def _chunk_terms(inputs: tuple[Any, ...]) -> _ChunkTerms:
  """Computes the terms of all chunks at once from q, k (N, B, H, n, D), v (N, B, H, n, Dv), log_gamma and beta (N, B, H, n), and
  `chunk_starts` (N, B, 1, n) or None."""
  q, k, v, log_gamma, beta, starts = inputs
  dtype = log_gamma.dtype
  log_g = jnp.cumsum(log_gamma, axis=-1)
  difference = log_g[..., :, None] - log_g[..., None, :]
  n = difference.shape[-1]
  causal = jnp.tri(n, dtype=bool)
  if starts is not None:
    causal &= jnp.arange(n) >= starts[..., None]
  ratio = jnp.exp(jnp.where(causal, difference, -jnp.inf))  # masked first: g_p / g_s overflows for s > p
  dots = jnp.einsum("...pd,...sd->...ps", k, k, preferred_element_type=dtype)
  inverse = _unit_lower_inverse(jnp.where(jnp.tri(n, k=-1, dtype=bool), beta[..., None] * ratio * dots, 0))
  g = jnp.exp(log_g)[..., None]
  if starts is not None:
    g = jnp.where(starts[..., None] < 0, g, 0)
  beta = beta[..., None]

  def to_end() -> jax.Array:
    change = log_g[..., -1:] - log_g
    return change if starts is None else jnp.where(causal[..., -1, :], change, -jnp.inf)

  return _ChunkTerms(
    writes=inverse @ (beta * v),
    erases=inverse @ (beta * g * k),
    keys=jnp.exp(to_end())[..., None] * k,
    decay=g[..., -1, 0],
    queries=g * q,
    attention=ratio * jnp.einsum("...pd,...sd->...ps", q, k, preferred_element_type=dtype),
  )


def _advance(state: jax.Array, chunk: _ChunkTerms) -> tuple[jax.Array, jax.Array]:
  """Returns the state (B, H, Dv, D) after a chunk, and the one before it, as `jax.lax.scan` collects it."""
  writes = _writes(chunk, state)
  after = chunk.decay[..., None, None] * state + jnp.einsum("...nv,...nd->...vd", writes, chunk.keys)
  return after, state


def _read(chunks: _ChunkTerms, states: jax.Array) -> jax.Array:
  """Returns the readouts (N, B, H, n, Dv) of all chunks, given the states before them."""
  return jnp.einsum("...nd,...vd->...nv", chunks.queries, states) + chunks.attention @ _writes(chunks, states)


def _writes(chunk: _ChunkTerms, state: jax.Array) -> jax.Array:
  """Returns U (..., n, Dv), given the state before the chunk."""
  return chunk.writes - jnp.einsum("...nd,...vd->...nv", chunk.erases, state)


@jax.custom_vjp
def _unit_lower_inverse(lower: jax.Array) -> jax.Array:
  """Inverts ``I + lower``, where lower (..., n, n) is strictly lower triangular and n is a power of two.

  It recurses on halves, ``[[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]``: log2 n rounds of matrix products on every
  platform. This is as stable as forward substitution; a product of powers of `lower` is not when keys repeat.
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

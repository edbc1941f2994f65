"""Routed slot memory in chunks: the tokens of a chunk in parallel, only the slots pass from one chunk to the next."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from atma_jax.ops.slot_memory.api import State

CHUNK = 16


def slot_memory(q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, scale: float, initial_state: State,
                chunk: int = CHUNK) -> tuple[jax.Array, State]:
  """Implements `slot_memory.api.slot_memory`; of n chunks the backward pass keeps about sqrt(n) states and recomputes the others.

  A state is as large as M tokens of keys and values. One per chunk would take 8 GiB per layer at the published size and 65,536
  tokens. Decays enter as exponentials of differences of their running sums, none of which is positive.
  """
  T, dtype = q.shape[1], initial_state[0].dtype
  chunk = min(chunk, T)
  count = -(-T // chunk)
  length = math.isqrt(count - 1) + 1  # chunks in a segment; the state before each segment is kept
  segments = -(-count // length)

  def split(x: jax.Array) -> jax.Array:
    """(B, T, H, ...) -> (segments, chunks, B, H, n, ...); padded steps neither decay nor write."""
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, segments * length * chunk - T), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], segments, length, chunk, *x.shape[2:]), (1, 2, 4), (0, 1, 3))

  @jax.checkpoint
  def run_segment(state: State, inputs: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
    return jax.lax.scan(functools.partial(_run_chunk, scale), state, inputs)

  state, out = jax.lax.scan(run_segment, initial_state, tuple(map(split, (q, k, v, log_decay))))
  out = jnp.moveaxis(out, (0, 1, 3), (1, 2, 4))
  return out.reshape(out.shape[0], -1, *out.shape[4:])[:, :T].astype(v.dtype), state


@functools.partial(jax.checkpoint, static_argnums=0)
def _run_chunk(scale: float, state: State, inputs: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
  q, k, v, f = inputs  # (B, H, n, D), (B, H, n, M)
  keys, values = state
  total = jnp.cumsum(f, axis=2)
  write = -jnp.expm1(f)
  n = f.shape[2]
  causal = jnp.tril(jnp.ones((n, n), bool))[..., None]
  # (B, H, t, s, M): the share of what step s wrote that is left at step t.
  left = jnp.exp(jnp.where(causal, total[:, :, :, None] - total[:, :, None], -jnp.inf)) * write[:, :, None]
  scores = jnp.exp(total) * jnp.einsum("bhmd,bhtd->bhtm", keys, q)
  scores += jnp.einsum("bhtsm,bhts->bhtm", left, jnp.einsum("bhtd,bhsd->bhts", q, k))
  weights = jax.nn.softmax(scale * scores, axis=-1)
  out = jnp.einsum("bhtm,bhmd->bhtd", weights * jnp.exp(total), values)
  out += jnp.einsum("bhts,bhsd->bhtd", jnp.einsum("bhtm,bhtsm->bhts", weights, left), v)
  decay, left_at_end = jnp.exp(total[:, :, -1])[..., None], left[:, :, -1]
  keys = decay * keys + jnp.einsum("bhsm,bhsd->bhmd", left_at_end, k)
  values = decay * values + jnp.einsum("bhsm,bhsd->bhmd", left_at_end, v)
  return (keys, values), out

"""Routed slot memory: a fixed number of key and value slots, of which every token decays and writes a few.

The recurrence of Raven ("Memory as a set of slots", goombalab/raven), which is gated slot attention (arXiv 2409.07146) with a
sparse router. With the log-decay f_t (M slots; 0 where the router did not choose a slot) and w_t = 1 - exp(f_t):

    K_t = exp(f_t) K_{t-1} + w_t k_t^T        V_t = exp(f_t) V_{t-1} + w_t v_t^T        o_t = V_t^T softmax(scale K_t q_t)
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

OP = dispatch.Op("slot_memory", {
  "xla": dispatch.Implementation(f"{__name__}:chunked"),
  "reference": dispatch.Implementation(f"{__name__}:reference", platforms=()),
})
CHUNK = 16
State = tuple[jax.Array, jax.Array]


def slot_memory(q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, scale: float,
                initial_state: State | None = None, implementation: str = "auto") -> tuple[jax.Array, State]:
  """Writes and reads the slots step by step.

  Args:
    q: (B, T, H, D); k, v: (B, T, H, D).
    log_decay: (B, T, H, M), at most 0.
    scale: of the products of queries and slot keys.
    initial_state: slot keys and values, (B, H, M, D) each, float32 or wider; None is zero.
    implementation: "auto", "xla" (in chunks) or "reference" (one step at a time).

  Returns:
    (B, T, H, D) in v's dtype, and the state after the last token.
  """
  (B, _, H, D), M = q.shape, log_decay.shape[-1]
  if initial_state is None:
    zeros = jnp.zeros((B, H, M, D), jnp.result_type(jnp.float32, q))
    initial_state = zeros, zeros
  return OP(implementation, q, k, v, log_decay=log_decay, scale=scale, initial_state=initial_state)


def reference(q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, scale: float,
              initial_state: State) -> tuple[jax.Array, State]:
  """The recurrence as it is written: the oracle."""
  dtype = initial_state[0].dtype

  def step(state: State, inputs: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
    q, k, v, f = inputs  # (B, H, D), (B, H, M)
    keys, values = (jnp.exp(f)[..., None] * slots - jnp.expm1(f)[..., None] * new[..., None, :]
                    for slots, new in zip(state, (k, v)))
    weights = jax.nn.softmax(scale * jnp.einsum("bhmd,bhd->bhm", keys, q), axis=-1)
    return (keys, values), jnp.einsum("bhm,bhmd->bhd", weights, values)

  state, out = jax.lax.scan(step, initial_state, tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, log_decay)))
  return jnp.moveaxis(out, 0, 1).astype(v.dtype), state


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, scale: float, initial_state: State,
            chunk: int = CHUNK) -> tuple[jax.Array, State]:
  """All steps of a chunk at once; of n chunks the backward pass keeps about sqrt(n) states and computes the others again.

  A state is as large as M tokens of keys and values; one kept for every chunk would be 8 GiB a layer at the published size
  and 65,536 tokens. Decays enter as exponentials of differences of their running sums, none of which is positive.
  """
  T, dtype = q.shape[1], initial_state[0].dtype
  chunk = min(chunk, T)
  count = -(-T // chunk)
  length = math.isqrt(count - 1) + 1  # chunks of a segment; the state before each segment is kept
  segments = -(-count // length)

  def cut(x: jax.Array) -> jax.Array:
    """(B, T, H, ...) -> (segments, chunks, B, H, n, ...); a padded step neither decays nor writes."""
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, segments * length * chunk - T), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], segments, length, chunk, *x.shape[2:]), (1, 2, 4), (0, 1, 3))

  @jax.checkpoint
  def segment(state: State, inputs: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
    return jax.lax.scan(functools.partial(_chunk, scale), state, inputs)

  state, out = jax.lax.scan(segment, initial_state, tuple(map(cut, (q, k, v, log_decay))))
  out = jnp.moveaxis(out, (0, 1, 3), (1, 2, 4))
  return out.reshape(out.shape[0], -1, *out.shape[4:])[:, :T].astype(v.dtype), state


@functools.partial(jax.checkpoint, static_argnums=0)
def _chunk(scale: float, state: State, inputs: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
  q, k, v, f = inputs  # (B, H, n, D), (B, H, n, M)
  keys, values = state
  total = jnp.cumsum(f, axis=2)
  write = -jnp.expm1(f)
  n = f.shape[2]
  earlier = jnp.tril(jnp.ones((n, n), bool))[..., None]
  # (B, H, t, s, M): what is left at step t of what step s wrote.
  left = jnp.exp(jnp.where(earlier, total[:, :, :, None] - total[:, :, None], -jnp.inf)) * write[:, :, None]
  scores = jnp.exp(total) * jnp.einsum("bhmd,bhtd->bhtm", keys, q)
  scores += jnp.einsum("bhtsm,bhts->bhtm", left, jnp.einsum("bhtd,bhsd->bhts", q, k))
  weights = jax.nn.softmax(scale * scores, axis=-1)
  out = jnp.einsum("bhtm,bhmd->bhtd", weights * jnp.exp(total), values)
  out += jnp.einsum("bhts,bhsd->bhtd", jnp.einsum("bhtm,bhtsm->bhts", weights, left), v)
  end, kept = jnp.exp(total[:, :, -1])[..., None], left[:, :, -1]
  return (end * keys + jnp.einsum("bhsm,bhsd->bhmd", kept, k), end * values + jnp.einsum("bhsm,bhsd->bhmd", kept, v)), out

"""Routed slot memory: a fixed number of key and value slots; every token decays a few of them and writes into those.

The recurrence of Raven ("Memory as a set of slots", goombalab/raven), which is gated slot attention (arXiv 2409.07146) with a
sparse router. With the log-decay f_t (M slots; 0 where the router did not choose a slot) and w_t = 1 - exp(f_t):

    K_t = exp(f_t) K_{t-1} + w_t k_t^T        V_t = exp(f_t) V_{t-1} + w_t v_t^T        o_t = V_t^T softmax(scale K_t q_t)
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.ops.core import dispatch

_PACKAGE = "atma_jax.ops.slot_memory"
OP = dispatch.Op("slot_memory", {
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:slot_memory"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:slot_memory", platforms=()),
  **dispatch.served_by(f"{_PACKAGE}.xla:slot_memory", "pallas_gpu", "pallas_tpu"),
})

State = tuple[Float[Array, "B H M D"], Float[Array, "B H M D"]]  # slot keys and slot values


def slot_memory(q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"], *,
                log_decay: Float[Array, "B T H M"], scale: float, initial_state: State | None = None,
                implementation: str = "auto") -> tuple[Float[Array, "B T H D"], State]:
  """Writes every token into the slots, and reads them after each write.

  Args:
    q, k, v: queries, keys and values.
    log_decay: natural logarithm of each slot's decay, at most 0.
    scale: factor of the products of queries and slot keys.
    initial_state: the slots before the first token, float32 or wider; None is zeros.
    implementation: one of `dispatch.NAMES`; there are no kernels, so on their device their names mean "xla".

  Returns:
    What each token reads, in v's dtype, and the slots after the last token.

  Raises:
    NotImplementedError: the implementation asked for by name cannot serve the call.
  """
  (B, _, H, D), M = q.shape, log_decay.shape[-1]
  if initial_state is None:
    zeros = jnp.zeros((B, H, M, D), jnp.result_type(jnp.float32, q))
    initial_state = zeros, zeros
  return OP(implementation, q, k, v, log_decay=log_decay, scale=scale, initial_state=initial_state)

"""The MLP's gate ``g * relu(u)^2``, and its gradients from u and the result, so that g need not be kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

RESULT = "squared_gate"  # the name of what is kept for the backward pass in place of g

GRADIENTS = dispatch.Op("squared_gate_gradients", {
  "pallas_gpu": dispatch.Implementation("atma_jax.ops.squared_gate.pallas_gpu:squared_gate_gradients", platforms=("gpu",),
                                        supports="supports"),
  "xla": dispatch.Implementation("atma_jax.ops.squared_gate.api:divided"),
})


def squared_gate(u: jax.Array, g: jax.Array) -> jax.Array:
  """``g * relu(u)^2``."""
  return g * jnp.square(jax.nn.relu(u))


def squared_gate_gradients(u: jax.Array, h: jax.Array, dh: jax.Array, bias: jax.Array, *,
                           implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """Gradients of ``h = squared_gate(u + bias, g)``: with respect to u and g side by side, and their sums.

  Where ``a = relu(u + bias)`` is not zero, ``2 g a`` is ``2 h / a``: one rounding of h more than from g.

  Args:
    u, h, dh: (B, T, F); dh is h's cotangent.
    bias: (F,).
    implementation: one of `dispatch.NAMES`.

  Returns:
    (B, T, 2 F) in u's dtype, and sums (B, n, 2, F) of it in float32 or wider, over all of T in n pieces that are still to be
    added up.

  Raises:
    ValueError: shapes do not fit together.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  if u.ndim != 3 or not u.shape == h.shape == dh.shape or bias.shape != u.shape[-1:]:
    raise ValueError(f"squared_gate_gradients: u {u.shape}, h {h.shape}, dh {dh.shape}, bias {bias.shape} are not (B, T, F) "
                     "three times and (F,)")
  return GRADIENTS(implementation, u, h, dh, bias)


def divided(u: jax.Array, h: jax.Array, dh: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  """See `squared_gate_gradients`."""
  wide = jnp.result_type(jnp.float32, u)
  u, h, dh, bias, dtype = *(z.astype(wide) for z in (u, h, dh, bias)), u.dtype
  a = jax.nn.relu(u + bias)
  both = jnp.stack([jnp.where(a > 0, 2 * dh * h / jnp.where(a > 0, a, 1), 0), dh * a * a], axis=2)
  return both.reshape(*u.shape[:2], -1).astype(dtype), jnp.sum(both, axis=1, keepdims=True)

"""The MLP's gate and its gradients: the public functions and their table of implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.ops.core import dispatch

CHECKPOINT_NAME = "squared_gate"  # of the gate's output, which is saved for the backward pass instead of g

_PACKAGE = "atma_jax.ops.squared_gate"
GRADIENTS = dispatch.Op("squared_gate_gradients", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:squared_gate_gradients", platforms=("gpu",),
                                        supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.reference:squared_gate_gradients"),
  **dispatch.served_by(f"{_PACKAGE}.reference:squared_gate_gradients", "reference", "pallas_tpu"),
})


def squared_gate(u: Float[Array, "*shape"], g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Returns ``g * relu(u)^2``."""
  return g * jnp.square(jax.nn.relu(u))


def squared_gate_gradients(u: Float[Array, "B T F"], h: Float[Array, "B T F"], dh: Float[Array, "B T F"],
                           bias: Float[Array, " F"], *,
                           implementation: str = "auto") -> tuple[Float[Array, "B T 2*F"], Float[Array, "B n 2 F"]]:
  """Differentiates ``h = squared_gate(u + bias, g)`` without g.

  With ``a = relu(u + bias)``, u's gradient has a factor ``2 g a``, which is ``2 h / a`` where a is not zero. From h it is rounded
  once more than from g.

  Args:
    u: input of the gate without its bias.
    h: output of the gate.
    dh: cotangent of h.
    bias: of u.
    implementation: one of `dispatch.NAMES`.

  Returns:
    The gradients of u and g, concatenated, in u's dtype; and their sums over T, in float32 or wider, as n partial sums for the
    caller to add up.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: the implementation asked for by name cannot serve the call.
  """
  if u.ndim != 3 or not u.shape == h.shape == dh.shape or bias.shape != u.shape[-1:]:
    raise ValueError(f"squared_gate_gradients: u {u.shape}, h {h.shape}, dh {dh.shape}, bias {bias.shape} must be "
                     "(B, T, F), (B, T, F), (B, T, F) and (F,)")
  return GRADIENTS(implementation, u, h, dh, bias)

"""Half-truncated rotary position embedding: half of the angular frequencies are zero, so half of each head is not rotated."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BASE = 1024.0


def rotary_embedding(x: Float[Array, "B T H D"],
                     positions: Int[Array, " T"] | Int[Array, "B T"]) -> Float[Array, "B T H D"]:
  """Rotates the pairs (x_d, x_{d + D/2}) of every head by an angle proportional to the position.

  The angular frequencies are ``(1/1024)^linspace(0, 1, D/4)`` followed by D/4 zeros. With x1 and x2 the halves of a head, the
  result is ``(x1 cos + x2 sin, -x1 sin + x2 cos)``.

  Args:
    x: queries or keys; D is a multiple of 4.
    positions: position of each token.

  Returns:
    The rotated heads in x's dtype; angles and rotation are computed in float32 or wider.

  Raises:
    ValueError: D is not a multiple of 4.
  """
  quarter, rest = divmod(x.shape[-1], 4)
  if rest:
    raise ValueError(f"rotary_embedding: head size {x.shape[-1]} is not a multiple of 4")
  dtype = jnp.result_type(jnp.float32, x)
  frequencies = jnp.concatenate([BASE ** -jnp.linspace(0, 1, quarter, dtype=dtype), jnp.zeros(quarter, dtype)])
  angles = positions.astype(dtype)[..., None, None] * frequencies  # (..., T, 1, D/2)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  x1, x2 = jnp.split(x.astype(dtype), 2, axis=-1)
  return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)

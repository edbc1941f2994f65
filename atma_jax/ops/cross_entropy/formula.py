"""The head's formula: a matrix product in float32 or wider, a bias, and a smooth cap of the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def soft_cap(z: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
  """Returns ``cap * z / sqrt(z^2 + cap^2)``: the identity near zero, and within +-cap everywhere."""
  return z * jax.lax.rsqrt(1 + jnp.square(z / cap))


def accumulator_dtype(hidden: jax.Array) -> jnp.dtype:
  """Returns the dtype of the head's output and of all sums: float32 or wider."""
  return jnp.result_type(jnp.float32, hidden)


def head_output(hidden: Float[Array, "B T C"], kernel: Float[Array, "C V"]) -> Float[Array, "B T V"]:
  """Multiplies by the head's kernel, accumulating in float32 or wider."""
  return jnp.einsum("btc,cv->btv", hidden, kernel, preferred_element_type=accumulator_dtype(hidden))


def capped_logits(head: Float[Array, "B T V"], bias: Float[Array, " V"], cap: float) -> Float[Array, "B T V"]:
  """Adds the bias to the head's output and caps the sum."""
  return soft_cap(head + bias.astype(head.dtype), cap)


def target_mask(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Bool[Array, "B T V"]:
  """Marks each target's logit; unlike a gather, a mask fuses, and partitions over a sharded vocabulary."""
  return targets[..., None] == jnp.arange(logits.shape[-1])

"""The training loss and its evaluation, without ever storing (B, T, V) logits."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.ops import cross_entropy
from atma_jax.sharding import parts


def language_model_loss(model: nnx.Module, tokens: jax.Array, *, z_loss: float, chunk: int) -> tuple[jax.Array, jax.Array]:
  """Mean loss per target token, and the mean squared log-partition function.

  Args:
    model: an `Atma`.
    tokens: (B, T + 1) int32; the last T of each row are the targets.
    z_loss: weight of the squared log-partition function within the loss.
    chunk: time steps of each sequence whose logits exist at once.
  """
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  loss, square = cross_entropy(model.hidden(inputs), model.head.kernel[...], model.head.bias[...], targets,
                               jnp.ones(targets.shape, jnp.float32), cap=model.config.logit_cap, z_loss=z_loss, chunk=chunk,
                               parts=parts("sequence"))
  return loss / targets.size, square / targets.size

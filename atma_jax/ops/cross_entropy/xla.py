"""The log-partition of a chunk of logits and the gradients of its loss, as XLA runs them; also the kernels' oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops.cross_entropy.formula import capped_logits, soft_cap, target_mask

_SMALL_CAP = 40  # exp(logit - cap) of logits within +-40 is at least exp(-80), which float32 still represents


def log_partition(head: jax.Array, bias: jax.Array, targets: jax.Array, cap: float) -> tuple[jax.Array, jax.Array]:
  """Returns the logsumexp of the logits and the target's logit, (B, T) each.

  The cap bounds the logits and so stands in for their maximum, unless it is so wide that exponentials could underflow. One
  reduction makes both sums, so the head's output is read once. The target's logit is capped after its sum: otherwise both sums
  would need the capped logits, and XLA would store them.

  Args:
    head: output of the head without its bias, (B, T, V).
    bias: (V,).
    targets: (B, T).
    cap: see `soft_cap`.
  """
  z = head + bias.astype(head.dtype)
  logits = soft_cap(z, cap)
  top = jnp.max(logits, axis=-1) if cap > _SMALL_CAP else jnp.full(logits.shape[:-1], cap, logits.dtype)
  target = jnp.where(target_mask(logits, targets), z, 0)
  zero = jnp.zeros((), logits.dtype)
  total, target = jax.lax.reduce((jnp.exp(logits - top[..., None]), target), (zero, zero),
                                 lambda a, b: (a[0] + b[0], a[1] + b[1]), (logits.ndim - 1,))
  return top + jnp.log(total), soft_cap(target, cap)


def logit_gradients(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array, *,
                    cap: float, z_loss: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
  """Differentiates the loss with respect to the head's output and bias.

  Args:
    head: output of the head without its bias, (B, T, V).
    bias: (V,).
    log_partition: logsumexp of the logits, (B, T).
    targets: (B, T).
    weights: weight of each token's loss, (B, T).
    cap: see `soft_cap`.
    z_loss: weight of the squared log-partition.
    dtype: of the gradient of the head's output.

  Returns:
    The gradients of the head's output (B, T, V), in `dtype`, and of the bias (V,), in float32 or wider.
  """
  logits = capped_logits(jax.lax.optimization_barrier(head), bias, cap)  # recomputed: cheaper than writing and reading them
  weighted_p = (weights * (1 + 2 * z_loss * log_partition))[..., None] * jnp.exp(logits - log_partition[..., None])
  dlogits = weighted_p - jnp.where(target_mask(logits, targets), weights[..., None], 0)
  slope = 1 - jnp.square(logits / cap)
  dhead = dlogits * slope * jnp.sqrt(slope)  # the derivative of the cap is (1 - (logit / cap)^2)^(3/2)
  dhead = jax.lax.optimization_barrier(dhead.astype(dtype))  # stored once, and in the narrow dtype
  return dhead, jnp.sum(dhead, axis=(0, 1), dtype=head.dtype)

"""Cross-entropy of a soft-capped linear head, in chunks of time: full (B, T, V) logits never exist."""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp


def soft_cap(z: jax.Array, cap: float) -> jax.Array:
  """``cap z / sqrt(z^2 + cap^2)``: the identity near 0, within (-cap, cap) everywhere."""
  return cap * z * jax.lax.rsqrt(z * z + cap * cap)


def cross_entropy(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array, *,
                  cap: float, z_loss: float, chunk: int) -> tuple[jax.Array, jax.Array]:
  """Summed negative log-likelihood of the targets, gradients included, `chunk` time steps at a time.

  Args:
    hidden: (B, T, C) the final norm's output.
    kernel: (C, V); bias: (V,).
    targets: (B, T) int32.
    weights: (B, T) weight of each token.
    cap: of `soft_cap` on the logits.
    z_loss: weight of the squared log-partition function within the loss.
    chunk: time steps of each sequence whose logits exist at once.

  Returns:
    ``sum w (nll + z_loss logsumexp^2)``, differentiable in hidden, kernel and bias; and ``sum w logsumexp^2`` as a
    metric without gradient. Gradients are made with the logits in the forward pass, so logits are computed once.
  """
  return _cross_entropy((cap, z_loss, chunk), hidden, kernel, bias, targets, weights)


def token_losses(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, *, cap: float,
                 chunk: int) -> jax.Array:
  """Negative log-likelihood (B, T) of each target, float32; arguments as in `cross_entropy`. For evaluation."""

  def losses(hidden: jax.Array, targets: jax.Array) -> jax.Array:
    logits = _logits(hidden, kernel, bias, cap)
    return jax.nn.logsumexp(logits, axis=-1) - _pick(logits, targets)

  return _map_time(losses, chunk, hidden, targets)


def token_predictions(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, *, cap: float, chunk: int) -> jax.Array:
  """Most likely next token (B, T) int32; arguments as in `cross_entropy`."""
  return _map_time(lambda h: jnp.argmax(_logits(h, kernel, bias, cap), axis=-1).astype(jnp.int32), chunk, hidden)


def _linear(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  wide = jnp.promote_types(jnp.float32, hidden.dtype)
  z = jnp.einsum("btc,cv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=wide)
  return z + bias.astype(wide)


def _logits(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, cap: float) -> jax.Array:
  return soft_cap(_linear(hidden, kernel, bias), cap)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _split_time(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """(B, T, ...) -> (chunks, B, chunk, ...), zero-padded."""
  T = arrays[0].shape[1]
  chunk = min(chunk, T)
  chunks = -(-T // chunk)

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

  return tuple(split(x) for x in arrays)


def _join_time(x: jax.Array, length: int) -> jax.Array:
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _map_time(function: Callable[..., jax.Array], chunk: int, *arrays: jax.Array) -> jax.Array:
  return _join_time(jax.lax.map(lambda xs: function(*xs), _split_time(chunk, *arrays)), arrays[0].shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden, kernel, bias, targets, weights):
  cap, z_loss, chunk = options

  def add(sums, inputs):
    hidden, targets, weights = inputs
    loss, square, _, _ = _chunk_loss(hidden, kernel, bias, targets, weights, cap, z_loss)
    return (sums[0] + loss, sums[1] + square), None

  zero = jnp.zeros((), jnp.promote_types(jnp.float32, hidden.dtype))
  return jax.lax.scan(add, (zero, zero), _split_time(chunk, hidden, targets, weights))[0]


def _chunk_loss(hidden, kernel, bias, targets, weights, cap, z_loss):
  z = _linear(hidden, kernel, bias)
  logits = soft_cap(z, cap)
  log_partition = jax.nn.logsumexp(logits, axis=-1)
  square = log_partition**2
  loss = jnp.sum(weights * (log_partition - _pick(logits, targets) + z_loss * square))
  return loss, jnp.sum(weights * square), z, (logits, log_partition)


def _forward(options, hidden, kernel, bias, targets, weights):
  cap, z_loss, chunk = options
  wide = jnp.promote_types(jnp.float32, hidden.dtype)

  def add(carry, inputs):
    loss_sum, square_sum, d_kernel, d_bias = carry
    hidden, targets, weights = inputs
    loss, square, z, (logits, log_partition) = _chunk_loss(hidden, kernel, bias, targets, weights, cap, z_loss)
    softmax = jnp.exp(logits - log_partition[..., None])
    one_hot = targets[..., None] == jnp.arange(z.shape[-1])
    d_logits = softmax * (1 + 2 * z_loss * log_partition)[..., None] - one_hot
    slope = jax.lax.rsqrt((z / cap) ** 2 + 1) ** 3  # of soft_cap
    dz = weights[..., None] * d_logits * slope
    d_bias += jnp.sum(dz, axis=(0, 1))
    dz = dz.astype(hidden.dtype)
    d_kernel += jnp.einsum("btc,btv->cv", hidden, dz, preferred_element_type=wide)
    d_hidden = jnp.einsum("btv,cv->btc", dz, kernel.astype(hidden.dtype), preferred_element_type=wide)
    return (loss_sum + loss, square_sum + square, d_kernel, d_bias), d_hidden.astype(hidden.dtype)

  zero = jnp.zeros((), wide)
  start = (zero, zero, jnp.zeros(kernel.shape, wide), jnp.zeros(bias.shape, wide))
  (loss, square, d_kernel, d_bias), d_hidden = jax.lax.scan(add, start, _split_time(chunk, hidden, targets, weights))
  gradients = (_join_time(d_hidden, hidden.shape[1]), d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype))
  return (loss, square), gradients


def _backward(options, gradients, cotangents):
  del options
  scale, _ = cotangents
  return (*((scale * g).astype(g.dtype) for g in gradients), None, None)


_cross_entropy.defvjp(_forward, _backward)

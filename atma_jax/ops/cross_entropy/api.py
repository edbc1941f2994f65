"""Cross-entropy of a soft-capped linear head, a few time steps at a time: (B, T, V) logits never exist.

`cross_entropy` computes its gradients while it has the logits, in the forward pass, so that each chunk's logits are
made once; the backward pass only scales them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

LOGIT_GRADIENTS = dispatch.Op("logit_gradients", {
  "pallas_gpu": dispatch.Implementation("atma_jax.ops.cross_entropy.pallas_gpu:logit_gradients", platforms=("gpu",),
                                        supports="supports"),
  "xla": dispatch.Implementation("atma_jax.ops.cross_entropy.api:logit_gradients"),
})
LOG_PARTITION = dispatch.Op("log_partition", {
  "pallas_gpu": dispatch.Implementation("atma_jax.ops.cross_entropy.pallas_gpu:log_partition", platforms=("gpu",),
                                        supports="sums_exponentials"),
  "xla": dispatch.Implementation("atma_jax.ops.cross_entropy.api:log_partition"),
})


def soft_cap(z: jax.Array, cap: float) -> jax.Array:
  """``cap * z / sqrt(z^2 + cap^2)``: the identity near zero, within +-cap everywhere."""
  return z * jax.lax.rsqrt(1 + jnp.square(z / cap))


def cross_entropy(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array, *,
                  cap: float, z_loss: float, chunk: int, parts: int = 1) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of token losses, differentiable in hidden, kernel and bias.

  Args:
    hidden: (B, T, C); the head's matrix products run in its dtype.
    kernel: (C, V).
    bias: (V,).
    targets: (B, T) integers.
    weights: (B, T), not differentiated.
    cap: of the logits.
    z_loss: weight of the squared log-partition.
    chunk: time steps of each sequence whose logits exist at once, on a device where time is split over several.
    parts: equal pieces, a divisor of T, into which time is split over devices: a chunk takes steps of each.

  Returns:
    loss_sum, ``sum weights * (nll + z_loss * logsumexp^2)``; and z_sum, ``sum weights * logsumexp^2``, which is there
    to be reported and carries no gradient. Both are scalars in float32 or wider.
  """
  loss_sum, z_sum = _cross_entropy(hidden, kernel, bias, targets, weights, cap, z_loss, chunk, parts)
  return loss_sum, jax.lax.stop_gradient(z_sum)


def token_losses(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, *, cap: float,
                 chunk: int, parts: int = 1) -> jax.Array:
  """(B, T) negative log-likelihoods in nats, float32 or wider; arguments as in `cross_entropy`."""
  kernel = kernel.astype(hidden.dtype)

  def losses(inputs):
    hidden, targets = inputs
    z, target = LOG_PARTITION("auto", _head(hidden, kernel), bias, targets, cap)
    return z - target

  return _unchunk(jax.lax.map(losses, _chunks(chunk, parts, hidden, targets)), hidden.shape[1], parts)


def token_predictions(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, *, cap: float, chunk: int,
                      parts: int = 1) -> jax.Array:
  """(B, T) int32 most likely tokens; arguments as in `cross_entropy`."""
  kernel = kernel.astype(hidden.dtype)

  def predict(hidden):
    return jnp.argmax(_logits(_head(hidden, kernel), bias, cap), axis=-1).astype(jnp.int32)

  return _unchunk(jax.lax.map(predict, _chunks(chunk, parts, hidden)[0]), hidden.shape[1], parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _cross_entropy(hidden, kernel, bias, targets, weights, cap, z_loss, chunk, parts):
  dtype = _accumulator(hidden)
  kernel = kernel.astype(hidden.dtype)

  def step(sums, inputs):
    hidden, targets, weights = inputs
    z, target = LOG_PARTITION("auto", _head(hidden, kernel), bias, targets, cap)
    nll, z2 = z - target, z * z
    return (sums[0] + jnp.sum(weights * (nll + z_loss * z2)), sums[1] + jnp.sum(weights * z2)), None

  zero = jnp.zeros((), dtype)
  return jax.lax.scan(step, (zero, zero), _chunks(chunk, parts, hidden, targets, weights.astype(dtype)))[0]


def _cross_entropy_fwd(hidden, kernel, bias, targets, weights, cap, z_loss, chunk, parts):
  dtype = _accumulator(hidden)
  cast = kernel.astype(hidden.dtype)

  def step(carry, inputs):
    loss_sum, z_sum, dkernel, dbias = carry
    hidden, targets, weights = inputs
    head = _head(hidden, cast)
    z, target = LOG_PARTITION("auto", head, bias, targets, cap)
    nll, z2 = z - target, z * z
    dz, total = LOGIT_GRADIENTS("auto", head, bias, z, targets, weights, cap=cap, z_loss=z_loss, dtype=hidden.dtype)
    dbias += total
    dkernel += jnp.einsum("btc,btv->cv", hidden, dz, preferred_element_type=dtype)
    dhidden = jnp.einsum("btv,cv->btc", dz, cast)
    loss_sum += jnp.sum(weights * (nll + z_loss * z2))
    return (loss_sum, z_sum + jnp.sum(weights * z2), dkernel, dbias), dhidden

  zero = jnp.zeros((), dtype)
  start = (zero, zero, jnp.zeros(kernel.shape, dtype), jnp.zeros(bias.shape, dtype))
  inputs = _chunks(chunk, parts, hidden, targets, weights.astype(dtype))
  (loss_sum, z_sum, dkernel, dbias), dhidden = jax.lax.scan(step, start, inputs)
  gradients = (_unchunk(dhidden, hidden.shape[1], parts), dkernel.astype(kernel.dtype), dbias.astype(bias.dtype))
  return (loss_sum, z_sum), gradients


def _cross_entropy_bwd(cap, z_loss, chunk, parts, gradients, cotangents):
  del cap, z_loss, chunk, parts
  return (*((cotangents[0] * x).astype(x.dtype) for x in gradients), None, None)


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def logit_gradients(head: jax.Array, bias: jax.Array, log_partition: jax.Array, targets: jax.Array, weights: jax.Array, *,
                    cap: float, z_loss: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
  """The loss's gradient with respect to the head's output (B, chunk, V), in `dtype`, and to the bias (V,), in float32 or wider.

  `log_partition`, targets and weights are (B, chunk).
  """
  logits = _logits(jax.lax.optimization_barrier(head), bias, cap)  # again: cheaper than to write and read them
  weighted_p = (weights * (1 + 2 * z_loss * log_partition))[..., None] * jnp.exp(logits - log_partition[..., None])
  dlogits = weighted_p - jnp.where(_one_hot(logits, targets), weights[..., None], 0)
  share = 1 - jnp.square(logits / cap)
  dz = dlogits * share * jnp.sqrt(share)  # the cap's slope is (1 - (y / cap)^2)^(3/2)
  dz = jax.lax.optimization_barrier(dz.astype(dtype))  # stored once, and in the narrow type
  return dz, jnp.sum(dz, axis=(0, 1), dtype=head.dtype)


def _accumulator(hidden: jax.Array) -> jnp.dtype:
  return jnp.result_type(jnp.float32, hidden)


def _head(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
  """Matrix product of the head, (B, chunk, V), in float32 or wider."""
  return jnp.einsum("btc,cv->btv", hidden, kernel, preferred_element_type=_accumulator(hidden))


def _logits(head: jax.Array, bias: jax.Array, cap: float) -> jax.Array:
  return soft_cap(head + bias.astype(head.dtype), cap)


def _one_hot(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """A mask rather than a gather: it fuses, and it partitions over a sharded vocabulary."""
  return targets[..., None] == jnp.arange(logits.shape[-1])


def log_partition(head: jax.Array, bias: jax.Array, targets: jax.Array, cap: float) -> tuple[jax.Array, jax.Array]:
  """Logsumexp of the logits and the target's logit, (B, chunk) each.

  The cap bounds the logits, so nothing has to look for their maximum, unless the cap is so wide that exponentials could
  underflow; and one reduction takes both sums: the head's output is read once. The target is capped after the sum, or XLA
  would store the capped logits, which both sums would then need.
  """
  z = head + bias.astype(head.dtype)
  logits = soft_cap(z, cap)
  top = jnp.max(logits, axis=-1) if cap > 40 else jnp.full(logits.shape[:-1], cap, logits.dtype)
  target = jnp.where(_one_hot(logits, targets), z, 0)
  zero = jnp.zeros((), logits.dtype)
  total, target = jax.lax.reduce((jnp.exp(logits - top[..., None]), target), (zero, zero),
                                 lambda a, b: (a[0] + b[0], a[1] + b[1]), (logits.ndim - 1,))
  return top + jnp.log(total), soft_cap(target, cap)


def _chunks(chunk: int, parts: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Each (B, T, ...) as (chunks, B, parts * steps, ...), in equal chunks of at most `chunk` steps, padded with zeros.

  Steps of one part stay side by side, so that an array split in `parts` over devices is cut without moving a number.
  """
  piece = arrays[0].shape[1] // parts
  count = -(-piece // chunk)
  steps = -(-piece // count)

  def cut(x):
    rest = x.shape[2:]
    x = jnp.pad(x.reshape(-1, parts, piece, *rest), ((0, 0), (0, 0), (0, count * steps - piece), *((0, 0),) * len(rest)))
    return jnp.moveaxis(x.reshape(-1, parts, count, steps, *rest), 2, 0).reshape(count, -1, parts * steps, *rest)

  return tuple(map(cut, arrays))


def _unchunk(x: jax.Array, T: int, parts: int) -> jax.Array:
  """The inverse of `_chunks`."""
  (count, B, _), rest = x.shape[:3], x.shape[3:]
  x = jnp.moveaxis(x.reshape(count, B, parts, -1, *rest), 0, 2)
  return x.reshape(B, parts, -1, *rest)[:, :, : T // parts].reshape(B, T, *rest)

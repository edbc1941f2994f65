"""Cross-entropy of a soft-capped linear head, some time steps at a time: logits of shape (B, T, V) never exist.

`cross_entropy` computes its gradients in the forward pass, while it has the logits, so that the logits of each chunk are computed
once. The backward pass only scales these gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch
from atma_jax.ops.cross_entropy.formula import accumulator_dtype, capped_logits, head_output

_PACKAGE = "atma_jax.ops.cross_entropy"
LOGIT_GRADIENTS = dispatch.Op("logit_gradients", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:logit_gradients", platforms=("gpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:logit_gradients"),
  **dispatch.served_by(f"{_PACKAGE}.xla:logit_gradients", "reference", "pallas_tpu"),
})
LOG_PARTITION = dispatch.Op("log_partition", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:log_partition", platforms=("gpu",),
                                        supports="supports_log_partition"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:log_partition"),
  **dispatch.served_by(f"{_PACKAGE}.xla:log_partition", "reference", "pallas_tpu"),
})


def cross_entropy(hidden: Float[Array, "B T C"], kernel: Float[Array, "C V"], bias: Float[Array, " V"],
                  targets: Int[Array, "B T"], weights: Float[Array, "B T"], *, cap: float, z_loss: float, chunk: int,
                  time_shards: int = 1, implementation: str = "auto") -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Sums weighted token losses, differentiably in `hidden`, `kernel` and `bias`.

  Args:
    hidden: the final norm's output; the head's matrix products run in its dtype.
    kernel: the head's kernel.
    bias: the head's bias.
    targets: the tokens to be predicted.
    weights: weight of each token's loss; not differentiated.
    cap: bound of the logits, see `soft_cap`.
    z_loss: weight of the squared log-partition.
    chunk: time steps whose logits exist at once, per sequence and per shard of time.
    time_shards: number of devices that time is split over, a divisor of T. A chunk takes steps of every shard, so that no
      device waits for another.
    implementation: one of `dispatch.NAMES`.

  Returns:
    loss_sum, ``sum weights * (nll + z_loss * logsumexp^2)`` with nll in nats, and z_sum, ``sum weights * logsumexp^2``, which is
    for reports and carries no gradient. Both are float32 or wider.

  Raises:
    NotImplementedError: the implementation asked for by name cannot serve the call.
  """
  loss_sum, z_sum = _cross_entropy(hidden, kernel, bias, targets, weights, cap, z_loss, chunk, time_shards, implementation)
  return loss_sum, jax.lax.stop_gradient(z_sum)


def token_losses(hidden: Float[Array, "B T C"], kernel: Float[Array, "C V"], bias: Float[Array, " V"],
                 targets: Int[Array, "B T"], *, cap: float, chunk: int, time_shards: int = 1,
                 implementation: str = "auto") -> Float[Array, "B T"]:
  """Returns the negative log-likelihood of each target in nats, in float32 or wider; arguments are those of `cross_entropy`."""
  kernel = kernel.astype(hidden.dtype)

  def losses(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    hidden, targets = inputs
    log_partition, target = LOG_PARTITION(implementation, head_output(hidden, kernel), bias, targets, cap)
    return log_partition - target

  return _join_chunks(jax.lax.map(losses, _split_chunks(chunk, time_shards, hidden, targets)), hidden.shape[1], time_shards)


def token_predictions(hidden: Float[Array, "B T C"], kernel: Float[Array, "C V"], bias: Float[Array, " V"], *, cap: float,
                      chunk: int, time_shards: int = 1) -> Int[Array, "B T"]:
  """Returns the most likely token at each position, int32; arguments are those of `cross_entropy`."""
  kernel = kernel.astype(hidden.dtype)

  def predict(hidden: jax.Array) -> jax.Array:
    return jnp.argmax(capped_logits(head_output(hidden, kernel), bias, cap), axis=-1).astype(jnp.int32)

  return _join_chunks(jax.lax.map(predict, _split_chunks(chunk, time_shards, hidden)[0]), hidden.shape[1], time_shards)


def _sums(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array, cap: float,
          z_loss: float, chunk: int, time_shards: int, implementation: str) -> tuple[jax.Array, jax.Array]:
  """Returns what `cross_entropy` does, without gradients."""
  dtype = accumulator_dtype(hidden)
  kernel = kernel.astype(hidden.dtype)

  def step(sums: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
    hidden, targets, weights = inputs
    log_partition, target = LOG_PARTITION(implementation, head_output(hidden, kernel), bias, targets, cap)
    nll, square = log_partition - target, log_partition * log_partition
    return (sums[0] + jnp.sum(weights * (nll + z_loss * square)), sums[1] + jnp.sum(weights * square)), None

  zero = jnp.zeros((), dtype)
  return jax.lax.scan(step, (zero, zero), _split_chunks(chunk, time_shards, hidden, targets, weights.astype(dtype)))[0]


def _sums_fwd(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array, cap: float,
              z_loss: float, chunk: int, time_shards: int, implementation: str) -> tuple[Any, tuple[jax.Array, ...]]:
  """Returns the sums, and the gradients of loss_sum with respect to hidden, kernel and bias."""
  dtype = accumulator_dtype(hidden)
  cast_kernel = kernel.astype(hidden.dtype)

  def step(carry: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    loss_sum, z_sum, dkernel, dbias = carry
    hidden, targets, weights = inputs
    head = head_output(hidden, cast_kernel)
    log_partition, target = LOG_PARTITION(implementation, head, bias, targets, cap)
    nll, square = log_partition - target, log_partition * log_partition
    dhead, dbias_chunk = LOGIT_GRADIENTS(implementation, head, bias, log_partition, targets, weights, cap=cap, z_loss=z_loss,
                                         dtype=hidden.dtype)
    dbias += dbias_chunk
    dkernel += jnp.einsum("btc,btv->cv", hidden, dhead, preferred_element_type=dtype)
    dhidden = jnp.einsum("btv,cv->btc", dhead, cast_kernel)
    loss_sum += jnp.sum(weights * (nll + z_loss * square))
    return (loss_sum, z_sum + jnp.sum(weights * square), dkernel, dbias), dhidden

  zero = jnp.zeros((), dtype)
  start = (zero, zero, jnp.zeros(kernel.shape, dtype), jnp.zeros(bias.shape, dtype))
  inputs = _split_chunks(chunk, time_shards, hidden, targets, weights.astype(dtype))
  (loss_sum, z_sum, dkernel, dbias), dhidden = jax.lax.scan(step, start, inputs)
  dhidden = _join_chunks(dhidden, hidden.shape[1], time_shards)
  return (loss_sum, z_sum), (dhidden, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype))


def _sums_bwd(cap: float, z_loss: float, chunk: int, time_shards: int, implementation: str, gradients: Sequence[jax.Array],
              cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
  """Scales the gradients; z_sum carries none."""
  del cap, z_loss, chunk, time_shards, implementation
  return (*((cotangents[0] * x).astype(x.dtype) for x in gradients), None, None)


_cross_entropy = jax.custom_vjp(_sums, nondiff_argnums=(5, 6, 7, 8, 9))
_cross_entropy.defvjp(_sums_fwd, _sums_bwd)


def _split_chunks(chunk: int, time_shards: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Cuts each (B, T, ...) into equal chunks (count, B, time_shards * steps, ...) of at most `chunk` steps, padded with zeros.

  Steps of one shard stay adjacent, so that cutting an array whose time is split over devices moves no number between them.
  """
  length = arrays[0].shape[1] // time_shards
  count = -(-length // chunk)
  steps = -(-length // count)

  def split(x: jax.Array) -> jax.Array:
    rest = x.shape[2:]
    padding = ((0, 0), (0, 0), (0, count * steps - length), *((0, 0),) * len(rest))
    x = jnp.pad(x.reshape(-1, time_shards, length, *rest), padding)
    x = jnp.moveaxis(x.reshape(-1, time_shards, count, steps, *rest), 2, 0)
    return x.reshape(count, -1, time_shards * steps, *rest)

  return tuple(map(split, arrays))


def _join_chunks(x: jax.Array, T: int, time_shards: int) -> jax.Array:
  """Inverts `_split_chunks`: (count, B, time_shards * steps, ...) to (B, T, ...)."""
  (count, B, _), rest = x.shape[:3], x.shape[3:]
  x = jnp.moveaxis(x.reshape(count, B, time_shards, -1, *rest), 0, 2)
  return x.reshape(B, time_shards, -1, *rest)[:, :, : T // time_shards].reshape(B, T, *rest)

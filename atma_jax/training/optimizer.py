"""Muon for matrices inside the blocks, AdamW for the rest, one schedule for both (paper section "Training").

Every parameter names its group in its metadata (`atma_jax.models.parameter_metadata`), so nothing is guessed from shapes:

=================  ==========================================================================================
``muon``           kernel (..., in, out); orthogonalised momentum, scaled by ``max(1, out / in) ** 0.5``
``muon_out_in``    the same for a matrix stored (..., out, in)
``muon_depthwise`` filter (..., taps, channels); every channel's taps are a 1 x taps matrix of their own
``embedding``, ``head``, ``vector``  AdamW without decay, each at its own learning rate
=================  ==========================================================================================

``config.kind="adamw"`` is the recipe of baselines that come with their own: AdamW with one rate and one decay for everything.

Why not `optax.contrib.muon`: it corrects the bias of the momentum and of the gradient with different powers before mixing them,
so its first updates differ from the published ones. `optax.trace(nesterov=True)` is the published mix times 20, and
orthogonalisation does not see a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from atma_jax.config import OptimizerConfig
from atma_jax.training.distributed_muon import transform_matrices

ADAM_GROUPS = ("embedding", "head", "vector")
MUON_GROUPS = ("muon", "muon_out_in", "muon_depthwise")
NEWTON_SCHULZ = {
    "published": ((2.0, -1.5, 0.5),) * 12,  # converges to the orthogonal factor
    "quintic5": ((3.4445, -4.775, 2.0315),) * 5,  # fast; leaves singular values between about 0.7 and 1.2
}


def learning_rate_factor(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Schedule count -> factor in [0, 1]: linear warmup, then constant and linear to zero at `steps`, or a cosine to its floor.

  The first of W warmup steps uses 1 / W, the last of D decay steps 1 / D: no step is spent at a rate of zero.
  """
  warmup = max(config.warmup_steps, 1)
  decay = max(round(config.decay_fraction * steps), 1)
  floor = config.cosine_floor

  def cosine(count: jax.typing.ArrayLike) -> jax.Array:
    progress = jnp.clip((count - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0)
    return jnp.minimum((count + 1) / warmup, floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))

  def factor(count: jax.typing.ArrayLike) -> jax.Array:
    rising = (count + 1) / warmup
    falling = (steps - count) / decay
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

  return cosine if config.schedule == "cosine" else factor


def learning_rates(config: OptimizerConfig, steps: int, count: jax.typing.ArrayLike) -> dict[str, jax.Array]:
  """The learning rate of each group for the update after `count` applied ones."""
  factor = learning_rate_factor(config, steps)(count)
  return {group: rate * factor for group, rate in _base_rates(config).items()}


def make_optimizer(config: OptimizerConfig, steps: int, groups: Any, tokens_per_step: int,
                   logical_axes: Mapping[str, tuple[str | None, ...]] | None = None) -> optax.GradientTransformation:
  """The whole update rule for gradients of the mean token loss.

  Args:
    config: rates, momenta, clipping.
    steps: length of the schedule.
    groups: tree of group names with the structure of the parameters.
    tokens_per_step: target tokens behind one gradient; ``clip_basis="sum"`` clips the gradient of the summed loss.
    logical_axes: of each parameter, when they are a dict by name: then a mesh that is set shares out Muon's work.

  Returns:
    A transformation whose updates are added to the parameters (`optax.apply_updates`).
  """
  unknown = sorted(set(jax.tree.leaves(groups)) - {*ADAM_GROUPS, *MUON_GROUPS})
  if unknown:
    raise ValueError(f"optimizer groups {unknown} are not among {', '.join((*MUON_GROUPS, *ADAM_GROUPS))}")
  rates, factor = _base_rates(config), learning_rate_factor(config, steps)
  if config.kind == "adamw":
    return optax.chain(*_clipping(config, tokens_per_step), optax.adamw(
      lambda count: rates["adamw"] * factor(count), config.adam_b1, config.adam_b2, config.adam_eps,
      weight_decay=config.adamw_weight_decay))

  def rate(group: str) -> optax.Schedule:
    return lambda count: rates[group] * factor(count)

  def muon(group: str) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(config.muon_momentum, nesterov=True),
        orthogonalize_updates(group, config.muon_variant, logical_axes),
        optax.add_decayed_weights(config.muon_weight_decay),
        optax.scale_by_learning_rate(rate("muon")),
    )

  def adam(group: str) -> optax.GradientTransformation:
    return optax.adam(rate(group), b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps)

  transforms = {group: muon(group) for group in MUON_GROUPS} | {group: adam(group) for group in ADAM_GROUPS}
  return optax.chain(*_clipping(config, tokens_per_step), optax.partition(transforms, groups))


def orthogonalize_updates(group: str, variant: str = "published",
                          logical_axes: Mapping[str, tuple[str | None, ...]] | None = None) -> optax.GradientTransformation:
  """Stateless transformation: each update becomes its orthogonal factor, scaled for its shape, in the layout of `group`."""
  transform = functools.partial(
      {"muon": _kernel_update, "muon_out_in": _matrix_update, "muon_depthwise": _depthwise_update}[group],
      coefficients=NEWTON_SCHULZ[variant])

  def update(updates: Any, _: Any) -> Any:
    if logical_axes is None or group == "muon_depthwise":  # a filter's taps are short and on one device
      return jax.tree.map(transform, updates)
    own = {name: x for name, x in updates.items() if not isinstance(x, optax.MaskedNode)}
    return updates | transform_matrices(own, logical_axes, transform)

  return optax.stateless(update)


def orthogonalize(x: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
  """Newton-Schulz iteration on the last two axes (..., m, n), in float32 or wider; returns the dtype of `x`.

  Starts from ``x / |x|`` (Frobenius) and repeats ``x <- a x + (b G + c G^2) x`` with the smaller of the two Gram matrices G,
  which commutes with the iteration. A zero matrix stays zero.
  """
  dtype = x.dtype
  x = x.astype(jnp.promote_types(dtype, jnp.float32))
  wide = x.shape[-2] <= x.shape[-1]
  x = x if wide else x.mT
  norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
  x = x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)

  def iterate(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
    a, b, c = abc
    gram = x @ x.mT
    return a * x + (b * gram + c * gram @ gram) @ x, None

  x, _ = jax.lax.scan(iterate, x, jnp.asarray(coefficients, x.dtype))
  return (x if wide else x.mT).astype(dtype)


def _matrix_update(x: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
  return orthogonalize(x, coefficients) * max(1.0, x.shape[-2] / x.shape[-1]) ** 0.5


def _kernel_update(x: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
  return orthogonalize(x, coefficients) * max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5


def _depthwise_update(x: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
  """A unit row's only singular value is 1, so the whole iteration is one known number (1 for the published one)."""
  gain = 1.0
  for a, b, c in coefficients:
    gain = a * gain + b * gain**3 + c * gain**5
  norm = jnp.linalg.norm(x, axis=-2, keepdims=True)
  return gain * x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


def _clipping(config: OptimizerConfig, tokens_per_step: int) -> list[optax.GradientTransformation]:
  scale = [optax.scale(tokens_per_step)] if config.clip_basis == "sum" else []
  return scale + ([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else [])


def _base_rates(config: OptimizerConfig) -> dict[str, float]:
  if config.kind == "adamw":
    return {"adamw": config.adamw_learning_rate}
  return {"muon": config.muon_learning_rate, "embedding": config.embedding_learning_rate,
          "head": config.head_learning_rate, "vector": config.vector_learning_rate}

"""Muon for matrices inside the blocks, AdamW for the rest, one schedule for both (paper section "Training").

Every parameter names its group in its metadata (`atma_jax.models.parameter_metadata`), so that no shape is interpreted:

=================  ==========================================================================================
``muon``           kernel (..., in, out); orthogonalised momentum, scaled by ``max(1, out / in) ** 0.5``
``muon_out_in``    as ``muon``, for a matrix stored (..., out, in)
``muon_depthwise`` filter (..., taps, channels); the taps of every channel are a 1 x taps matrix
``embedding``, ``head``, ``vector``  AdamW without weight decay, each at its own learning rate
=================  ==========================================================================================

``config.kind="adamw"`` is for baselines with a recipe of their own: AdamW with one learning rate and weight decay for everything.

Why not `optax.contrib.muon`: it corrects the bias of the momentum and of the gradient with different powers before mixing them,
so its first updates differ from the published ones. `optax.trace(nesterov=True)` is the published mix times 20, and
orthogonalisation is invariant to scale.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float
import optax

from atma_jax.config import OptimizerConfig
from atma_jax.training.distributed_muon import transform_matrices

Coefficients = tuple[tuple[float, float, float], ...]

ADAM_GROUPS = ("embedding", "head", "vector")
MUON_GROUPS = ("muon", "muon_out_in", "muon_depthwise")
NEWTON_SCHULZ = {
    "published": ((2.0, -1.5, 0.5),) * 12,  # converges to the orthogonal factor
    "quintic5": ((3.4445, -4.775, 2.0315),) * 5,  # fast; leaves singular values between about 0.7 and 1.2
}


def learning_rate_factor(config: OptimizerConfig, steps: int) -> Callable[[ArrayLike], Float[Array, ""]]:
  """The schedule of the learning rates, as a factor in [0, 1] of the number of applied updates.

  A linear warmup, then either constant and linear to zero at `steps`, or a cosine to its floor. The first of W warmup steps uses
  1 / W and the last of D decay steps 1 / D, so that no step is spent at a rate of zero.
  """
  warmup = max(config.warmup_steps, 1)
  decay = max(round(config.decay_fraction * steps), 1)
  floor = config.cosine_floor

  def cosine(count: ArrayLike) -> Float[Array, ""]:
    progress = jnp.clip((count - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0)
    return jnp.minimum((count + 1) / warmup, floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))

  def factor(count: ArrayLike) -> Float[Array, ""]:
    rising = (count + 1) / warmup
    falling = (steps - count) / decay
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

  return cosine if config.schedule == "cosine" else factor


def learning_rates(config: OptimizerConfig, steps: int, count: ArrayLike) -> dict[str, Float[Array, ""]]:
  """The learning rate of each group, for the update that follows `count` applied ones."""
  factor = learning_rate_factor(config, steps)(count)
  return {group: rate * factor for group, rate in _base_rates(config).items()}


class RecipeOptimizer(optax.GradientTransformation):
  """The update rule of a recipe, which knows its learning rates; any other `optax.GradientTransformation` trains without them.

  Attributes:
    rates: the learning rate of each group, for the update that follows a number of applied ones.
  """

  rates: Callable[[ArrayLike], dict[str, Float[Array, ""]]]

  @classmethod
  def of(cls, rule: optax.GradientTransformation, config: OptimizerConfig, steps: int) -> RecipeOptimizer:
    """The rule itself, with the learning rates of `config`."""
    made = cls(rule.init, rule.update)
    made.rates = functools.partial(learning_rates, config, steps)
    return made


def make_optimizer(config: OptimizerConfig, steps: int, groups: Any, tokens_per_step: int,
                   logical_axes: Mapping[str, tuple[str | None, ...]] | None = None) -> RecipeOptimizer:
  """Makes the whole update rule, for gradients of the mean token loss.

  Args:
    config: learning rates, momenta, clipping.
    steps: length of the schedule.
    groups: a tree of group names with the structure of the parameters.
    tokens_per_step: target tokens that a gradient is the mean over; ``clip_basis="sum"`` clips the gradient of the summed loss.
    logical_axes: the logical axes of every parameter, for parameters that are a dict by name; with them, Muon's work is
      distributed over the current mesh.

  Returns:
    A transformation whose updates are added to the parameters (`optax.apply_updates`).

  Raises:
    ValueError: a group that does not exist.
  """
  unknown = sorted(set(jax.tree.leaves(groups)) - {*ADAM_GROUPS, *MUON_GROUPS})
  if unknown:
    raise ValueError(f"optimizer groups {unknown} are not among {', '.join((*MUON_GROUPS, *ADAM_GROUPS))}")
  rates, factor = _base_rates(config), learning_rate_factor(config, steps)
  if config.kind == "adamw":
    return RecipeOptimizer.of(optax.chain(*clipping(config, tokens_per_step), optax.adamw(
      lambda count: rates["adamw"] * factor(count), config.adam_b1, config.adam_b2, config.adam_eps,
      weight_decay=config.adamw_weight_decay)), config, steps)

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

  transforms: dict[Hashable, optax.GradientTransformation] = {
    **{group: muon(group) for group in MUON_GROUPS}, **{group: adam(group) for group in ADAM_GROUPS}}
  return RecipeOptimizer.of(optax.chain(*clipping(config, tokens_per_step), optax.partition(transforms, groups)), config, steps)


def orthogonalize_updates(group: str, variant: str = "published",
                          logical_axes: Mapping[str, tuple[str | None, ...]] | None = None) -> optax.GradientTransformation:
  """A stateless transformation that replaces each update by its orthogonal factor, scaled for the matrix's shape.

  Args:
    group: "muon", "muon_out_in" or "muon_depthwise": how the matrices are stored.
    variant: the Newton-Schulz iteration, a key of `NEWTON_SCHULZ`.
    logical_axes: as in `make_optimizer`.
  """
  transform = functools.partial(
      {"muon": _kernel_update, "muon_out_in": _matrix_update, "muon_depthwise": _depthwise_update}[group],
      coefficients=NEWTON_SCHULZ[variant])

  def update(updates: Any, _: Any) -> Any:
    if logical_axes is None or group == "muon_depthwise":  # the few taps of a filter are on one device
      return jax.tree.map(transform, updates)
    own = {name: x for name, x in updates.items() if not isinstance(x, optax.MaskedNode)}
    return updates | transform_matrices(own, logical_axes, transform)

  return optax.stateless(update)


def orthogonalize(x: Float[Array, "*stack m n"], coefficients: Coefficients) -> Float[Array, "*stack m n"]:
  """Newton-Schulz iteration on the last two axes, computed in float32 or wider and returned in the dtype of `x`.

  It starts from ``x / |x|`` (Frobenius norm) and repeats ``x <- a x + (b G + c G^2) x`` with the smaller of the two Gram matrices
  G, which commutes with the iteration. A zero matrix stays zero.

  Args:
    x: a matrix, or a stack of them.
    coefficients: (a, b, c) of every iteration.
  """
  dtype = x.dtype
  x = x.astype(jnp.promote_types(dtype, jnp.float32))
  wide = x.shape[-2] <= x.shape[-1]
  x = x if wide else x.mT
  norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
  x = x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)

  def iterate(x: Float[Array, "*stack m n"], abc: Float[Array, "3"]) -> tuple[Float[Array, "*stack m n"], None]:
    a, b, c = abc
    gram = x @ x.mT
    return a * x + (b * gram + c * gram @ gram) @ x, None

  x, _ = jax.lax.scan(iterate, x, jnp.asarray(coefficients, x.dtype))
  return (x if wide else x.mT).astype(dtype)


def _matrix_update(x: Float[Array, "*stack out in"], coefficients: Coefficients) -> Float[Array, "*stack out in"]:
  return orthogonalize(x, coefficients) * max(1.0, x.shape[-2] / x.shape[-1]) ** 0.5


def _kernel_update(x: Float[Array, "*stack in out"], coefficients: Coefficients) -> Float[Array, "*stack in out"]:
  return orthogonalize(x, coefficients) * max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5


def _depthwise_update(x: Float[Array, "*stack taps C"], coefficients: Coefficients) -> Float[Array, "*stack taps C"]:
  """Normalises the taps of every channel: a 1 x taps matrix of norm 1 has the single singular value 1, so that the iteration only
  scales it by a number known in advance (1 for the published coefficients)."""
  gain = 1.0
  for a, b, c in coefficients:
    gain = a * gain + b * gain**3 + c * gain**5
  norm = jnp.linalg.norm(x, axis=-2, keepdims=True)
  return gain * x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


def clipping(config: OptimizerConfig, tokens_per_step: int) -> list[optax.GradientTransformation]:
  """The transformations that clip the gradient of the mean token loss; see ``clip_basis`` and ``clip_norm`` of the config."""
  scale = [optax.scale(tokens_per_step)] if config.clip_basis == "sum" else []
  return scale + ([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else [])


def _base_rates(config: OptimizerConfig) -> dict[str, float]:
  rates = {"muon": config.muon_learning_rate, "embedding": config.embedding_learning_rate,
           "head": config.head_learning_rate, "vector": config.vector_learning_rate}
  if config.kind == "adamw":
    rates = {"adamw": config.adamw_learning_rate}
  return {group: rate * config.learning_rate_scale for group, rate in rates.items()}

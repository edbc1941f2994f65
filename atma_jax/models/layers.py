"""Parameters with metadata, linear layers, norms and filters shared by every mixer.

Each parameter says two things about itself, once: its logical axes (`atma_jax.sharding`) and its optimizer group:
``muon`` (kernel, in x out), ``muon_depthwise`` (filter, taps x channels, a channel's taps by themselves),
``muon_out_in`` (already out x in), ``embedding``, ``head`` or ``vector``.
"""

from __future__ import annotations

from collections.abc import Callable
import math

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.config import ModelConfig

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """All zero."""
  del key
  return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """All one."""
  del key
  return jnp.ones(shape, dtype)


def constant(value: float) -> Initializer:
  """All `value`."""
  return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def normal(stddev: float) -> Initializer:
  """Independent normal of mean 0."""
  return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def uniform(bound: float) -> Initializer:
  """Independent uniform on [-bound, bound]."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def weight_init(config: ModelConfig, fan_in: int, *, projection: bool = False, output: bool = False) -> Initializer:
  """Initialiser of a linear or filter weight.

  The default start zeroes *output* projections and draws the rest with variance 1/fan_in. The published start zeroes
  everything its code names a projection, the input of the short convolutions included (whose two factors then stay
  zero for ever), and draws the rest uniformly, as PyTorch does.
  """
  if config.init == "published":
    return zeros if projection or output else uniform(1 / math.sqrt(fan_in))
  return zeros if output else normal(1 / math.sqrt(fan_in))


def bias_init(config: ModelConfig, fan_in: int, *, projection: bool = False, output: bool = False) -> Initializer:
  """Initialiser of a bias: zero, except where the published start draws it as PyTorch does."""
  if config.init == "published" and not (projection or output):
    return uniform(1 / math.sqrt(fan_in))
  return zeros


def parameter(config: ModelConfig, rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...],
              logical_axes: tuple[str | None, ...], optimizer: str) -> nnx.Param:
  """A parameter in `config.param_dtype` that carries its logical axes and optimizer group."""
  value = init(rngs.params(), shape, jnp.dtype(config.param_dtype))
  return nnx.Param(value, logical_axes=logical_axes, optimizer=optimizer)


def activation_dtype(config: ModelConfig) -> jnp.dtype:
  """Dtype of the residual stream and of matmul operands."""
  return jnp.dtype(config.activation_dtype)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
  """x over its root mean square along the last axis; statistics in float32 or wider, result in x's dtype."""
  wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


def head_norm(x: jax.Array) -> jax.Array:
  """The weightless norm of every head (B, T, H, D); eps is float32's machine epsilon."""
  return unit_rms(x, float(jnp.finfo(jnp.float32).eps))


def unit_length(x: jax.Array) -> jax.Array:
  """x (..., D) over its Euclidean norm, as the delta rule needs; result in x's dtype."""
  wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  return (wide / jnp.maximum(jnp.sqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-24), 1e-12)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """x (..., C) over its root mean square, times a learned weight (C,)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.eps = config.norm_eps
    self.weight = parameter(config, rngs, ones, (config.width,), ("vector",), "vector")

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = jnp.promote_types(jnp.float32, x.dtype)
    return (unit_rms(x.astype(wide), self.eps) * self.weight[...].astype(wide)).astype(x.dtype)


class Linear(nnx.Module):
  """``x @ kernel + bias`` in the activation dtype; kernel (in, out), bias (out,)."""

  def __init__(self, config: ModelConfig, features_in: int, features_out: int, axes: tuple[str | None, str | None], *,
               projection: bool = False, output: bool = False, rngs: nnx.Rngs):
    kind = {"projection": projection, "output": output}
    self.dtype = activation_dtype(config)
    self.kernel = parameter(config, rngs, weight_init(config, features_in, **kind), (features_in, features_out),
                            axes, "muon")
    self.bias = parameter(config, rngs, bias_init(config, features_in, **kind), (features_out,), ("vector",), "vector")

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.split(x, 1)[0]

  def split(self, x: jax.Array, parts: int, groups: int = 1) -> list[jax.Array]:
    """The output in `parts` equal pieces, a product each: the backward pass then has nothing to concatenate.

    With `groups` the outputs are as many equal groups, and a piece is its share of every group.
    """
    kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
    pieces = [jnp.split(w.reshape(*w.shape[:-1], groups, -1), parts, axis=-1) for w in (kernel, bias)]
    return [x.astype(self.dtype) @ w.reshape(kernel.shape[0], -1) + b.reshape(-1) for w, b in zip(*pieces)]


class DepthwiseFilter(nnx.Module):
  """Weight (taps, channels) of a depthwise causal convolution without bias; the last tap is the current step."""

  def __init__(self, config: ModelConfig, taps: int, channels: int, *, rngs: nnx.Rngs):
    self.weight = parameter(config, rngs, weight_init(config, taps), (taps, channels), (None, None), "muon_depthwise")

"""Parameters with metadata, linear layers, norms and filters shared by every mixer.

Each parameter says two things about itself, once: its logical axes (`atma_jax.sharding`) and its optimizer group:
``muon`` (kernel, in x out), ``muon_depthwise`` (filter, taps x channels, a channel's taps by themselves),
``muon_out_in`` (already out x in), ``embedding``, ``head`` or ``vector``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from atma_jax.config import ModelConfig
from atma_jax.ops.core import dispatch

FEW_ROWS = 16  # rows of the smallest tile of a GPU's matrix units

# Names of what is kept for the backward pass beside matrix products: the residual stream, in place of the products that are
# added to it and that nothing else needs, and the norms' sums, which are small and would have it read once more.
RESIDUAL, NORM_SUM = "residual_stream", "norm_sum"

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
  mean = checkpoint_name(jnp.mean(wide * wide, -1, keepdims=True), NORM_SUM)
  return (wide * jax.lax.rsqrt(mean + eps)).astype(x.dtype)


def head_norm(x: jax.Array) -> jax.Array:
  """The weightless norm of every head (B, T, H, D); eps is float32's machine epsilon."""
  return unit_rms(x, float(jnp.finfo(jnp.float32).eps))


def unit_length(x: jax.Array) -> jax.Array:
  """x (..., D) over its Euclidean norm, as the delta rule needs; result in x's dtype."""
  wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  square = checkpoint_name(jnp.sum(wide * wide, -1, keepdims=True), NORM_SUM)
  return (wide / jnp.maximum(jnp.sqrt(square + 1e-24), 1e-12)).astype(x.dtype)


def _joined(parts: Sequence[Linear], kernel: jax.Array, bias: jax.Array) -> Linear:
  joined = nnx.clone(parts[0])
  joined.kernel, joined.bias = parts[0].kernel.replace(kernel), parts[0].bias.replace(bias)
  return joined


def fill(x: jax.Array, rows: int) -> jax.Array:
  """x (B, ...) with rows of zeros after its own, `rows` in all."""
  return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def product(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """``x @ kernel + bias`` of x (..., C), kernel (C, F) and bias (F,) in `dtype`, by default x's.

  Few rows are filled up on a GPU: XLA would multiply and reduce one by itself, writing the products to memory, and convert
  the kernel to a wider result's dtype.
  """
  rows = x.reshape(-1, x.shape[-1])
  few = dispatch.platform() == "gpu" and rows.shape[0] < FEW_ROWS
  padded = fill(rows, FEW_ROWS) if few else rows
  y = jnp.matmul(padded, kernel, preferred_element_type=dtype) + bias
  return y[: rows.shape[0]].reshape(*x.shape[:-1], -1)


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

  @staticmethod
  def beside(parts: Sequence[Linear]) -> Linear:
    """The product of one x with all of `parts`: their outputs one after the other."""
    return _joined(parts, jnp.concatenate([part.kernel[...] for part in parts], axis=1),
                   jnp.concatenate([part.bias[...] for part in parts]))

  @staticmethod
  def summed(parts: Sequence[Linear]) -> Linear:
    """The sum of `parts`, each of its own x: what it takes is those one after the other."""
    return _joined(parts, jnp.concatenate([part.kernel[...] for part in parts]), sum(part.bias[...] for part in parts))

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.split(x, 1)[0]

  def split(self, x: jax.Array, parts: int, groups: int = 1) -> list[jax.Array]:
    """The output in `parts` equal pieces, a product each: the backward pass then has nothing to concatenate.

    With `groups` the outputs are as many equal groups, and a piece is its share of every group.
    """
    kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
    if x.shape[-2] == 1:  # decoding has no backward pass, and a product of a few rows takes as long as one of a third of it
      y = product(x.astype(self.dtype), kernel, bias)
      pieces = jnp.split(y.reshape(*y.shape[:-1], groups, -1), parts, axis=-1)
      return [piece.reshape(*y.shape[:-1], -1) for piece in pieces]
    pieces = [jnp.split(w.reshape(*w.shape[:-1], groups, -1), parts, axis=-1) for w in (kernel, bias)]
    return [x.astype(self.dtype) @ w.reshape(kernel.shape[0], -1) + b.reshape(-1) for w, b in zip(*pieces)]

  def unbiased(self, x: jax.Array, parts: int) -> tuple[list[jax.Array], jax.Array]:
    """The output in `parts` equal pieces, a product each, without the biases (parts, F / parts): for an op that adds them."""
    kernels = jnp.split(self.kernel[...].astype(self.dtype), parts, axis=1)
    return [x.astype(self.dtype) @ kernel for kernel in kernels], self.bias[...].reshape(parts, -1)


class DepthwiseFilter(nnx.Module):
  """Weight (taps, channels) of a depthwise causal convolution without bias; the last tap is the current step."""

  def __init__(self, config: ModelConfig, taps: int, channels: int, *, rngs: nnx.Rngs):
    self.weight = parameter(config, rngs, weight_init(config, taps), (taps, channels), (None, None), "muon_depthwise")

"""Parameters with metadata, and the layers that mixers, memory and MLP are built of.

Each parameter says two things about itself, once: its logical axes (`atma_jax.sharding`) and its optimizer group:
``muon`` (kernel, in x out), ``muon_depthwise`` (filter, taps x channels, each channel's taps by themselves),
``muon_out_in`` (already out x in), ``embedding``, ``head`` or ``vector``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.config import ModelConfig
from atma_jax.models import parallel
from atma_jax.ops import short_conv
from atma_jax.ops.core import dispatch

if TYPE_CHECKING:
  from atma_jax.models.cache import TokenSpan

FEW_ROWS = 16  # rows of the smallest tile of a GPU's matrix units

# Names of arrays that rematerialisation saves besides matrix products: the residual stream, in place of the products that were
# added to it, and the small sums in norms, which would take another pass over the stream.
RESIDUAL, NORM_SUM = "residual_stream", "norm_sum"

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """Initialiser: zeros."""
  del key
  return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """Initialiser: ones."""
  del key
  return jnp.ones(shape, dtype)


def constant(value: float) -> Initializer:
  """Initialiser: `value` everywhere."""
  return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def normal(stddev: float) -> Initializer:
  """Initialiser: independent normal of mean 0."""
  return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def uniform(bound: float) -> Initializer:
  """Initialiser: independent uniform on [-bound, bound]."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def weight_init(config: ModelConfig, fan_in: int, *, projection: bool = False, output: bool = False) -> Initializer:
  """Initialiser of a linear or filter weight.

  The default start zeroes *output* projections and draws the rest with variance 1/fan_in. The published start zeroes
  everything that its code calls a projection, the input of the short convolutions included (whose two factors then stay
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


def unit_rms(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
  """x over its root mean square along the last axis; the mean in float32 or wider, the result in x's dtype."""
  wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  mean = checkpoint_name(jnp.mean(wide * wide, -1, keepdims=True), NORM_SUM)
  return (wide * jax.lax.rsqrt(mean + eps)).astype(x.dtype)


def head_norm(x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
  """RMS norm of every head, without a weight; eps is the machine epsilon of float32."""
  return unit_rms(x, float(jnp.finfo(jnp.float32).eps))


def unit_length(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  """x over its Euclidean norm, as the delta rule needs; the result in x's dtype."""
  wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  square = checkpoint_name(jnp.sum(wide * wide, -1, keepdims=True), NORM_SUM)
  return (wide / jnp.maximum(jnp.sqrt(square + 1e-24), 1e-12)).astype(x.dtype)


def pad_rows(x: Float[Array, "B ..."], rows: int) -> Float[Array, "rows ..."]:
  """x with rows of zeros after its own, `rows` in all."""
  return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def product(x: Float[Array, "... C"], kernel: Float[Array, "C F"], bias: Float[Array, " F"],
            dtype: jnp.dtype | None = None) -> Float[Array, "... F"]:
  """``x @ kernel + bias`` in `dtype`, by default x's.

  On a GPU a few rows are padded to a tile of the matrix units: XLA would multiply and reduce a single row by itself, writing
  the products to memory, and convert the kernel to a wider result's dtype.
  """
  rows = x.reshape(-1, x.shape[-1])
  few = dispatch.platform() == "gpu" and rows.shape[0] < FEW_ROWS
  padded = pad_rows(rows, FEW_ROWS) if few else rows
  y = jnp.matmul(padded, kernel, preferred_element_type=dtype) + bias
  return y[: rows.shape[0]].reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
  """x (..., C) over its root mean square, times a learned weight (C,)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.eps = config.norm_eps
    self.weight = parameter(config, rngs, ones, (config.width,), ("vector",), "vector")

  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    wide = jnp.promote_types(jnp.float32, x.dtype)
    return (unit_rms(x.astype(wide), self.eps) * self.weight[...].astype(wide)).astype(x.dtype)


class Linear(nnx.Module):
  """``x @ kernel + bias`` in the activation dtype; kernel (in, out), bias (out,).

  Args:
    config: of the model.
    features_in: size of x's last axis.
    features_out: size of the result's last axis.
    axes: logical axes of the kernel.
    projection: what the published code calls a projection, for `weight_init`.
    output: a projection back to the residual stream, likewise.
    rngs: of the initial values.
  """

  def __init__(self, config: ModelConfig, features_in: int, features_out: int, axes: tuple[str | None, str | None], *,
               projection: bool = False, output: bool = False, rngs: nnx.Rngs):
    kind = {"projection": projection, "output": output}
    self.dtype = activation_dtype(config)
    self.kernel = parameter(config, rngs, weight_init(config, features_in, **kind), (features_in, features_out),
                            axes, "muon")
    self.bias = parameter(config, rngs, bias_init(config, features_in, **kind), (features_out,), ("vector",), "vector")

  @staticmethod
  def concatenate_outputs(linears: Sequence[Linear]) -> Linear:
    """A layer whose output is that of all `linears` for the same x, one after the other."""
    return _with_parameters(linears[0], jnp.concatenate([linear.kernel[...] for linear in linears], axis=1),
                            jnp.concatenate([linear.bias[...] for linear in linears]))

  @staticmethod
  def concatenate_inputs(linears: Sequence[Linear]) -> Linear:
    """A layer that takes the inputs of all `linears` one after the other, and whose output is the sum of theirs."""
    return _with_parameters(linears[0], jnp.concatenate([linear.kernel[...] for linear in linears]),
                            functools.reduce(jnp.add, [linear.bias[...] for linear in linears]))

  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T F"]:
    return self.split(x, 1)[0]

  def split(self, x: Float[Array, "B T C"], pieces: int, groups: int = 1) -> list[Float[Array, "B T _"]]:
    """The output in equal pieces, a product each: the backward pass then has nothing to concatenate.

    With `groups`, the output consists of as many equal groups, and a piece is its share of every group.
    """
    kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
    if x.shape[-2] == 1:  # decoding has no backward pass, and a product of a few rows takes as long as one of a third of it
      y = product(x.astype(self.dtype), kernel, bias)
      split = jnp.split(y.reshape(*y.shape[:-1], groups, -1), pieces, axis=-1)
      return [piece.reshape(*y.shape[:-1], -1) for piece in split]
    kernels, biases = (jnp.split(w.reshape(*w.shape[:-1], groups, -1), pieces, axis=-1) for w in (kernel, bias))
    return [x.astype(self.dtype) @ w.reshape(kernel.shape[0], -1) + b.reshape(-1) for w, b in zip(kernels, biases)]

  def unbiased(self, x: Float[Array, "B T C"], pieces: int) -> tuple[list[Array], Float[Array, "pieces _"]]:
    """The output without its bias, in equal pieces, a product each, and the biases: for an op that adds them itself."""
    kernels = jnp.split(self.kernel[...].astype(self.dtype), pieces, axis=1)
    return [x.astype(self.dtype) @ kernel for kernel in kernels], self.bias[...].reshape(pieces, -1)


def _with_parameters(linear: Linear, kernel: jax.Array, bias: jax.Array) -> Linear:
  copy: Any = nnx.clone(linear)
  copy.kernel, copy.bias = linear.kernel.replace(kernel), linear.bias.replace(bias)
  return copy


@dataclasses.dataclass(frozen=True)
class LinearSum:
  """A sum of linear layers, each with an input of its own, which the residual stream computes when and how it suits.

  Attributes:
    terms: the layers, and their inputs (B, T, ...).
  """

  terms: Sequence[tuple[Linear, Array]]

  def total(self, rows: int) -> Float[Array, "rows T C"]:
    """The sum, for inputs padded to so many rows."""
    return functools.reduce(jnp.add, (linear(pad_rows(x, rows)) for linear, x in self.terms))

  def partial_sums(self) -> tuple[list[Float[Array, "B T C"]], Float[Array, " C"]]:
    """The product of every layer, and the sum of the biases."""
    products, biases = zip(*(linear.unbiased(x, 1) for linear, x in self.terms))
    return [product for product, in products], functools.reduce(jnp.add, [bias[0] for bias in biases])


class DepthwiseFilter(nnx.Module):
  """Depthwise causal convolution without bias, its weight (taps, channels); the last tap is the current step.

  Args:
    config: of the model.
    taps: steps that an output depends on.
    channels: size of x's last axis.
    rngs: of the initial values.
  """

  def __init__(self, config: ModelConfig, taps: int, channels: int, *, rngs: nnx.Rngs):
    self.weight = parameter(config, rngs, weight_init(config, taps), (taps, channels), (None, None), "muon_depthwise")

  def __call__(self, x: Float[Array, "B T F"], channels: str, starts: Int[Array, "B T"] | None = None) -> Float[Array, "B T F"]:
    """The convolution of whole sequences; `channels` is the logical axis of x's last dimension, `starts` see `Mixer`."""
    return parallel.short_conv(x, self.weight[...], channels=channels, starts=starts)

  def extend(self, x: Float[Array, "B T F"], history: Float[Array, "B taps-1 F"],
             span: TokenSpan) -> tuple[Float[Array, "B T F"], Float[Array, "B taps-1 F"]]:
    """The convolution of new tokens that follow a `history` of inputs, and the history after them, which padding leaves alone."""
    y = short_conv(x, self.weight[...], history=history)
    inputs = jnp.concatenate([history, x.astype(history.dtype)], axis=1)
    if x.shape[1] == 1:
      return y, jnp.where(span.counts[:, None, None] > 0, inputs[:, 1:], inputs[:, :-1])
    last = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, history.shape[1]))
    return y, last(inputs, span.counts)

"""The residual stream, to which blocks add."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.models import layers
from atma_jax.models.parallel import sum_and_norm
from atma_jax.sharding import constrain

ACTIVATIONS = ("batch", "sequence", "features")  # logical axes of (B, T, C)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ResidualStream:
  """The residual stream of a pre-norm network, with which a block reads as in the paper::

      x = x + mixer(x.norm(norm1))
      x = x + mlp(x.norm(norm2))

  It hides when a sum is computed. By default an addition is an operation of its own. A stream that is `deferred` only notes what
  is added, and the kernel of the next norm computes the sum as it reads the terms, which saves a pass over memory on a GPU. The
  two agree up to rounding. `norm` and `value` may change how a stream is represented, but never what it stands for.

  Attributes:
    x: the sum so far, in the activation dtype.
    products: what is still to be added to it.
    bias: likewise; only of a deferred stream.
    deferring: the implementation of `atma_jax.ops.sum_and_norm` that computes the sums; None if the stream is not deferred.
  """

  x: Float[Array, "B T C"]
  products: list[Float[Array, "B T C"]] = dataclasses.field(default_factory=list)
  bias: Float[Array, " C"] | None = None
  deferring: str | None = dataclasses.field(default=None, metadata={"static": True})

  def __add__(self, branch: Array | layers.LinearSum) -> ResidualStream:
    """The stream plus the output of a mixer or MLP; an output of fewer rows is padded with zeros."""
    if self.deferring is None:
      total = branch.total(len(self.x)) if isinstance(branch, layers.LinearSum) else layers.pad_rows(branch, len(self.x))
      return ResidualStream(self.value, [total])
    if isinstance(branch, layers.LinearSum):
      products, bias = branch.partial_sums()
    else:
      products, bias = [branch], jnp.zeros(branch.shape[-1:], jnp.float32)
    return ResidualStream(self.value, products, bias, self.deferring)

  def norm(self, norm: layers.RMSNorm) -> Float[Array, "B T C"]:
    """The norm of the stream."""
    if self.deferring is not None:
      weight = norm.weight[...]
      bias = jnp.zeros_like(weight) if self.bias is None else self.bias
      x, normed = sum_and_norm(self.x, self.products, bias, weight, eps=norm.eps, implementation=self.deferring)
      self._settle(x)
      return normed
    if self.products:
      self._settle(checkpoint_name(self._sum(), layers.RESIDUAL))
    return norm(self.x)

  @property
  def value(self) -> Float[Array, "B T C"]:
    """The stream as an array, sharded as activations are."""
    if self.products:
      self._settle(checkpoint_name(constrain(self._sum(), ACTIVATIONS), layers.RESIDUAL))
    return self.x

  def deferred(self, implementation: str) -> ResidualStream:
    """The same stream, whose sums the norms compute from now on, with an implementation of `atma_jax.ops.sum_and_norm`."""
    return dataclasses.replace(self, deferring=implementation)

  def constrained(self) -> ResidualStream:
    """The same stream, sharded as activations are; a deferred sum stays deferred."""
    return self if self.deferring is not None else ResidualStream(self.value)

  def _sum(self) -> Array:
    total = functools.reduce(jnp.add, self.products)
    return self.x + (total if self.bias is None else total + self.bias.astype(self.x.dtype))

  def _settle(self, x: Array) -> None:
    """Replaces the terms by their sum, so that it is computed once."""
    self.x, self.products, self.bias = x, [], None

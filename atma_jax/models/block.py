"""A pre-norm block: a mixer and a gated MLP on the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import Past, Span
from atma_jax.models.mixers.attention import GlobalMixer
from atma_jax.models.mixers.local import LocalMixer
from atma_jax.models.mixers.raven import RavenMixer
from atma_jax.models.parallel import gated_projection, makes_gradients_side_by_side, sum_and_norm, sums_where_it_norms
from atma_jax.ops.core.dispatch import fitting_implementation
from atma_jax.ops.squared_gate.api import squared_gate
from atma_jax.sharding import constrain

MIXERS = {"local": LocalMixer, "global": GlobalMixer, "raven": RavenMixer}

Trace = dict[str, jax.Array]
"""Arrays of one block by name: ``input`` and ``output`` (B, T, C) of the block, ``mixer_input`` (its normed input, B, T, C) and,
of a global mixer, what `GlobalMixer.extend` and `Memory` put there."""

Tap = Callable[["Block", Trace, jax.Array], Any]
"""``tap(block, trace, layer) -> pytree``: called in every block of a forward pass, `layer` being its 0-based index (int32).

Results must have one structure for all blocks of the same kind. Only what a tap reads is computed; without one, nothing is.
"""


Summands = tuple[list[jax.Array], jax.Array | None]
"""What is still to be added to the residual stream: products (B, T, C) and, unless there are none, a bias (C,)."""

NOTHING: Summands = [], None


class MLP(nnx.Module):
  """``W_proj(g * relu(u)^2)`` with ``[u, g] = split(W_fc x)`` on (B, T, C)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.implementation = fitting_implementation(config.implementation)
    self.fc = layers.Linear(config, config.width, 2 * config.mlp_width, ("embed", "mlp"), rngs=rngs)
    self.out_proj = layers.Linear(config, config.mlp_width, config.width, ("mlp", "embed"), output=True, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.out_proj(self._gated(x))

  def summands(self, x: jax.Array) -> Summands:
    """What the output is the sum of."""
    products, bias = self.out_proj.unbiased(self._gated(x), 1)
    return products, bias[0]

  def _gated(self, x: jax.Array) -> jax.Array:
    if x.shape[-2] > 1 and makes_gradients_side_by_side(self.implementation):
      fc, x = self.fc, x.astype(self.fc.dtype)
      return gated_projection(x, fc.kernel[...].astype(fc.dtype), fc.bias[...], implementation=self.implementation)
    return squared_gate(*self.fc.split(x, 2))


class Block(nnx.Module):
  """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; `kind` names the mixer."""

  def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
    self.implementation = fitting_implementation(config.implementation)
    self.norm1 = layers.RMSNorm(config, rngs=rngs)
    self.mixer = MIXERS[kind](config, rngs=rngs)
    self.norm2 = layers.RMSNorm(config, rngs=rngs)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x: jax.Array, trace: Trace | None = None) -> jax.Array:
    normed = self.norm1(x)
    output = self._finish(checkpoint_name(x + self.mixer(normed, trace), layers.RESIDUAL))
    if trace is not None:
      trace |= {"input": x, "mixer_input": normed, "output": output}
    return output

  def late(self, x: jax.Array, summands: Summands, trace: Trace | None = None) -> tuple[jax.Array, Summands]:
    """The same as `__call__` of the sum of x and `summands`, itself as a sum: norms add up what they norm.

    A `trace` receives no ``output``.
    """
    x, normed = normed_sum(self.norm1, x, summands, self.implementation)
    if trace is not None:
      trace |= {"input": x, "mixer_input": normed}
    x, normed = normed_sum(self.norm2, x, self.mixer.summands(normed, trace), self.implementation)
    return x, self.mlp.summands(normed)

  def extend(self, x: jax.Array, past: Past, span: Span, reach: int | None) -> tuple[jax.Array, Past]:
    """The output for tokens that follow `past`, and the update of the past."""
    y, update = self.mixer.extend(self.norm1(x), past, span, reach)
    return self._finish(x + y), update

  def _finish(self, x: jax.Array) -> jax.Array:
    return _stream(x + self.mlp(self.norm2(x)))


def normed_sum(norm: layers.RMSNorm, x: jax.Array, summands: Summands, implementation: str) -> tuple[jax.Array, jax.Array]:
  """The sum of x and `summands`, and its norm."""
  (added, bias), weight = summands, norm.weight[...]
  return sum_and_norm(x, added, jnp.zeros_like(weight) if bias is None else bias, weight, eps=norm.eps,
                      implementation=implementation)


def _added(x: jax.Array, summands: Summands) -> jax.Array:
  products, bias = summands
  return _stream(x + (sum(products) + bias.astype(x.dtype))) if products else x


def _stream(x: jax.Array) -> jax.Array:
  return checkpoint_name(constrain(x, ("batch", "sequence", "features")), layers.RESIDUAL)


class Group(nnx.Module):
  """The blocks of one pattern, in order: what a scanned model repeats."""

  def __init__(self, config: ModelConfig, pattern: tuple[str, ...], *, rngs: nnx.Rngs):
    self.blocks = nnx.List([Block(config, kind, rngs=rngs) for kind in pattern])

  def __call__(self, x: jax.Array, tap: Tap | None = None, first: jax.Array | int = 0) -> tuple[jax.Array, list[Any]]:
    """The output and, with a tap, its result for each block; `first` is the index of the group's first layer."""
    x, summands, results = self.late(x, NOTHING, tap, first)
    return _added(x, summands), results

  def late(self, x: jax.Array, summands: Summands, tap: Tap | None = None,
           first: jax.Array | int = 0) -> tuple[jax.Array, Summands, list[Any]]:
    """The same of the sum of x and `summands`, itself as a sum where norms add up what they norm: only then is there one."""
    results, late = [], sums_where_it_norms(self.blocks[0].implementation)
    for index, block in enumerate(self.blocks):
      trace = None if tap is None else {}
      if late:
        x, summands = block.late(x, summands, trace)
      else:
        x = block(x, trace)
      if tap is not None:
        x, summands = _added(x, summands), NOTHING
        results.append(tap(block, trace | {"output": x}, first + index))
    return x, summands, results

  def extend(self, x: jax.Array, pasts: list[Past], span: Span, reach: int | None) -> tuple[jax.Array, list[Past]]:
    """The output for tokens that follow `pasts`, one a block, and the updates of the pasts."""
    updates = []
    for block, past in zip(self.blocks, pasts, strict=True):
      x, update = block.extend(x, past, span, reach)
      updates.append(update)
    return x, updates

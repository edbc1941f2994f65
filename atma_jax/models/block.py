"""A pre-norm block, and the group of blocks that a model repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import LayerCache, TokenSpan
from atma_jax.models.mixers import Trace, mixer_class
from atma_jax.models.parallel import concatenates_gradients, gated_projection, sums_in_norms
from atma_jax.models.residual import ResidualStream
from atma_jax.ops.squared_gate.api import squared_gate

Tap = Callable[["Block", Trace, Array], Any]
"""``tap(block, trace, layer) -> pytree``: called in every block of a forward pass, `layer` being its 0-based index (int32).

Results must have the same structure for all blocks of one kind. Only what a tap reads is computed; without one, nothing is.
"""


class MLP(nnx.Module):
  """``W_proj(g * relu(u)^2)`` with ``[u, g] = split(W_fc x)``."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.implementation = config.implementation
    self.fc = layers.Linear(config, config.width, 2 * config.mlp_width, ("embed", "mlp"), rngs=rngs)
    self.out_proj = layers.Linear(config, config.mlp_width, config.width, ("mlp", "embed"), output=True, rngs=rngs)

  def __call__(self, x: Float[Array, "B T C"]) -> layers.LinearSum:
    return layers.LinearSum([(self.out_proj, self._gated(x))])

  def _gated(self, x: Float[Array, "B T C"]) -> Float[Array, "B T F"]:
    if x.shape[-2] > 1 and concatenates_gradients(self.implementation):
      fc, x = self.fc, x.astype(self.fc.dtype)
      return gated_projection(x, fc.kernel[...].astype(fc.dtype), fc.bias[...], implementation=self.implementation)
    return squared_gate(*self.fc.split(x, 2))


class Block(nnx.Module):
  """A mixer and an MLP on the residual stream, each behind a norm; `kind` names the mixer."""

  def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
    self.norm1 = layers.RMSNorm(config, rngs=rngs)
    self.mixer = mixer_class(kind)(config, rngs=rngs)
    self.norm2 = layers.RMSNorm(config, rngs=rngs)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x: ResidualStream, cache: LayerCache | None = None, span: TokenSpan | None = None,
               trace: Trace | None = None,
               starts: Int[Array, "B T"] | None = None) -> tuple[ResidualStream, LayerCache | None]:
    """The stream after the block, and the update of the cache; arguments as for `Mixer.__call__`.

    A `trace` receives ``input``, ``output`` and the normed ``mixer_input``, (B, T, C) each, besides what the mixer puts there.
    """
    normed = x.norm(self.norm1)
    if trace is not None:
      trace |= {"input": x.value, "mixer_input": normed}
    mixed, update = self.mixer(normed, cache, span, trace, **({} if starts is None else {"starts": starts}))
    x = x + mixed
    x = x + self.mlp(x.norm(self.norm2))
    if trace is not None:
      trace["output"] = x.value
    return x.constrained(), update


class Group(nnx.Module):
  """The blocks of one repetition of the block pattern, in order: what a scanned model repeats."""

  def __init__(self, config: ModelConfig, pattern: tuple[str, ...], *, rngs: nnx.Rngs):
    self.implementation = config.implementation
    self.blocks = nnx.List([Block(config, kind, rngs=rngs) for kind in pattern])

  def __call__(self, x: ResidualStream, tap: Tap | None = None, first: Int[Array, ""] | int = 0,
               starts: Int[Array, "B T"] | None = None) -> tuple[ResidualStream, list[Any]]:
    """The stream of whole sequences after the blocks, and the results of a tap for each block.

    Args:
      x: the stream before the blocks.
      tap: see `Tap`.
      first: index of the group's first layer.
      starts: of the documents in the sequences, see `Mixer`.
    """
    results = []
    if sums_in_norms(self.implementation):
      x = x.deferred(self.implementation)
    for index, block in enumerate(self.blocks):
      trace = None if tap is None else {}
      x, _ = block(x, trace=trace, starts=starts)
      if tap is not None and trace is not None:
        layer: Any = first + index
        results.append(tap(block, trace, layer))
    return x if tap is None else ResidualStream(x.value), results

  def extend(self, x: ResidualStream, caches: Sequence[LayerCache],
             span: TokenSpan) -> tuple[ResidualStream, list[LayerCache]]:
    """The stream of new tokens after the blocks, and the update of each block's cache."""
    updates = []
    for block, cache in zip(self.blocks, caches, strict=True):
      x, update = block(x, cache, span)
      updates.append(update)
    return x, updates

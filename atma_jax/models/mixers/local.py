"""The kind ``local``: a gated short convolution, as in LFM2."""

from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import LayerCache, Rings, TokenSpan
from atma_jax.models.mixers import Mixer, Trace, register_mixer
from atma_jax.models.parallel import gated_short_conv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalCache(LayerCache):
  """The cache of a local mixer: the last inputs of its convolution."""

  history: Float[Array, "B taps-1 C"]


@register_mixer("local")
class LocalMixer(Mixer):
  """``[b, c, h] = split(W_in x);  y = W_out(c * conv(b * h))``."""

  accepts_padded_rows = True
  accepts_documents = True

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config, width = config, config.width
    self.in_proj = layers.Linear(config, width, 3 * width, ("embed", "mlp"), projection=True, rngs=rngs)
    self.conv = layers.DepthwiseFilter(config, config.conv_taps, width, rngs=rngs)
    self.out_proj = layers.Linear(config, width, width, ("mlp", "embed"), output=True, rngs=rngs)

  def __call__(self, x: Float[Array, "B T C"], cache: LocalCache | None = None, span: TokenSpan | None = None,
               trace: Trace | None = None,
               starts: Int[Array, "B T"] | None = None) -> tuple[layers.LinearSum, LocalCache | None]:
    """See `Mixer`; a trace receives nothing."""
    del trace
    if cache is None or span is None:
      return layers.LinearSum([(self.out_proj, self._gated_conv(x, starts))]), None
    b, c, h = (piece[: span.rows] for piece in self.in_proj.split(x, 3))
    y, history = self.conv.extend(b * h, cache.history, span)
    return layers.LinearSum([(self.out_proj, c * y)]), LocalCache(history)

  def _gated_conv(self, x: Float[Array, "B T C"], starts: Int[Array, "B T"] | None) -> Float[Array, "B T C"]:
    """``c * conv(b * h)`` of whole sequences."""
    def project(arrays: int) -> tuple[list[jax.Array], jax.Array]:
      pieces, bias = self.in_proj.unbiased(x, arrays)
      return pieces, bias.reshape(3, -1)

    return gated_short_conv(project, self.conv.weight[...], channels="mlp", starts=starts,
                            implementation=self.config.implementation)

  @classmethod
  def init_cache(cls, config: ModelConfig, batch: int, rings: Rings) -> LocalCache:
    """See `Mixer`."""
    del rings
    return LocalCache(jnp.zeros((batch, config.conv_taps - 1, config.width), layers.activation_dtype(config)))

"""Local mixer: a gated short convolution, as in LFM2."""

from __future__ import annotations

from flax import nnx
import jax

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import LocalPast, Span, convolve
from atma_jax.models.parallel import gated_short_conv


class LocalMixer(nnx.Module):
  """``[b, c, h] = split(W_in x);  y = W_out(c * conv(b * h))`` on (B, T, C)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    width = config.width
    self.in_proj = layers.Linear(config, width, 3 * width, ("embed", "mlp"), projection=True, rngs=rngs)
    self.conv = layers.DepthwiseFilter(config, config.conv_taps, width, rngs=rngs)
    self.out_proj = layers.Linear(config, width, width, ("mlp", "embed"), output=True, rngs=rngs)

  def __call__(self, x: jax.Array, trace: dict[str, jax.Array] | None = None) -> jax.Array:
    del trace  # nothing inside is of interest beyond the block's own arrays
    return self.extend(x, LocalPast(), None)[0]

  def extend(self, x: jax.Array, past: LocalPast, span: Span | None,
             reach: int | None = None) -> tuple[jax.Array, LocalPast]:
    """The output for tokens that follow `past`, and the update of the past; it has no slots for `reach` to limit."""
    del reach
    b, c, h = self.in_proj.split(x, 3)
    if span is None:
      return self.out_proj(gated_short_conv(b, c, h, self.conv.weight[...], channels="mlp")), LocalPast(None)
    y, history = convolve(b * h, self.conv.weight[...], past.history, span, "mlp")
    return self.out_proj(c * y), LocalPast(history)

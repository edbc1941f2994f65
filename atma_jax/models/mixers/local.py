"""Local mixer: a gated short convolution, as in LFM2."""

from __future__ import annotations

from flax import nnx
import jax

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import LocalPast, Span, convolve
from atma_jax.models.parallel import gated_short_conv
from atma_jax.ops.core.dispatch import fitting_implementation


class LocalMixer(nnx.Module):
  """``[b, c, h] = split(W_in x);  y = W_out(c * conv(b * h))`` on (B, T, C)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config, width = config, config.width
    self.in_proj = layers.Linear(config, width, 3 * width, ("embed", "mlp"), projection=True, rngs=rngs)
    self.conv = layers.DepthwiseFilter(config, config.conv_taps, width, rngs=rngs)
    self.out_proj = layers.Linear(config, width, width, ("mlp", "embed"), output=True, rngs=rngs)

  def __call__(self, x: jax.Array, trace: dict[str, jax.Array] | None = None) -> jax.Array:
    del trace  # nothing inside is of interest beyond the block's own arrays
    return self.extend(x, LocalPast(), None)[0]

  def summands(self, x: jax.Array, trace: dict[str, jax.Array] | None = None) -> tuple[list[jax.Array], jax.Array]:
    """What the output is the sum of: products (B, T, C) and a bias (C,)."""
    del trace
    products, bias = self.out_proj.unbiased(self._gated(x), 1)
    return products, bias[0]

  def _gated(self, x: jax.Array) -> jax.Array:
    """What `out_proj` takes, of whole sequences."""
    def project(arrays: int) -> tuple[list[jax.Array], jax.Array]:
      pieces, bias = self.in_proj.unbiased(x, arrays)
      return pieces, bias.reshape(3, -1)

    return gated_short_conv(project, self.conv.weight[...], channels="mlp",
                            implementation=fitting_implementation(self.config.implementation))

  def extend(self, x: jax.Array, past: LocalPast, span: Span | None,
             reach: int | None = None) -> tuple[jax.Array, LocalPast]:
    """The output for tokens that follow `past`, and the update of the past; it has no slots for `reach` to limit.

    Rows of x beyond those of the past are filled-up ones (`model.Atma.extend`).
    """
    del reach
    if span is None:
      return self.out_proj(self._gated(x)), LocalPast(None)
    b, c, h = (part[: span.rows] for part in self.in_proj.split(x, 3))
    y, history = convolve(b * h, self.conv.weight[...], past.history, span, "mlp")
    return self.out_proj(layers.fill(c * y, x.shape[0])), LocalPast(history)

"""Pure array functions and kernels, each with an oracle and one test suite that every implementation passes."""

from atma_jax.ops.core.visibility import document_starts
from atma_jax.ops.cross_entropy.api import cross_entropy, token_losses, token_predictions
from atma_jax.ops.cross_entropy.formula import soft_cap
from atma_jax.ops.gated_delta.api import gated_delta
from atma_jax.ops.polar_attention.api import polar_attention, polar_statistics
from atma_jax.ops.rms_norm.api import sum_and_norm
from atma_jax.ops.rotary import rotary_embedding
from atma_jax.ops.short_conv.api import gated_short_conv, short_conv
from atma_jax.ops.softmax_attention.api import softmax_attention

__all__ = [
  "cross_entropy",
  "document_starts",
  "gated_delta",
  "gated_short_conv",
  "polar_attention",
  "polar_statistics",
  "rotary_embedding",
  "short_conv",
  "soft_cap",
  "softmax_attention",
  "sum_and_norm",
  "token_losses",
  "token_predictions",
]

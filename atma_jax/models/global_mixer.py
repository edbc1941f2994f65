"""Global mixer: projections, an attention core (polar, nope or rope) and the optional memory."""

from __future__ import annotations

import math

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.memory import Memory
from atma_jax.ops import polar_attention, rotary_embedding, short_conv, softmax_attention

ROPE_SCALE = 0.12


class PolarCore(nnx.Module):
  """Polar attention (paper section "Polar Attention"): direction and magnitude, each projected on its own."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    heads, dim = config.num_heads, config.head_dim

    def scalar(value: float) -> nnx.Param:
      return layers.parameter(config, rngs, layers.constant(value), (heads,), ("vector",), "vector")

    self.null_base, self.null_slope, self.len_gain, self.mag_beta = scalar(2.0), scalar(0.5), scalar(-1.0), scalar(-1.5)
    self.v_null = layers.parameter(config, rngs, layers.zeros, (heads, dim), (None, None), "muon_out_in")
    self.mu_proj = layers.Linear(config, heads, config.width, (None, "embed"), output=True, rngs=rngs)

  def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q (B, T, H, D); k, v (B, T, K, D) -> heads (B, T, H, D) and an addend (B, T, C)."""
    direction, magnitude = polar_attention(
      q, k, v, v_null=self.v_null[...], null_base=self.null_base[...], null_slope=self.null_slope[...],
      len_gain=self.len_gain[...], mag_beta=self.mag_beta[...], window=self.config.window,
      implementation=self.config.implementation)
    return direction, self.mu_proj(magnitude)


class SoftmaxCore(nnx.Module):
  """The matched baselines: plain softmax attention, with (rope) or without (nope) rotary positions."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    del rngs
    self.config = config

  def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """q (B, T, H, D); k, v (B, T, K, D) -> heads (B, T, H, D) and nothing to add."""
    scale = 1 / math.sqrt(self.config.head_dim)
    if self.config.attention == "rope":
      positions, scale = jnp.arange(q.shape[1]), ROPE_SCALE
      q, k = rotary_embedding(q, positions), rotary_embedding(k, positions)
    return softmax_attention(q, k, v, scale=scale, window=self.config.window), None


CORES = {"polar": PolarCore, "nope": SoftmaxCore, "rope": SoftmaxCore}
CANON_ATTENTIONS = ("polar", "nope")


class GlobalMixer(nnx.Module):
  """``W_proj(core(q, k, v) * sigmoid(gate)) + addend + memory`` on (B, T, C)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    width, inner, inner_kv = config.width, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    self.q = layers.Linear(config, width, 2 * inner, ("embed", "heads"), rngs=rngs)
    self.k = layers.Linear(config, width, inner_kv, ("embed", "kv_heads"), rngs=rngs)
    self.v = layers.Linear(config, width, inner_kv, ("embed", "kv_heads"), rngs=rngs)
    self.core = CORES[config.attention](config, rngs=rngs)
    self.out_proj = layers.Linear(config, inner, width, ("heads", "embed"), output=True, rngs=rngs)
    if config.attention in CANON_ATTENTIONS:
      self.canon_q = layers.DepthwiseFilter(config, config.canon_taps, inner, rngs=rngs)
      self.canon_k = layers.DepthwiseFilter(config, config.canon_taps, inner_kv, rngs=rngs)
      self.canon_v = layers.DepthwiseFilter(config, config.canon_taps, inner_kv, rngs=rngs)
    if config.memory.enabled:
      self.memory = Memory(config, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    config, (B, T, _) = self.config, x.shape
    q, gate = jnp.split(self.q(x).reshape(B, T, config.num_heads, 2 * config.head_dim), 2, axis=-1)
    q = layers.head_norm(q)
    k = layers.head_norm(self.k(x).reshape(B, T, config.num_kv_heads, config.head_dim))
    v = self.v(x).reshape(B, T, config.num_kv_heads, config.head_dim)
    if config.attention in CANON_ATTENTIONS:
      q, k, v = _canon(q, self.canon_q), _canon(k, self.canon_k), _canon(v, self.canon_v)
    heads, addend = self.core(q, k, v)
    out = self.out_proj((heads * jax.nn.sigmoid(gate)).reshape(B, T, -1))
    if addend is not None:
      out = out + addend
    if config.memory.enabled:
      out = out + self.memory(x, q, k, v)
    return out


def _canon(z: jax.Array, conv: layers.DepthwiseFilter) -> jax.Array:
  """``z + conv(z)`` over the flattened heads of z (B, T, heads, D)."""
  B, T, heads, dim = z.shape
  flat = z.reshape(B, T, heads * dim)
  return (flat + short_conv(flat, conv.weight[...])).reshape(B, T, heads, dim)

"""The kind ``raven``: a mixer that remembers in a fixed set of slots; a sparse router picks those that a token writes to.

Restated from goombalab/raven and the configuration in which the ATMA experiments used it (no convolution, swish feature map,
sigmoid router, Mamba2 decay). Left out: the Gumbel noise that their training adds to the router's logits.
"""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.config import ModelConfig
from atma_jax.models import layers, memory
from atma_jax.models.cache import LayerCache, Rings, TokenSpan
from atma_jax.models.mixers import Mixer, Trace, register_mixer
from atma_jax.ops.slot_memory.api import slot_memory

_STEP_SIZES = (1e-3, 1e-1)  # range of the initial step sizes, drawn log-uniformly, as in Mamba2
_DECAY_RATES = (1e-4, 16.0)
_ROUTE_FLOOR = 1e-9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RavenCache(LayerCache):
  """The cache of a Raven mixer: its slots, whatever the length, in float32 or wider, and the state of the gated-delta memory."""

  slot_keys: Float[Array, "B H slots D"]
  slot_values: Float[Array, "B H slots D"]
  memory: Float[Array, "B H D D"] | None = None


class Projection(nnx.Module):
  """``x @ kernel`` in the activation dtype, without a bias."""

  def __init__(self, config: ModelConfig, features_in: int, features_out: int, axes: tuple[str | None, str | None], *,
               output: bool = False, rngs: nnx.Rngs):
    self.dtype = layers.activation_dtype(config)
    self.kernel = layers.parameter(config, rngs, layers.weight_init(config, features_in, output=output),
                                   (features_in, features_out), axes, "muon")

  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... F"]:
    return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)


class HeadNorm(nnx.Module):
  """RMS norm of every head with one learned weight (D,)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.eps = config.norm_eps
    self.weight = layers.parameter(config, rngs, layers.ones, (config.head_dim,), ("vector",), "vector")

  def __call__(self, x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    wide = jnp.promote_types(jnp.float32, x.dtype)
    return (layers.unit_rms(x.astype(wide), self.eps) * self.weight[...].astype(wide)).astype(x.dtype)


@register_mixer("raven")
class RavenMixer(Mixer):
  """``W_o(norm(silu(o)))`` with o read from the slots, plus the output of the gated-delta memory if there is one."""

  accepts_padded_rows = True

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    width, heads = config.width, config.num_heads
    inner, inner_kv = heads * config.head_dim, config.num_kv_heads * config.head_dim
    self.q = Projection(config, width, inner, ("embed", "heads"), rngs=rngs)
    self.k = Projection(config, width, inner_kv, ("embed", "kv_heads"), rngs=rngs)
    self.v = Projection(config, width, inner_kv, ("embed", "kv_heads"), rngs=rngs)
    self.router = Projection(config, width, heads * config.raven.slots, ("embed", "heads"), rngs=rngs)
    self.step_size = Projection(config, width, heads, ("embed", None), rngs=rngs)
    self.log_rate = layers.parameter(config, rngs, _log_rates, (heads,), ("vector",), "vector")
    self.step_bias = layers.parameter(config, rngs, _step_biases, (heads,), ("vector",), "vector")
    self.q_norm, self.k_norm, self.o_norm = (HeadNorm(config, rngs=rngs) for _ in range(3))
    self.out_proj = Projection(config, inner, width, ("heads", "embed"), output=True, rngs=rngs)
    if config.memory.enabled:
      self.memory = memory.Memory(config, rngs=rngs)

  def __call__(self, x: Float[Array, "B T C"], cache: RavenCache | None = None, span: TokenSpan | None = None,
               trace: Trace | None = None) -> tuple[Float[Array, "B T C"], RavenCache | None]:
    """See `Mixer`.

    A trace receives q (B, T, H, D), k and v (B, T, K, D), and ``log_decay`` (B, T, H, slots); of the memory see `Memory.read`.
    """
    x = x if span is None else x[: span.rows]
    config, (B, T, _) = self.config, x.shape
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q = self.q_norm(jax.nn.silu(self.q(x)).reshape(B, T, heads, dim))
    k = self.k_norm(jax.nn.silu(self.k(x)).reshape(B, T, kv_heads, dim))
    v = jax.nn.silu(self.v(x)).reshape(B, T, kv_heads, dim)
    log_decay = self._log_decay(x)
    if span is not None:
      log_decay = jnp.where(span.real(T)[..., None, None], log_decay, 0)  # padding leaves the slots alone
    if trace is not None:
      trace |= {"q": q, "k": k, "v": v, "log_decay": log_decay}
    past = None if cache is None else (cache.slot_keys, cache.slot_values)
    out, slots = slot_memory(q, jnp.repeat(k, heads // kv_heads, axis=2), jnp.repeat(v, heads // kv_heads, axis=2),
                             log_decay=log_decay, scale=1 / math.sqrt(dim), initial_state=past,
                             implementation=config.implementation)
    out, state = self.out_proj(self.o_norm(jax.nn.silu(out)).reshape(B, T, -1)), None
    if self.memory is not None:
      read, state = self.memory(x, q, k, v, None if cache is None else cache.memory, span, trace)
      out = out + read
    return out, None if cache is None else RavenCache(*slots, state)

  def _log_decay(self, x: Float[Array, "B T C"]) -> Float[Array, "B T H slots"]:
    """The head's decay times the routing weight, which is zero but for the best `top_k` slots; in float32 or wider."""
    config, wide = self.config, jnp.promote_types(jnp.float32, x.dtype)
    scores = jax.nn.sigmoid(self.router(x).astype(wide)).reshape(*x.shape[:2], config.num_heads, config.raven.slots)
    best, index = jax.lax.top_k(scores, config.raven.top_k)
    best = best / (jnp.sum(best, axis=-1, keepdims=True) + _ROUTE_FLOOR)
    route = jnp.sum(jax.nn.one_hot(index, config.raven.slots, dtype=wide) * best[..., None], axis=-2)
    step = jax.nn.softplus(self.step_size(x).astype(wide) + self.step_bias[...].astype(wide))
    return -(jnp.exp(self.log_rate[...].astype(wide)) * step)[..., None] * route

  @classmethod
  def init_cache(cls, config: ModelConfig, batch: int, rings: Rings) -> RavenCache:
    """See `Mixer`."""
    del rings
    wide = jnp.promote_types(jnp.float32, layers.activation_dtype(config))
    keys, values = (jnp.zeros((batch, config.num_heads, config.raven.slots, config.head_dim), wide) for _ in range(2))
    return RavenCache(keys, values, memory.init_state(config, batch))

  @classmethod
  def operations(cls, config: ModelConfig, sequence_length: int) -> float:
    """Decay and write of keys and values, scores and read, 10 H D a slot; and the memory."""
    del sequence_length
    return 10 * config.raven.slots * config.num_heads * config.head_dim + memory.operations(config)


def _log_rates(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  return jnp.log(jax.random.uniform(key, shape, dtype, *_DECAY_RATES))


def _step_biases(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """The inverse of softplus at a step size drawn log-uniformly."""
  low, high = map(math.log, _STEP_SIZES)
  size = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  return size + jnp.log(-jnp.expm1(-size))

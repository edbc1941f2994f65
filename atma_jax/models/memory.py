"""Gated-delta memory: the recurrent channel of a global mixer."""

from __future__ import annotations

import math

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import Span, counted
from atma_jax.models.parallel import gated_delta
from atma_jax.ops.core.dispatch import fitting_implementation
from atma_jax.ops.gated_delta.step import gated_delta_step


class LogGammaCap(nnx.Variable):
  """Largest log-decay of each head (H,), 0 for no cap. A module has one only where one was set; it is no parameter."""


class Memory(nnx.Module):
  """Reads ``r`` from a per-head matrix state and returns ``W_o(rms_norm(r) * sigmoid(W_gate x))``.

  Decay and write gates come from the block's normed input x (B, T, C); q, k, v are those of the attention core.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    heads, inner = config.num_heads, config.num_heads * config.head_dim
    self.gamma = layers.Linear(config, config.width, heads, ("embed", None), rngs=rngs)
    self.beta = layers.Linear(config, config.width, heads, ("embed", None), rngs=rngs)
    self.gate = layers.Linear(config, config.width, inner, ("embed", "heads"), rngs=rngs)
    self.out_proj = layers.Linear(config, inner, config.width, ("heads", "embed"), output=True, rngs=rngs)

  def __call__(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array | None = None,
               span: Span | None = None, trace: dict[str, jax.Array] | None = None) -> tuple[jax.Array, jax.Array]:
    """x (B, T, C); q (B, T, H, D); k, v (B, T, K, D); state (B, H, D, D) -> (B, T, C) and the state after.

    A `trace` receives ``log_gamma`` and ``beta`` (B, T, H), the ``readout`` before its norm (B, T, H, D) and ``memory``, the
    state after the last token (B, H, D, D).
    """
    read, state = self.read(self.gamma(x), self.beta(x), self.gate(x), q, k, v, state, span, trace)
    return self.out_proj(read), state

  def read(self, gamma: jax.Array, beta: jax.Array, gate: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array,
           state: jax.Array | None, span: Span | None, trace: dict[str, jax.Array] | None,
           layer: int | None = None) -> tuple[jax.Array, jax.Array]:
    """What `out_proj` takes, (B, T, H D), and the state after, from what `gamma`, `beta` (B, T, H) and `gate` (B, T, H D) give.

    With a `layer`, T is 1 and the state that of several layers, (layers, B, H, D, D), before and after.
    """
    config, wide, shape = self.config, jnp.promote_types(jnp.float32, gate.dtype), q.shape[:2]
    q, k = layers.unit_length(q), layers.unit_length(k)
    log_gamma = self.log_gamma(gamma)
    beta = jax.nn.sigmoid(beta.astype(wide) + config.memory.beta_bias)
    if span is not None:
      real = counted(shape, span)[..., None]
      log_gamma, beta = jnp.where(real, log_gamma, 0), jnp.where(real, beta, 0)  # padding leaves the state alone
    if span is not None and shape[1] == 1:
      readout, state = gated_delta_step(q, k, v, log_gamma=log_gamma, beta=beta, state=state, layer=layer,
                                        implementation=fitting_implementation(config.implementation))
    else:
      readout, state = gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state,
                                   implementation=config.implementation)
    if trace is not None:
      trace |= {"log_gamma": log_gamma, "beta": beta, "readout": readout, "memory": state}
    return layers.head_norm(readout).reshape(gate.shape) * jax.nn.sigmoid(gate), state

  def log_gamma(self, gate: jax.Array) -> jax.Array:
    """Log-decay of the decay gate's output (..., H), in float32 or wider.

    As published, ``gamma = sigmoid(z)`` with ``z = gate + gamma_bias``. With `max_half_life` h, ``gamma = 2^(-1/h) sigmoid(z)``:
    decay rates add, so that half-lives combine as ``1/t = 1/t_published + 1/h`` and none exceeds h. It is smooth and
    monotone in z, its log has the gradient of the published form everywhere, and for t_published << h (34 tokens at the
    start) it is the published form; near the bound z no longer matters, so nothing drives it on. Ours: the paper bounds
    nothing in training. An inference-time cap (`models.retention`) bounds it from above on top of that.
    """
    memory, wide = self.config.memory, jnp.promote_types(jnp.float32, gate.dtype)
    log_gamma = jax.nn.log_sigmoid(gate.astype(wide) + memory.gamma_bias)
    if memory.max_half_life is not None:
      log_gamma = log_gamma - math.log(2) / memory.max_half_life
    if hasattr(self, "cap"):
      log_gamma = jnp.minimum(log_gamma, self.cap[...])
    return log_gamma

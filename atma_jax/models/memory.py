"""Gated-delta memory: the recurrent channel beside attention."""

from __future__ import annotations

from collections.abc import Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import TokenSpan
from atma_jax.models.mixers import Trace
from atma_jax.models.parallel import gated_delta
from atma_jax.ops.gated_delta.step import gated_delta_step

FORGETS = -40.0  # log-decay that leaves nothing, exp(-40) = 4e-18; not less, because ops add up the log-decays of a chunk


class LogGammaCap(nnx.Variable):
  """Largest log-decay of each head (H,), 0 for no cap. A memory has one only where one was set; it is no parameter."""


class Memory(nnx.Module):
  """Reads ``r`` from a matrix state per head and returns ``W_o(rms_norm(r) * sigmoid(W_gate x))``.

  The gates for decay, write and output are projections of the block's normed input x (B, T, C); q, k, v are those of the mixer.
  """

  cap: LogGammaCap | None = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    heads, inner = config.num_heads, config.num_heads * config.head_dim
    self.gamma = layers.Linear(config, config.width, heads, ("embed", None), rngs=rngs)
    self.beta = layers.Linear(config, config.width, heads, ("embed", None), rngs=rngs)
    self.gate = layers.Linear(config, config.width, inner, ("embed", "heads"), rngs=rngs)
    self.out_proj = layers.Linear(config, inner, config.width, ("heads", "embed"), output=True, rngs=rngs)

  def __call__(self, x: Float[Array, "B T C"], q: Float[Array, "B T H D"], k: Float[Array, "B T K D"],
               v: Float[Array, "B T K D"], state: Float[Array, "B H D D"] | None = None, span: TokenSpan | None = None,
               trace: Trace | None = None) -> tuple[Float[Array, "B T C"], Float[Array, "B H D D"]]:
    """The output and the state after x; arguments as for `read`."""
    read, state = self.read((self.gamma(x), self.beta(x), self.gate(x)), q, k, v, state, span, trace)
    return self.out_proj(read), state

  def read(self, gates: Sequence[Array], q: Float[Array, "B T H D"], k: Float[Array, "B T K D"],
           v: Float[Array, "B T K D"], state: Array | None, span: TokenSpan | None, trace: Trace | None,
           layer: int | None = None, starts: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T H*D"], Array]:
    """What `out_proj` takes, and the state after the tokens.

    Args:
      gates: the outputs of `gamma` and `beta` (B, T, H) and of `gate` (B, T, H D).
      q, k, v: of the mixer, before any rotation.
      state: (B, H, D, D) before the tokens; None is zeros.
      span: where the tokens stand, with a cache.
      trace: receives ``log_gamma`` and ``beta`` (B, T, H), the ``readout`` before its norm (B, T, H, D) and ``memory``, the state
        after the last token (B, H, D, D).
      layer: which to read and write where the state is that of several layers, (layers, B, H, D, D); T is then 1.
      starts: of the documents in whole sequences, see `Mixer`; the state is zero where one starts.
    """
    gamma, beta, gate = gates
    config, wide, (B, T) = self.config, jnp.promote_types(jnp.float32, gate.dtype), q.shape[:2]
    q, k = layers.unit_length(q), layers.unit_length(k)
    log_gamma = self.log_gamma(gamma)
    if config.memory_reset is not None:
      positions = jnp.arange(T) if span is None else span.lengths[:, None] + jnp.arange(T)
      positions = positions if starts is None else positions - starts
      log_gamma = jnp.where((positions % config.memory_reset == 0)[..., None], FORGETS, log_gamma)
    beta = jax.nn.sigmoid(beta.astype(wide) + config.memory.beta_bias)
    if span is not None:
      real = span.real(T)[..., None]
      log_gamma, beta = jnp.where(real, log_gamma, 0), jnp.where(real, beta, 0)  # padding leaves the state alone
    if span is not None and state is not None and T == 1:
      readout, state = gated_delta_step(q, k, v, log_gamma=log_gamma, beta=beta, state=state, layer=layer,
                                        implementation=config.implementation)
    else:
      readout, state = gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state, starts=starts,
                                   implementation=config.implementation)
    if trace is not None:
      trace |= {"log_gamma": log_gamma, "beta": beta, "readout": readout, "memory": state}
    if config.memory_off:
      readout = jnp.zeros_like(readout)
    return layers.head_norm(readout).reshape(B, T, -1) * jax.nn.sigmoid(gate), state

  def log_gamma(self, gate: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Log-decay for the output of the decay gate, in float32 or wider.

    As published, ``gamma = sigmoid(z)`` with ``z = gate + gamma_bias``. With `max_half_life` h, ``gamma = 2^(-1/h) sigmoid(z)``:
    decay rates add, so that half-lives combine as ``1/t = 1/t_published + 1/h`` and none exceeds h. This is smooth and
    monotone in z, its log has the gradient of the published form everywhere, and for t_published << h (34 tokens at the
    start) it is the published form; near the bound z no longer matters, so nothing drives it further. Ours: the paper bounds
    nothing in training. A cap at inference (`atma_jax.models.retention_cap`) bounds the result from above on top of that.
    """
    memory, wide = self.config.memory, jnp.promote_types(jnp.float32, gate.dtype)
    log_gamma = jax.nn.log_sigmoid(gate.astype(wide) + memory.gamma_bias)
    if memory.max_half_life is not None:
      log_gamma = log_gamma - math.log(2) / memory.max_half_life
    return log_gamma if self.cap is None else jnp.minimum(log_gamma, self.cap[...])


def init_state(config: ModelConfig, batch: int) -> Float[Array, "B H D D"] | None:
  """The state of a memory before the first token, in float32 or wider; None for a model without memory."""
  if not config.memory.enabled:
    return None
  wide = jnp.promote_types(jnp.float32, layers.activation_dtype(config))
  return jnp.zeros((batch, config.num_heads, config.head_dim, config.head_dim), wide)


def operations(config: ModelConfig) -> float:
  """Operations a token besides the projections: decay, erase, write and read of a D x D state per head, 8 H D^2. That is the
  recurrence, whatever the chunk."""
  return 8 * config.num_heads * config.head_dim**2 if config.memory.enabled else 0

"""Global mixer: projections, an attention core (polar, nope or rope) and the optional memory."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.cache import GlobalPast, Span, convolve
from atma_jax.models.memory import Memory
from atma_jax.models.parallel import polar_attention, softmax_attention
from atma_jax.ops import rotary_embedding
from atma_jax.ops.core.dispatch import fitting_implementation
from atma_jax.ops.distractors import polar_distractor_loss, softmax_distractor_loss
from atma_jax.ops.polar_attention.cached.api import cached_polar_attention, cached_softmax_attention
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams
from atma_jax.sharding import shard_count

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

  def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array,
               trace: dict[str, jax.Array] | None = None) -> tuple[jax.Array, jax.Array]:
    """q (B, T, H, D); k, v (B, T, K, D) -> heads (B, T, H, D) of length direction_scale, and magnitudes (B, T, H)."""
    direction, magnitude = polar_attention(q, k, v, **self.parameters(), implementation=self.config.implementation)
    heads = direction * self.config.direction_scale
    if trace is not None:
      trace |= {"heads": heads, "magnitude": magnitude}
    return heads, magnitude

  def extend(self, q: jax.Array, k: jax.Array, v: jax.Array, past: GlobalPast, span: Span,
             reach: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same after `past`, and the keys to remember."""
    if reach == 0:
      return *self(q, k, v), k
    direction, magnitude = cached_polar_attention(q, k, v, past.keys, past.values, span.lengths, **self.parameters(),
                                                  scales=past.scales, reach=reach, layer=past.layer, table=span.table,
                                                  implementation=fitting_implementation(self.config.implementation))
    return direction * self.config.direction_scale, magnitude, k

  def distractor_loss(self, trace: dict[str, jax.Array], keys: jax.Array, values: jax.Array) -> jax.Array:
    """Mean softmax mass that random keys (R, K, D) take from the null."""
    del values
    T, D = trace["q"].shape[1], self.config.head_dim
    raw = self.parameters()
    attention = AttentionSpec(*(raw.pop(name) for name in ("window", "null_length", "count_length")))
    temperature, null, _ = formula.of_positions(PolarParams(**raw), formula.last_positions(T, T), attention)
    return polar_distractor_loss(trace["q"], keys, temperature / math.sqrt(D), null)

  def parameters(self) -> dict[str, Any]:
    """Keyword arguments of `polar_attention` and `polar_statistics`."""
    return {"v_null": self.v_null[...], "null_base": self.null_base[...], "null_slope": self.null_slope[...],
            "len_gain": self.len_gain[...], "mag_beta": self.mag_beta[...], "window": self.config.window,
            "null_length": self.config.null_length, "count_length": self.config.count_length}


class SoftmaxCore(nnx.Module):
  """The matched baselines: plain softmax attention, with (rope) or without (nope) rotary positions."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    del rngs
    self.config = config

  def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array,
               trace: dict[str, jax.Array] | None = None) -> tuple[jax.Array, None]:
    """q (B, T, H, D); k, v (B, T, K, D) -> heads (B, T, H, D) and no magnitudes."""
    q, k, scale = self._positioned(q, k, jnp.arange(q.shape[1]))
    heads = softmax_attention(q, k, v, scale=scale, window=self.config.window)
    if trace is not None:
      trace |= {"heads": heads}
    return heads, None

  def extend(self, q: jax.Array, k: jax.Array, v: jax.Array, past: GlobalPast, span: Span,
             reach: int | None) -> tuple[jax.Array, None, jax.Array]:
    """The same after `past`, and the keys to remember."""
    q, k, scale = self._positioned(q, k, span.lengths[:, None] + jnp.arange(q.shape[1]))
    if reach == 0:
      return softmax_attention(q, k, v, scale=scale, window=self.config.window), None, k
    heads = cached_softmax_attention(q, k, v, past.keys, past.values, span.lengths, scale=scale, window=self.config.window,
                                     scales=past.scales, reach=reach, layer=past.layer, table=span.table,
                                     implementation=fitting_implementation(self.config.implementation))
    return heads, None, k

  def distractor_loss(self, trace: dict[str, jax.Array], keys: jax.Array, values: jax.Array) -> jax.Array:
    """Mean squared change of the heads when random keys and values (R, K, D), which have no position, are added."""
    q, k, scale = self._positioned(trace["q"], trace["k"], jnp.arange(trace["q"].shape[1]))
    return softmax_distractor_loss(q, k, trace["v"], keys, values, scale=scale, window=self.config.window)

  def _positioned(self, q: jax.Array, k: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, float]:
    """Queries and keys, rotated to their positions for rope, and the scale of their products."""
    if self.config.attention == "rope":
      return rotary_embedding(q, positions), rotary_embedding(k, positions), ROPE_SCALE
    return q, k, 1 / math.sqrt(self.config.head_dim)


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
    if config.init == "mimetic":
      self._start_as_induction_heads()

  def _start_as_induction_heads(self) -> None:
    """Sets queries and keys so that every head starts by looking for what followed the current token before.

    The queries of a group start as copies of their key, and the canon convolution of the keys starts as a shift by one
    token: a token matches those whose predecessor resembles it. Training decides what becomes of it. After "Mimetic
    Initialization Helps State Space Models Learn to Recall" (arXiv 2410.11135), which does so for the products of
    queries and keys and for the convolution of state-space layers.
    """
    config = self.config
    width, heads, groups, dim = config.width, config.num_heads, config.num_kv_heads, config.head_dim
    queries = self.q.kernel[...].reshape(width, heads, 2 * dim)
    keys = jnp.repeat(self.k.kernel[...].reshape(width, groups, dim), heads // groups, axis=1)
    self.q.kernel[...] = queries.at[..., :dim].set(keys).reshape(width, -1)
    if config.attention in CANON_ATTENTIONS:
      # z + conv(z) with -1 on the current token and +1 on the one before is the one before.
      self.canon_q.weight[...] = jnp.zeros_like(self.canon_q.weight[...])
      self.canon_k.weight[...] = jnp.zeros_like(self.canon_k.weight[...]).at[-1].set(-1.0).at[-2].set(1.0)

  def __call__(self, x: jax.Array, trace: dict[str, jax.Array] | None = None) -> jax.Array:
    return self.extend(x, GlobalPast(), None, trace=trace)[0]

  def summands(self, x: jax.Array, trace: dict[str, jax.Array] | None = None) -> tuple[list[jax.Array], jax.Array]:
    """What the output is the sum of: products (B, T, C) and a bias (C,)."""
    found, _ = self._found(x, GlobalPast(), None, None, trace)
    products, biases = zip(*(part.unbiased(y, 1) for part, y in zip(self._outputs(), found, strict=True)))
    return [y for y, in products], sum(bias[0] for bias in biases)

  def extend(self, x: jax.Array, past: GlobalPast, span: Span | None,
             reach: int | None = None, trace: dict[str, jax.Array] | None = None) -> tuple[jax.Array, GlobalPast]:
    """The output for tokens that follow `past`, and the update of the past; of rows as for `LocalMixer`.

    A `trace` receives q (B, T, H, D), k and v (B, T, K, D) as the core takes them before any rotation, the core's ``heads``
    (B, T, H, D) and, for polar attention, ``magnitude`` (B, T, H); of the memory see `Memory`.
    """
    found, past = self._found(x, past, span, reach, trace)
    if hasattr(self, "outputs"):
      return self.outputs(layers.fill(jnp.concatenate([y.astype(found[0].dtype) for y in found], axis=-1), x.shape[0])), past
    return sum(part(layers.fill(y, x.shape[0])) for part, y in zip(self._outputs(), found, strict=True)), past

  def _found(self, x: jax.Array, past: GlobalPast, span: Span | None, reach: int | None,
             trace: dict[str, jax.Array] | None) -> tuple[list[jax.Array], GlobalPast]:
    """What each of `_outputs` takes, and the update of the past."""
    config, (B, T) = self.config, (x.shape[0] if span is None else span.rows, x.shape[1])
    q, gate, k, v, *gates = (part[:B] for part in self._projected(x))
    q, gate = (z.reshape(B, T, config.num_heads, config.head_dim) for z in (q, gate))
    q = layers.head_norm(q)
    k = layers.head_norm(k.reshape(B, T, config.num_kv_heads, config.head_dim))
    v = v.reshape(B, T, config.num_kv_heads, config.head_dim)
    histories, state = (None, None, None), None
    if config.attention in CANON_ATTENTIONS:
      q, canon_q = _canon(q, self.canon_q, past.canon_q, span, "heads")
      k, canon_k = _canon(k, self.canon_k, past.canon_k, span, "kv_heads")
      v, canon_v = _canon(v, self.canon_v, past.canon_v, span, "kv_heads")
      histories = canon_q, canon_k, canon_v
    if trace is not None:
      trace |= {"q": q, "k": k, "v": v}
    if span is None:
      heads, magnitude = self.core(q, k, v, trace)
    else:
      heads, magnitude, keys = self.core.extend(q, k, v, past, span, reach)
    found = [(heads * jax.nn.sigmoid(gate)).reshape(B, T, -1)]
    if magnitude is not None:
      found.append(magnitude)
    if config.memory.enabled:
      read, state = self.memory.read(*gates, q, k, v, past.memory, span, trace, past.layer)
      found.append(read)
    if span is None:
      return found, past
    return found, GlobalPast(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(v, 1, 2), *histories, state)

  def join(self) -> None:
    """Makes one matrix of those that take the same input, and one of those whose outputs are added."""
    self.inputs, self.outputs = layers.Linear.beside(self._projections()), layers.Linear.summed(self._outputs())

  def _projections(self) -> list[layers.Linear]:
    memory = [self.memory.gamma, self.memory.beta, self.memory.gate] if self.config.memory.enabled else []
    return [self.q, self.k, self.v, *memory]

  def _projected(self, x: jax.Array) -> list[jax.Array]:
    """Queries and their gates (B, T, H D), keys and values (B, T, K D), and what the memory's gates are made of."""
    first, *others = self._projections()
    heads, shape = self.config.num_heads, x.shape[:-1]
    if not hasattr(self, "inputs"):
      split = first.split(x, 2, groups=heads)
      if shard_count("heads") > 1:  # each has its own piece of every matrix, not of two side by side
        return [*split, *(part(x) for part in others)]
      # Products of few outputs in pairs: each gradient with respect to x is as large as x, and all are stored and added up.
      pairs = others[:2], others[2:4], others[4:]
      return [*split, *(piece for some in pairs if some for piece in _pieces(layers.Linear.beside(some)(x), some))]
    q, *rest = _pieces(self.inputs(x), (first, *others))
    return [*(z.reshape(*shape, -1) for z in jnp.split(q.reshape(*shape, heads, -1), 2, axis=-1)), *rest]

  def _outputs(self) -> list[layers.Linear]:
    magnitude = [self.core.mu_proj] if isinstance(self.core, PolarCore) else []
    return [self.out_proj, *magnitude, *([self.memory.out_proj] if self.config.memory.enabled else [])]

  def distractor_loss(self, trace: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """The core's loss for keys and values of random inputs (R, C), normed as keys are, without canon convolutions."""
    shape = (inputs.shape[0], self.config.num_kv_heads, self.config.head_dim)
    return self.core.distractor_loss(trace, layers.head_norm(self.k(inputs).reshape(shape)), self.v(inputs).reshape(shape))


def _pieces(y: jax.Array, parts: Sequence[layers.Linear]) -> list[jax.Array]:
  """What each of `parts` gave of the output of `Linear.beside` them."""
  ends = list(itertools.accumulate(part.bias.shape[0] for part in parts))
  return jnp.split(y, ends[:-1], axis=-1)


def _canon(z: jax.Array, conv: layers.DepthwiseFilter, history: jax.Array | None,
           span: Span | None, channels: str) -> tuple[jax.Array, jax.Array | None]:
  """``z + conv(z)`` over the flattened heads of z (B, T, heads, D), and the history after z; `channels` as for `convolve`."""
  B, T, heads, dim = z.shape
  flat = z.reshape(B, T, heads * dim)
  y, history = convolve(flat, conv.weight[...], history, span, channels)
  return (flat + y).reshape(B, T, heads, dim), history

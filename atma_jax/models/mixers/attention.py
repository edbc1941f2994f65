"""The kind ``global``: attention over the whole context (polar, nope or rope), with an optional gated-delta memory beside it."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.config import ModelConfig
from atma_jax.models import layers, memory
from atma_jax.models.cache import LayerCache, Rings, TokenSpan
from atma_jax.models.mixers import Mixer, Trace, register_mixer
from atma_jax.models.parallel import polar_attention, softmax_attention
from atma_jax.ops import rotary_embedding
from atma_jax.ops.core import visibility
from atma_jax.ops.distractors import polar_distractor_loss, softmax_distractor_loss
from atma_jax.ops.polar_attention.cached.api import append, cached_polar_attention, cached_softmax_attention, quantise
from atma_jax.ops.polar_attention.formula import last_positions, of_positions
from atma_jax.ops.polar_attention.spec import SCALARS, AttentionSpec, PolarParams
from atma_jax.sharding import shard_count

ROPE_SCALE = 0.12
KeysAndValues = tuple[Float[Array, "B S K D"], Float[Array, "B S K D"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache(LayerCache):
  """The cache of an attention mixer. In an update, keys and values are those of the T new tokens, (B, K, T, D).

  Attributes:
    keys: position p in slot ``p % R``, for rope rotated to its position; (P, K, R / N, D) in a paged cache.
    values: likewise.
    canon_q: inputs of the canon convolution of the queries; none for rope.
    canon_k: of the keys.
    canon_v: of the values.
    memory: the state of the gated-delta memory, in float32 or wider; none without memory.
    key_scale: what int8 keys are to be multiplied by, (P, K, R / N) in a paged cache; none for other dtypes, none in an update.
    value_scale: likewise.
    layer: in unrolled decoding, which of the stacked keys, values, scales and memories is meant; these stay stacked then.
  """

  rings: ClassVar[tuple[str, ...]] = ("keys", "values", "key_scale", "value_scale")

  keys: Float[Array, "B K R D"]
  values: Float[Array, "B K R D"]
  canon_q: Float[Array, "B taps-1 H*D"] | None = None
  canon_k: Float[Array, "B taps-1 K*D"] | None = None
  canon_v: Float[Array, "B taps-1 K*D"] | None = None
  memory: Float[Array, "B H D D"] | None = None
  key_scale: Float[Array, "B K R"] | None = None
  value_scale: Float[Array, "B K R"] | None = None
  layer: int | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def slots(self) -> int:
    """R, or the slots of a page."""
    return self.keys.shape[-2]

  @property
  def scales(self) -> tuple[Array, Array] | None:
    """The scales of keys and of values, where both are int8."""
    return None if self.key_scale is None or self.value_scale is None else (self.key_scale, self.value_scale)

  def append(self, update: AttentionCache, span: TokenSpan) -> AttentionCache:
    """Writes the new keys and values; padding is not written, and of more new tokens than slots only the last."""
    def write(ring: jax.Array, new: jax.Array) -> jax.Array:
      return append(ring, new, span.lengths, span.counts, span.table, span.implementation)

    new = {"keys": update.keys, "values": update.values}
    if self.key_scale is not None:
      (new["keys"], new["key_scale"]), (new["values"], new["value_scale"]) = map(quantise, new.values())
    return dataclasses.replace(update, **{name: write(getattr(self, name), x) for name, x in new.items()})

  def select(self, repetition: int) -> AttentionCache:
    """As for every cache, but what is large stays stacked: kernels read and update it where it lies."""
    canon = {name: x if (x := getattr(self, name)) is None else x[repetition] for name in ("canon_q", "canon_k", "canon_v")}
    return dataclasses.replace(self, **canon, layer=repetition)

  def carry(self, update: AttentionCache) -> AttentionCache:
    """Takes over the stacked memories, one of which a layer has updated."""
    return dataclasses.replace(self, memory=update.memory)

  def stack_updates(self, updates: Sequence[AttentionCache]) -> AttentionCache:
    """As for every cache; the last update holds the memories of all layers."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(dataclasses.replace(update, memory=None) for update in updates))
    return dataclasses.replace(stacked, memory=updates[-1].memory)


def attention_spec(config: ModelConfig) -> AttentionSpec:
  """Which keys the queries of a model see, and how they count them."""
  return AttentionSpec(window=config.window, null_length=config.null_length, count_length=config.count_length)


class PolarCore(nnx.Module):
  """Polar attention (arXiv 2606.25156, section "Polar Attention"): direction and magnitude, each with a projection of its own."""

  has_canon: ClassVar[bool] = True
  """Whether queries, keys and values pass through a canon convolution first."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    heads, dim = config.num_heads, config.head_dim
    for scalar in SCALARS:
      setattr(self, scalar.name, layers.parameter(config, rngs, layers.constant(scalar.initial), (heads,), ("vector",), "vector"))
    self.v_null = layers.parameter(config, rngs, layers.zeros, (heads, dim), (None, None), "muon_out_in")
    self.mu_proj = layers.Linear(config, heads, config.width, (None, "embed"), output=True, rngs=rngs)

  @property
  def params(self) -> PolarParams:
    """The parameters of `polar_attention`."""
    return PolarParams(**{field.name: getattr(self, field.name)[...] for field in dataclasses.fields(PolarParams)})

  @property
  def spec(self) -> AttentionSpec:
    """Which keys a query sees, and how they are counted."""
    return attention_spec(self.config)

  @property
  def magnitude_projections(self) -> list[layers.Linear]:
    """The layers that take magnitudes: one."""
    return [self.mu_proj]

  def __call__(self, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"],
               cache: AttentionCache | None, span: TokenSpan | None, trace: Trace | None,
               foreign: KeysAndValues | None = None, starts: Int[Array, "B T"] | None = None
               ) -> tuple[Float[Array, "B T H D"], list[Float[Array, "B T H"]], Float[Array, "B T K D"]]:
    """Heads of length direction_scale, their magnitudes as a list of one, and the keys to remember."""
    config = self.config
    if cache is None or span is None or span.cache_slots == 0:
      seen = (k, v) if foreign is None else _concatenate(foreign, (k, v))
      direction, magnitude = polar_attention(q, *seen, self.params, self.spec, starts=starts,
                                             implementation=config.implementation)
    else:
      direction, magnitude = cached_polar_attention(
        q, k, v, cache.keys, cache.values, span.lengths, self.params, self.spec, scales=cache.scales,
        cache_slots=span.cache_slots, layer=cache.layer, table=span.table,
        implementation=config.implementation)
    heads = direction * config.direction_scale
    if trace is not None:
      trace |= {"heads": heads, "magnitude": magnitude}
    return heads, [magnitude], k

  def distractor_loss(self, trace: Trace, keys: Float[Array, "R K D"], values: Float[Array, "R K D"]) -> Float[Array, ""]:
    """Mean softmax mass that random keys take from the null."""
    del values
    T, D = trace["q"].shape[1], self.config.head_dim
    temperature, null, _ = of_positions(self.params, last_positions(T, T), self.spec)
    return polar_distractor_loss(trace["q"], keys, temperature / math.sqrt(D), null)


class SoftmaxCore(nnx.Module):
  """The matched baseline "nope": softmax attention without positions."""

  has_canon: ClassVar[bool] = True

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    del rngs
    self.config = config

  @property
  def magnitude_projections(self) -> list[layers.Linear]:
    """None: there are no magnitudes."""
    return []

  def __call__(self, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"],
               cache: AttentionCache | None, span: TokenSpan | None, trace: Trace | None,
               foreign: KeysAndValues | None = None, starts: Int[Array, "B T"] | None = None
               ) -> tuple[Float[Array, "B T H D"], list[Float[Array, "B T H"]], Float[Array, "B T K D"]]:
    """Heads, no magnitudes, and the keys to remember.

    Positions count on through all documents of a row: only their differences matter.
    """
    config, spec, steps = self.config, attention_spec(self.config), jnp.arange(q.shape[1])
    before = 0 if foreign is None else foreign[0].shape[1]
    q, k, scale = self.positioned(q, k, before + steps if span is None else span.lengths[:, None] + steps)
    if cache is None or span is None or span.cache_slots == 0:
      seen = k, v
      if foreign is not None:
        _, foreign_k, _ = self.positioned(foreign[0], foreign[0], jnp.arange(before))
        seen = _concatenate((foreign_k, foreign[1]), seen)
      heads = softmax_attention(q, *seen, scale=scale, spec=spec, starts=starts, implementation=config.implementation)
    else:
      heads = cached_softmax_attention(
        q, k, v, cache.keys, cache.values, span.lengths, scale=scale, spec=spec, scales=cache.scales,
        cache_slots=span.cache_slots, layer=cache.layer, table=span.table,
        implementation=config.implementation)
    if trace is not None:
      trace |= {"heads": heads}
    return heads, [], k

  def distractor_loss(self, trace: Trace, keys: Float[Array, "R K D"], values: Float[Array, "R K D"]) -> Float[Array, ""]:
    """Mean squared change of the heads when random keys and values, which have no position, are added."""
    q, k, scale = self.positioned(trace["q"], trace["k"], jnp.arange(trace["q"].shape[1]))
    return softmax_distractor_loss(q, k, trace["v"], keys, values, scale=scale, window=self.config.window)

  def positioned(self, q: Array, k: Array, positions: Array) -> tuple[Array, Array, float]:
    """Queries and keys as they meet at `positions` (T,) or (B, T), and the scale of their products."""
    del positions
    return q, k, 1 / math.sqrt(self.config.head_dim)


class RotaryCore(SoftmaxCore):
  """The matched baseline "rope": softmax attention with rotary positions, without canon convolutions."""

  has_canon = False

  def positioned(self, q: Array, k: Array, positions: Array) -> tuple[Array, Array, float]:
    """See `SoftmaxCore`; rotated."""
    return rotary_embedding(q, positions), rotary_embedding(k, positions), ROPE_SCALE


CORES = {"polar": PolarCore, "nope": SoftmaxCore, "rope": RotaryCore}


@register_mixer("global")
class AttentionMixer(Mixer):
  """``W_proj(core(q, k, v) * sigmoid(gate))``, plus the magnitudes' projection and the memory's output."""

  accepts_padded_rows = True
  accepts_documents = True
  fused_inputs: layers.Linear | None = None  # all layers that take x as one, see `fuse_projections`
  fused_outputs: layers.Linear | None = None  # all layers that give the output

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    width, inner, inner_kv = config.width, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    self.q = layers.Linear(config, width, 2 * inner, ("embed", "heads"), rngs=rngs)
    self.k = layers.Linear(config, width, inner_kv, ("embed", "kv_heads"), rngs=rngs)
    self.v = layers.Linear(config, width, inner_kv, ("embed", "kv_heads"), rngs=rngs)
    self.core = CORES[config.attention](config, rngs=rngs)
    self.out_proj = layers.Linear(config, inner, width, ("heads", "embed"), output=True, rngs=rngs)
    if self.core.has_canon:
      self.canon_q = layers.DepthwiseFilter(config, config.canon_taps, inner, rngs=rngs)
      self.canon_k = layers.DepthwiseFilter(config, config.canon_taps, inner_kv, rngs=rngs)
      self.canon_v = layers.DepthwiseFilter(config, config.canon_taps, inner_kv, rngs=rngs)
    if config.memory.enabled:
      self.memory = memory.Memory(config, rngs=rngs)
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
    if self.core.has_canon:
      # z + conv(z) with -1 on the current token and +1 on the one before is the one before.
      self.canon_q.weight[...] = jnp.zeros_like(self.canon_q.weight[...])
      self.canon_k.weight[...] = jnp.zeros_like(self.canon_k.weight[...]).at[-1].set(-1.0).at[-2].set(1.0)

  def __call__(self, x: Float[Array, "B T C"], cache: AttentionCache | None = None, span: TokenSpan | None = None,
               trace: Trace | None = None,
               starts: Int[Array, "B T"] | None = None) -> tuple[layers.LinearSum, AttentionCache | None]:
    """See `Mixer`.

    A trace receives q (B, T, H, D), k and v (B, T, K, D) as the core takes them before any rotation, the core's ``heads``
    (B, T, H, D) and, for polar attention, ``magnitude`` (B, T, H); of the memory see `Memory.read`.
    """
    config, (B, T) = self.config, (x.shape[0] if span is None else span.rows, x.shape[1])
    q, gate, k, v, *gates = (piece[:B] for piece in self.project(x))
    q, gate = (z.reshape(B, T, config.num_heads, config.head_dim) for z in (q, gate))
    q = layers.head_norm(q)
    k = layers.head_norm(k.reshape(B, T, config.num_kv_heads, config.head_dim))
    v = v.reshape(B, T, config.num_kv_heads, config.head_dim)
    histories, state = (None, None, None), None
    if self.core.has_canon:
      past_q, past_k, past_v = (None, None, None) if cache is None else (cache.canon_q, cache.canon_k, cache.canon_v)
      q, canon_q = _canon(q, self.canon_q, past_q, span, "heads", starts)
      k, canon_k = _canon(k, self.canon_k, past_k, span, "kv_heads", starts)
      v, canon_v = _canon(v, self.canon_v, past_v, span, "kv_heads", starts)
      histories = canon_q, canon_k, canon_v
    if trace is not None:
      trace |= {"q": q, "k": k, "v": v}
    foreign = foreign_rows(k, v, self.foreign_keys) if span is None and self.foreign_keys else None
    heads, magnitudes, keys = self.core(q, k, v, cache, span, trace, foreign, starts)
    channels = [(heads * jax.nn.sigmoid(gate)).reshape(B, T, -1), *magnitudes]
    if self.memory is not None:
      past, layer = (None, None) if cache is None else (cache.memory, cache.layer)
      read, state = self.memory.read(gates, q, k, v, past, span, trace, layer, starts)
      channels.append(read)
    output = layers.LinearSum(list(zip(self._output_layers(), channels, strict=True)))
    if self.fused_outputs is not None:
      output = layers.LinearSum([(self.fused_outputs, jnp.concatenate([y.astype(channels[0].dtype) for y in channels], axis=-1))])
    if cache is None:
      return output, None
    return output, AttentionCache(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(v, 1, 2), *histories, state)

  def fuse_projections(self) -> None:
    """Makes one matrix of those that take the same input, and one of those whose outputs are added."""
    self.fused_inputs = layers.Linear.concatenate_outputs(self._input_layers())
    self.fused_outputs = layers.Linear.concatenate_inputs(self._output_layers())

  def project(self, x: Float[Array, "B T C"]) -> list[Array]:
    """Queries and their gates (B, T, H D), keys and values (B, T, K D), and the outputs of the memory's gates."""
    first, *others = self._input_layers()
    heads, shape = self.config.num_heads, x.shape[:-1]
    if self.fused_inputs is not None:
      q, *rest = _split(self.fused_inputs(x), (first, *others))
      return [*(z.reshape(*shape, -1) for z in jnp.split(q.reshape(*shape, heads, -1), 2, axis=-1)), *rest]
    pieces = first.split(x, 2, groups=heads)
    if shard_count("heads") > 1:  # each device has its own piece of every matrix, not of two side by side
      return [*pieces, *(linear(x) for linear in others)]
    # Products of few outputs in pairs: each gradient with respect to x is as large as x, and all are stored and added up.
    pairs = others[:2], others[2:4], others[4:]
    return [*pieces, *(piece for pair in pairs if pair for piece in _split(layers.Linear.concatenate_outputs(pair)(x), pair))]

  def _input_layers(self) -> list[layers.Linear]:
    gates = [] if self.memory is None else [self.memory.gamma, self.memory.beta, self.memory.gate]
    return [self.q, self.k, self.v, *gates]

  def _output_layers(self) -> list[layers.Linear]:
    return [self.out_proj, *self.core.magnitude_projections, *([] if self.memory is None else [self.memory.out_proj])]

  @classmethod
  def init_cache(cls, config: ModelConfig, batch: int, rings: Rings) -> AttentionCache:
    """See `Mixer`."""
    activation = layers.activation_dtype(config)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    keys, values = (jnp.zeros((rings.count, kv_heads, rings.slots, dim), rings.dtype) for _ in range(2))
    canon_q, canon_k, canon_v = (
      jnp.zeros((batch, config.canon_taps - 1, n * dim), activation) if CORES[config.attention].has_canon else None
      for n in (heads, kv_heads, kv_heads))
    key_scale, value_scale = (
      jnp.zeros((rings.count, kv_heads, rings.slots), jnp.float32) if rings.dtype == "int8" else None for _ in range(2))
    return AttentionCache(keys, values, canon_q, canon_k, canon_v, memory.init_state(config, batch), key_scale, value_scale)

  @classmethod
  def operations(cls, config: ModelConfig, sequence_length: int) -> float:
    """Scores and values, 2 x 2 H D a visible key, for the mean number of visible keys; and the memory."""
    visible = visibility.visible_pairs(sequence_length, sequence_length, config.window) / sequence_length
    return 4 * config.num_heads * config.head_dim * visible + memory.operations(config)

  def distractor_loss(self, trace: Trace, inputs: Float[Array, "R C"]) -> Float[Array, ""]:
    """The core's loss for keys and values of random inputs, normed as keys are, without canon convolutions."""
    shape = (inputs.shape[0], self.config.num_kv_heads, self.config.head_dim)
    return self.core.distractor_loss(trace, layers.head_norm(self.k(inputs).reshape(shape)), self.v(inputs).reshape(shape))


def foreign_rows(k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], count: int) -> KeysAndValues:
  """Keys and values of the rows that follow each row in the batch, `count` tokens of them.

  Raises:
    ValueError: the other rows hold fewer.
  """
  B, T = k.shape[:2]
  rows = -(-count // T)
  if rows >= B:
    raise ValueError(f"foreign_keys={count}: must be at most {(B - 1) * T}, what the other {B - 1} rows of {T} tokens hold")

  def take(x: Array) -> Array:
    return jnp.concatenate([jnp.roll(x, -(row + 1), axis=0) for row in range(rows)], axis=1)[:, :count]

  return take(k), take(v)


def _concatenate(first: KeysAndValues, second: KeysAndValues) -> KeysAndValues:
  """Two stretches of keys and values, one after the other."""
  return jnp.concatenate([first[0], second[0]], axis=1), jnp.concatenate([first[1], second[1]], axis=1)


def _split(y: Array, linears: Sequence[layers.Linear]) -> list[Array]:
  """The output of each of `linears`, from that of `Linear.concatenate_outputs`."""
  ends = list(itertools.accumulate(linear.bias.shape[0] for linear in linears))
  return jnp.split(y, ends[:-1], axis=-1)


def _canon(z: Float[Array, "B T heads D"], conv: layers.DepthwiseFilter, history: Array | None, span: TokenSpan | None,
           channels: str, starts: Int[Array, "B T"] | None) -> tuple[Float[Array, "B T heads D"], Array | None]:
  """``z + conv(z)`` over the flattened heads, and the history after z.

  Args:
    z: of whole sequences, or with a `span` of new tokens.
    conv: the convolution.
    history: its inputs before z, with a `span`.
    span: where the new tokens stand.
    channels: logical axis of the flattened heads.
    starts: of the documents in whole sequences, see `Mixer`.
  """
  B, T, heads, dim = z.shape
  flat = z.reshape(B, T, heads * dim)
  if span is None or history is None:
    y, history = conv(flat, channels, starts), None
  else:
    y, history = conv.extend(flat, history, span)
  return (flat + y).reshape(B, T, heads, dim), history

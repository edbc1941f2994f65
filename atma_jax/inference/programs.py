"""What the engine runs on the device: the state of its rows, and the programs that fill, decode and stop them."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.inference.sampling import RowSampling, Sampling, sample
from atma_jax.models.cache import Cache
from atma_jax.sharding import LOGICAL_AXES

CAST_GROUPS = ("muon", "embedding", "head")  # optimizer groups whose parameters the model casts before it uses them
FLOAT32_BIASES = ("head",)  # modules that add their bias in float32; the other biases are cast, too


class DecodeState(NamedTuple):
  """Everything that decoding changes on the device, for B rows."""

  cache: Cache
  token: Int[Array, " B"]  # the last token, not yet in the cache
  remaining: Int[Array, " B"]  # tokens that may still be drawn; 0 is a row at rest
  drawn: Int[Array, " B"]  # tokens drawn so far
  seen: Bool[Array, "B V"]  # tokens of the prompt and the text
  ends: Bool[Array, " B"]  # whether end-of-text ends the row
  options: RowSampling


class DecodedTokens(NamedTuple):
  """What a decoding program returns: N steps of B rows, with A alternatives. Only the first `counts` steps of a row are valid."""

  tokens: Int[Array, "N B"]
  logprobs: Float[Array, "N B"]
  top_tokens: Int[Array, "N B A"]
  top_logprobs: Float[Array, "N B A"]
  counts: Int[Array, " B"]

  def on_host(self) -> HostTokens:
    """Waits for the program and copies its result to the host."""
    return HostTokens(*(x.tolist() for x in jax.device_get(self)))


class HostTokens(NamedTuple):
  """`DecodedTokens` as nested lists."""

  tokens: list[list[int]]
  logprobs: list[list[float]]
  top_tokens: list[list[list[int]]]
  top_logprobs: list[list[list[float]]]
  counts: list[int]


class Programs(NamedTuple):
  """The jitted functions of an engine, each compiled when it is first called.

  Attributes:
    prefill: (params, cache, tokens, counts, cache_slots=) -> cache, of one row; the cache is donated.
    score: (params, cache, tokens, targets, counts) -> cache and log-probabilities of the targets; the cache is donated.
    place: (state, row, cache, pages, token, remaining, seen, ends, options) -> state; the state is donated.
    decode: (params, state, cache_slots=, filters=) -> state and what was decoded; the state is donated.
    stop: (remaining, row) -> remaining, with the row at rest.
    copy_cache: cache -> a copy of it.
    new_cache: () -> an empty cache of one row.
  """

  prefill: Callable[..., Cache]
  score: Callable[..., Any]
  place: Callable[..., DecodeState]
  decode: Callable[..., tuple[DecodeState, DecodedTokens]]
  stop: Callable[..., jax.Array]
  copy_cache: Callable[[Cache], Cache]
  new_cache: Callable[[], Cache]


def make_programs(graphdef: nnx.GraphDef, config: ModelConfig, tokenizer: Tokenizer, create: Callable[[int], Cache], *,
                  decode_steps: int, alternatives: int, mesh: Mesh | None, shardings: DecodeState | None) -> Programs:
  """Builds the programs of an engine.

  Args:
    graphdef: of the model; its parameters are arguments of the programs.
    config: of the model.
    tokenizer: of the model.
    create: makes an empty cache of that many rows.
    decode_steps: tokens decoded by one call, N.
    alternatives: likeliest tokens reported at every step, A.
    mesh: devices that the parameters are spread over, or None.
    shardings: of the decoding state on the mesh, or None.
  """
  eot, legal = tokenizer.eot_id, np.arange(config.vocab_size) < tokenizer.vocab_size
  decode_shardings = replicated = None
  if mesh is not None and shardings is not None:
    replicated = NamedSharding(mesh, PartitionSpec())
    decode_shardings = (shardings, replicated)

  @functools.partial(jax.jit, donate_argnums=1, static_argnames="cache_slots", out_shardings=replicated)
  def prefill(params: nnx.State, cache: Cache, tokens: jax.Array, counts: jax.Array, *, cache_slots: int | None) -> Cache:
    return nnx.merge(graphdef, params).extend(tokens, cache, counts, cache_slots=cache_slots)[1]

  @functools.partial(jax.jit, donate_argnums=1, out_shardings=replicated)
  def score(params: nnx.State, cache: Cache, tokens: jax.Array, targets: jax.Array,
            counts: jax.Array) -> tuple[Cache, tuple[jax.Array, ...]]:
    model = nnx.merge(graphdef, params)
    hidden, cache = model.extend(tokens, cache, counts)
    logprobs = jax.nn.log_softmax(model.head(hidden)[0].astype(jnp.float32))
    own = jnp.take_along_axis(logprobs, targets[0][:, None], axis=1)[:, 0]
    return cache, (own, *_likeliest(logprobs, alternatives))

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
  def place(state: DecodeState, row: jax.Array, cache: Cache, pages: jax.Array | None, *values: Any) -> DecodeState:
    token, remaining, seen, ends, options = values

    def put(old: jax.Array, new: jax.Array | int) -> jax.Array:
      return old.at[row].set(new)

    return DecodeState(state.cache.put(row[None], cache, pages), put(state.token, token), put(state.remaining, remaining),
                       put(state.drawn, 0), put(state.seen, seen), put(state.ends, ends),
                       jax.tree.map(lambda old, new: put(old, new[0]), state.options, options))

  @functools.partial(jax.jit, donate_argnums=1, static_argnames=("cache_slots", "filters"), out_shardings=decode_shardings)
  def decode(params: nnx.State, state: DecodeState, *, cache_slots: int,
             filters: bool | None) -> tuple[DecodeState, DecodedTokens]:
    model = nnx.merge(graphdef, params)
    B = state.token.shape[0]
    decoded = DecodedTokens(jnp.zeros((decode_steps, B), jnp.int32), jnp.zeros((decode_steps, B), jnp.float32),
                            jnp.zeros((decode_steps, B, alternatives), jnp.int32),
                            jnp.zeros((decode_steps, B, alternatives), jnp.float32), jnp.zeros(B, jnp.int32))

    def step(carry: tuple[jax.Array, DecodeState, DecodedTokens]) -> tuple[jax.Array, DecodeState, DecodedTokens]:
      i, state, decoded = carry
      active = state.remaining > 0
      hidden, cache = model.extend(state.token[:, None], state.cache, active.astype(jnp.int32), cache_slots=cache_slots or None)
      logits = model.head(hidden)[:, 0].astype(jnp.float32)
      token = sample(jnp.where(legal, logits, -jnp.inf), state.options, state.seen, state.drawn, filters)
      logprobs = jax.nn.log_softmax(logits, axis=-1)
      top_logprobs, top_tokens = _likeliest(logprobs, alternatives)
      ended = state.ends & (token == eot)
      remaining = jnp.where(active, jnp.where(ended, 0, state.remaining - 1), 0)
      state = DecodeState(cache, jnp.where(active, token, state.token), remaining, state.drawn + active,
                          state.seen.at[jnp.arange(B), token].max(active), state.ends, state.options)
      own = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
      decoded = DecodedTokens(decoded.tokens.at[i].set(token), decoded.logprobs.at[i].set(own),
                              decoded.top_tokens.at[i].set(top_tokens), decoded.top_logprobs.at[i].set(top_logprobs),
                              decoded.counts + active)
      return i + 1, state, decoded

    def unfinished(carry: tuple[jax.Array, DecodeState, DecodedTokens]) -> jax.Array:
      return (carry[0] < decode_steps) & jnp.any(carry[1].remaining > 0)

    carry = jnp.int32(0), state, decoded
    if filters is not None:  # stopping early would be a branch, for which a GPU asks the host after every token
      return jax.lax.fori_loop(0, decode_steps, lambda _, carry: step(carry), carry)[1:]
    return jax.lax.while_loop(unfinished, step, carry)[1:]

  stop = jax.jit(lambda remaining, row: remaining.at[row].set(0),
                 out_shardings=None if shardings is None else shardings.remaining)
  copy_cache = jax.jit(lambda cache: jax.tree.map(jnp.copy, cache), out_shardings=replicated)
  new_cache = jax.jit(functools.partial(create, 1), out_shardings=replicated)
  return Programs(prefill, score, place, decode, stop, copy_cache, new_cache)


def empty_state(create: Callable[[int], Cache], rows: int, vocab_size: int) -> DecodeState:
  """Returns the state of an engine all of whose rows are at rest; `create` makes an empty cache of that many rows."""
  token, remaining, drawn = (jnp.zeros(rows, jnp.int32) for _ in range(3))
  return DecodeState(create(rows), token, remaining, drawn, jnp.zeros((rows, vocab_size), bool), jnp.zeros(rows, bool),
                     RowSampling.stack(*[Sampling()] * rows))


def cast_parameters(params: nnx.State, config: ModelConfig) -> nnx.State:
  """Casts the parameters to the activation dtype that the model would otherwise cast to it in every call."""
  dtype = jnp.dtype(config.activation_dtype)

  def is_cast(path: tuple[Any, ...], p: nnx.Variable) -> bool:
    bias = path[-1] == "bias" and path[-2] not in FLOAT32_BIASES
    return isinstance(p, nnx.Param) and (bias or p.get_metadata("optimizer") in CAST_GROUPS)

  return nnx.from_flat_state([(path, p.replace(p[...].astype(dtype)) if is_cast(path, p) else p)
                              for path, p in nnx.to_flat_state(params)])


def state_sharding(mesh: Mesh, state: DecodeState) -> DecodeState:
  """Shards rows over the mesh axes of the batch: axis 1 of the cache's stacked arrays, axis 0 of all others."""
  batch = LOGICAL_AXES["batch"]

  def along(axis: int, tree: Any) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, batch))
    return jax.tree.map(lambda _: sharding, tree)

  cache = state.cache
  return along(0, state)._replace(cache=Cache(along(0, cache.lengths), along(1, cache.layers), along(0, cache.table)))


def _likeliest(logprobs: Float[Array, "*B V"], count: int) -> tuple[Float[Array, "*B A"], Int[Array, "*B A"]]:
  """The `count` largest log-probabilities and their tokens."""
  if not count:
    empty = jnp.zeros((*logprobs.shape[:-1], 0))
    return empty, empty.astype(jnp.int32)
  values, tokens = jax.lax.top_k(logprobs, count)
  return values, tokens

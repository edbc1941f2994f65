"""What the engine runs on the device: its rows, and the programs that fill, step and free them."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.inference.sampling import Knobs, Sampling, sample
from atma_jax.models.cache import Cache
from atma_jax.sharding import LOGICAL_AXES

CAST = ("muon", "embedding", "head")  # optimizer groups of the parameters that the model casts before it uses them
WIDE_BIASES = ("head",)  # whose owners add them in float32; the others' are cast, too


class Rows(NamedTuple):
  """What decoding changes, on the device; B rows."""

  cache: Cache
  token: jax.Array  # (B,) int32 the last token, not yet in the cache
  remaining: jax.Array  # (B,) int32 tokens that may still come; 0 is a row at rest
  drawn: jax.Array  # (B,) int32 tokens drawn so far
  seen: jax.Array  # (B, V) bool tokens of the prompt and the text
  ends: jax.Array  # (B,) bool end-of-text ends the row
  knobs: Knobs


class Drawn(NamedTuple):
  """What a decoding program gives the host, `stride` steps of B rows; of a row only its first `count` steps count."""

  tokens: jax.Array  # (stride, B) int32
  logprobs: jax.Array  # (stride, B) float32
  top_tokens: jax.Array  # (stride, B, alternatives) int32
  top_logprobs: jax.Array  # (stride, B, alternatives) float32
  counts: jax.Array  # (B,) int32


class Programs(NamedTuple):
  """Compiled when they are first called."""

  prefill: Callable[..., Cache]  # (state, cache, tokens, counts, reach=) of one row, donated
  score: Callable[..., Any]  # (state, cache, tokens, targets, counts) -> cache and log-probabilities of the targets
  place: Callable[..., Rows]  # (rows, row, cache, pages, token, remaining, seen, ends, knobs): rows are donated
  decode: Callable[..., tuple[Rows, Drawn]]  # (state, rows, reach=, narrow=): rows are donated
  rest: Callable[..., jax.Array]  # (remaining, row) -> remaining with the row at rest
  copy: Callable[[Cache], Cache]
  new: Callable[[], Cache]  # of one row, empty


def programs(graphdef: nnx.GraphDef, config: ModelConfig, tokenizer: Tokenizer, create: Callable[[int], Cache], *, stride: int,
             alternatives: int, mesh: Mesh | None, shardings: Rows | None) -> Programs:
  """The programs of an engine; arguments are the engine's, `create` makes the state of so many rows by themselves."""
  eot, legal = tokenizer.eot_id, np.arange(config.vocab_size) < tokenizer.vocab_size
  row_shardings = decode_shardings = drawn_shardings = one = None
  if shardings is not None:
    one = NamedSharding(mesh, PartitionSpec())
    row_shardings, drawn_shardings = shardings, Drawn(*[one] * 5)
    decode_shardings = (row_shardings, drawn_shardings)

  @functools.partial(jax.jit, donate_argnums=1, static_argnames="reach", out_shardings=one)
  def prefill(state: Any, cache: Cache, tokens: jax.Array, counts: jax.Array, *, reach: int | None) -> Cache:
    return nnx.merge(graphdef, state).extend(tokens, cache, counts, reach=reach)[1]

  @functools.partial(jax.jit, donate_argnums=1, out_shardings=one)
  def score(state: Any, cache: Cache, tokens: jax.Array, targets: jax.Array,
            counts: jax.Array) -> tuple[Cache, tuple[jax.Array, ...]]:
    model = nnx.merge(graphdef, state)
    hidden, cache = model.extend(tokens, cache, counts)
    logprobs = jax.nn.log_softmax(model.head(hidden)[0].astype(jnp.float32))
    own = jnp.take_along_axis(logprobs, targets[0][:, None], axis=1)[:, 0]
    return cache, (own, *_likeliest(logprobs, alternatives))

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=row_shardings)
  def place(rows: Rows, row: jax.Array, cache: Cache, pages: jax.Array | None, *values: Any) -> Rows:
    token, remaining, seen, ends, knobs = values

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
      return old.at[row].set(new)

    return Rows(rows.cache.put(row[None], cache, pages), put(rows.token, token), put(rows.remaining, remaining),
                put(rows.drawn, 0), put(rows.seen, seen), put(rows.ends, ends),
                jax.tree.map(lambda old, new: put(old, new[0]), rows.knobs, knobs))

  @functools.partial(jax.jit, donate_argnums=1, static_argnames=("reach", "narrow"), out_shardings=decode_shardings)
  def decode(state: Any, rows: Rows, *, reach: int, narrow: bool | None) -> tuple[Rows, Drawn]:
    model = nnx.merge(graphdef, state)
    B = rows.token.shape[0]
    drawn = Drawn(jnp.zeros((stride, B), jnp.int32), jnp.zeros((stride, B), jnp.float32),
                  jnp.zeros((stride, B, alternatives), jnp.int32), jnp.zeros((stride, B, alternatives), jnp.float32),
                  jnp.zeros(B, jnp.int32))

    def step(carry: tuple[jax.Array, Rows, Drawn]) -> tuple[jax.Array, Rows, Drawn]:
      i, rows, drawn = carry
      active = rows.remaining > 0
      hidden, cache = model.extend(rows.token[:, None], rows.cache, active.astype(jnp.int32), reach=reach or None)
      logits = model.head(hidden)[:, 0].astype(jnp.float32)
      token = sample(jnp.where(legal, logits, -jnp.inf), rows.knobs, rows.seen, rows.drawn, narrow)
      logprobs = jax.nn.log_softmax(logits, axis=-1)
      top = _likeliest(logprobs, alternatives)
      ended = rows.ends & (token == eot)
      remaining = jnp.where(active, jnp.where(ended, 0, rows.remaining - 1), 0)
      rows = Rows(cache, jnp.where(active, token, rows.token), remaining, rows.drawn + active,
                  rows.seen.at[jnp.arange(B), token].max(active), rows.ends, rows.knobs)
      own = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
      new = (token, own, top[1], top[0])
      drawn = Drawn(*(old.at[i].set(value) for old, value in zip(drawn, new)), drawn.counts + active)
      return i + 1, rows, drawn

    def go_on(carry: tuple[jax.Array, Rows, Drawn]) -> jax.Array:
      return (carry[0] < stride) & jnp.any(carry[1].remaining > 0)

    carry = jnp.int32(0), rows, drawn
    if narrow is not None:  # no word from the host between two tokens, so none to stop early either
      return jax.lax.fori_loop(0, stride, lambda _, carry: step(carry), carry)[1:]
    return jax.lax.while_loop(go_on, step, carry)[1:]

  rest = jax.jit(lambda remaining, row: remaining.at[row].set(0),
                 out_shardings=None if shardings is None else shardings.remaining)
  copy = jax.jit(lambda cache: jax.tree.map(jnp.copy, cache), out_shardings=one)
  return Programs(prefill, score, place, decode, rest, copy, jax.jit(functools.partial(create, 1), out_shardings=one))


def empty_rows(create: Callable[[int], Cache], rows: int, vocab_size: int) -> Rows:
  """All at rest."""
  return Rows(create(rows), *(jnp.zeros(rows, jnp.int32) for _ in range(3)), jnp.zeros((rows, vocab_size), bool),
              jnp.zeros(rows, bool), Knobs.of(*[Sampling()] * rows))


def cast(state: nnx.State, config: ModelConfig) -> nnx.State:
  """The parameters with those in the activation dtype that the model would cast to it in every call."""
  dtype = jnp.dtype(config.activation_dtype)

  def is_cast(path: tuple, p: nnx.Variable) -> bool:
    bias = path[-1] == "bias" and path[-2] not in WIDE_BIASES
    return isinstance(p, nnx.Param) and (bias or p.get_metadata("optimizer") in CAST)

  return nnx.from_flat_state([(path, p.replace(p[...].astype(dtype)) if is_cast(path, p) else p)
                              for path, p in nnx.to_flat_state(state)])


def rows_sharding(mesh: Mesh, rows: Rows) -> Rows:
  """Rows over the axes of the batch: axis 1 of the cache's stacked arrays, axis 0 of all others."""
  batch = LOGICAL_AXES["batch"]

  def along(axis: int, tree: Any) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, batch))
    return jax.tree.map(lambda _: sharding, tree)

  cache = rows.cache
  return along(0, rows)._replace(cache=Cache(along(0, cache.lengths), along(1, cache.layers), along(0, cache.table)))


def _likeliest(logprobs: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The `count` largest of (..., V) and their tokens."""
  if not count:
    empty = jnp.zeros((*logprobs.shape[:-1], 0))
    return empty, empty.astype(jnp.int32)
  return jax.lax.top_k(logprobs, count)

"""Atma: embedding, groups of blocks, final norm, soft-capped head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import copy
from typing import Any

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax import ops
from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.block import Group, Tap
from atma_jax.models.cache import Cache, LayerCache, TokenSpan
from atma_jax.models.mixers import without_documents
from atma_jax.models.parallel import check_length
from atma_jax.models.residual import ACTIVATIONS, ResidualStream
from atma_jax.ops.core import dispatch
from atma_jax.ops.core.dispatch import KERNEL_OUTPUTS
from atma_jax.ops.polar_attention.cached.api import skips_unused_slots
from atma_jax.ops.squared_gate import api as squared_gate
from atma_jax.sharding import active_mesh, constrain, shard_count

REMAT_POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(*KERNEL_OUTPUTS, layers.RESIDUAL, layers.NORM_SUM,
                                                  squared_gate.CHECKPOINT_NAME)),
  "block": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nnx.Module):
  """Token embedding (V, C)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.dtype = layers.activation_dtype(config)
    self.embedding = layers.parameter(config, rngs, layers.normal(1.0), (config.vocab_size, config.width),
                                      ("vocab", "embed"), "embedding")

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T C"]:
    table = constrain(self.embedding[...].astype(self.dtype), ("vocab", "features"))  # whole rows: gathered over fsdp first
    return table[tokens]


class Head(nnx.Module):
  """Untied linear head with a bias and a smooth cap."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.cap, self.dtype = config.logit_cap, layers.activation_dtype(config)
    self.kernel = layers.parameter(config, rngs, layers.zeros, (config.width, config.vocab_size), ("embed", "vocab"),
                                   "head")
    self.bias = layers.parameter(config, rngs, layers.zeros, (config.vocab_size,), ("vector",), "vector")

  def __call__(self, hidden: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
    """The logits in (-cap, cap), in float32 or wider."""
    wide = jnp.promote_types(jnp.float32, self.dtype)
    logits = layers.product(hidden, self.kernel[...].astype(self.dtype), self.bias[...].astype(wide), wide)
    return ops.soft_cap(logits, self.cap)


class Atma(nnx.Module):
  """The decoder of arXiv 2606.25156: ``Atma(config.model, rngs=nnx.Rngs(0))(tokens) -> logits``.

  Whole repetitions of `config.block_pattern` are stacked and scanned, so that compile time does not grow with depth;
  an incomplete repetition at the end follows unstacked.

  Attributes:
    config: the configuration; not to be changed.
    embed: the token embedding.
    groups: the repetitions of the block pattern as one `Group` whose arrays have a first axis over them, or as a list (see
      `unstacked`); None in a model shallower than the pattern.
    tail: the incomplete repetition; None without one.
    norm: the final norm.
    head: what makes logits.

  Example:
    >>> model = Atma(Config().model, rngs=nnx.Rngs(0))
    >>> logits = model(jnp.zeros((1, 16), jnp.int32))  # (B, T, V) float32
  """

  groups: Group | nnx.List | None = None
  tail: Group | None = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    config = copy.deepcopy(config)  # the caller's may change; what a module holds must not
    self.config = config
    pattern = tuple(config.block_pattern)
    repeats, rest = divmod(config.num_layers, len(pattern))
    self.embed = Embedding(config, rngs=rngs)
    if repeats:
      self.groups = nnx.vmap(lambda r: Group(config, pattern, rngs=r))(rngs.split(repeats))
      for _, parameter in nnx.iter_graph(self.groups):
        if isinstance(parameter, nnx.Param):
          parameter.set_metadata(logical_axes=("layers", *parameter.get_metadata("logical_axes")))
    if rest:
      self.tail = Group(config, pattern[:rest], rngs=rngs)
    self.norm = layers.RMSNorm(config, rngs=rngs)
    self.head = Head(config, rngs=rngs)

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """The logits in (-cap, cap), float32 (float64 for float64 activations)."""
    return self.head(self.hidden(tokens))

  def hidden(self, tokens: Int[Array, "B T"], starts: Int[Array, "B T"] | None = None) -> Float[Array, "B T C"]:
    """The output of the final norm, from which `token_losses` and its like compute what they need without storing logits.

    Args:
      tokens: whole sequences.
      starts: the position at which each token's document starts, for rows that pack documents which are not to see each other
        (`atma_jax.ops.document_starts`); None makes one document of every row.

    Raises:
      ValueError: a mixer of the model, or the mesh, does not serve `starts`.
    """
    return self._forward(tokens, None, starts)[0]

  def tapped(self, tokens: Int[Array, "B T"], tap: Tap,
             starts: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T C"], list[Any]]:
    """`hidden`, and what `tap` (see `atma_jax.models.block.Tap`) returned for every layer, in order."""
    hidden, results = self._forward(tokens, tap, starts)
    stacked = results.get("groups", [])
    layers = [jax.tree.map(lambda leaf, g=g: leaf[g], block) for g in range(self._repeats) for block in stacked]
    return hidden, [*layers, *results.get("tail", [])]

  def next_token_loss(self, hidden: Float[Array, "B T C"], targets: Int[Array, "B T"],
                      weights: Float[Array, "B T"] | None = None, *, z_loss: float = 0.0,
                      chunk: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sum of the token losses, and, to be reported, that of the squared log-partition functions.

    Only the first is differentiable.

    Args:
      hidden: of whole sequences.
      targets: the tokens that follow.
      weights: of the targets; None is 1 for all.
      z_loss: weight of the squared log-partition function within the loss.
      chunk: time steps of each sequence whose logits exist at once.
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    return ops.cross_entropy(hidden, self.head.kernel[...], self.head.bias[...], targets, weights, cap=self.head.cap,
                             z_loss=z_loss, chunk=chunk, time_shards=shard_count("sequence"),
                             implementation=self.config.implementation)

  def token_losses(self, hidden: Float[Array, "B T C"], targets: Int[Array, "B T"], *, chunk: int,
                   whole: bool = True) -> Float[Array, "B T"]:
    """Losses of the targets in nats, float32 or wider; arguments as for `next_token_loss`.

    ``whole=False`` says that the hidden states are a selection, whose time axis the mesh does not split.
    """
    return ops.token_losses(hidden, self.head.kernel[...], self.head.bias[...], targets, cap=self.head.cap, chunk=chunk,
                            time_shards=shard_count("sequence") if whole else 1, implementation=self.config.implementation)

  def token_predictions(self, hidden: Float[Array, "B T C"], *, chunk: int, whole: bool = True) -> Int[Array, "B T"]:
    """The most likely next tokens; arguments as for `token_losses`."""
    return ops.token_predictions(hidden, self.head.kernel[...], self.head.bias[...], cap=self.head.cap, chunk=chunk,
                                 time_shards=shard_count("sequence") if whole else 1)

  @property
  def _repeats(self) -> int:
    return self.config.num_layers // len(self.config.block_pattern)

  def _forward(self, tokens: Int[Array, "B T"], tap: Tap | None,
               starts: Int[Array, "B T"] | None) -> tuple[Float[Array, "B T C"], dict[str, list[Any]]]:
    """The output of the final norm, and the tap's results: stacked over the groups, and those of the tail."""
    _check_tokens(tokens)
    check_length(tokens.shape[1])
    if starts is not None and (without := without_documents(self.config)):
      raise ValueError(f"starts: mixer {without!r} lets documents of a row see each other, so it takes none")
    x, results = ResidualStream(constrain(self.embed(tokens), ACTIVATIONS)), {}
    pattern = len(self.config.block_pattern)
    if self.groups is not None:
      graphdef, stacked = self._stacked()
      inputs = stacked, pattern * jnp.arange(self._repeats)

      def apply(x: ResidualStream, inputs: tuple[nnx.State, Array]) -> tuple[ResidualStream, list[Any]]:
        params, first = inputs
        return nnx.merge(graphdef, params)(x, tap, first, starts)

      def scanned(x: Array, inputs: tuple[nnx.State, Array]) -> tuple[Array, list[Any]]:
        stream, result = apply(ResidualStream(x), inputs)
        return stream.value, result

      if self.config.scan:
        value, results["groups"] = jax.lax.scan(self._rematerialised(scanned), x.value, inputs)
        x = ResidualStream(value)
      else:
        leaves, structure = jax.tree.flatten(inputs)
        found, apply = [], self._rematerialised(apply)
        for group in zip(*map(jnp.unstack, leaves)):
          x, result = apply(x, jax.tree.unflatten(structure, group))
          found.append(result)
        results["groups"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    if self.tail is not None:
      x, results["tail"] = self._rematerialised(lambda x, group: group(x, tap, pattern * self._repeats, starts))(x, self.tail)
    return x.norm(self.norm), results

  def _rematerialised(self, apply: Callable[..., Any]) -> Callable[..., Any]:
    if self.config.remat == "none":
      return apply
    return jax.checkpoint(apply, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not self.config.scan)

  def extend(self, tokens: Int[Array, "B T"], cache: Cache, counts: Int[Array, " B"] | None = None, *,
             cache_slots: int | None = None) -> tuple[Float[Array, "B T C"], Cache]:
    """The output of the final norm for tokens that follow those of a cache: chunked prefill (T > 1) and decoding (T = 1).

    Args:
      tokens: the new tokens.
      cache: of B rows, with room for the new tokens unless the model has a window.
      counts: how many of a row's T tokens count; the rest is padding on the right. None is all T.
      cache_slots: how many slots of keys and values to read, a value of `slots_for`; no row with new tokens may have used more.
        0 says that the cache is empty, so that the ops of the full forward pass serve the call. None is all slots.

    Returns:
      (B, T, C), meaningless where padded, and the cache after the tokens that count.
    """
    _check_tokens(tokens)
    B, T = tokens.shape
    chex.assert_shape(cache.lengths, (B,), custom_message="tokens and cache must have as many rows")
    span = TokenSpan(cache.lengths, jnp.full(B, T, jnp.int32) if counts is None else counts, cache.table, cache_slots,
                     self.config.implementation)
    chex.assert_shape(span.counts, (B,), custom_message="counts must have as many rows as tokens")
    x, updates = constrain(self.embed(tokens), ACTIVATIONS), {}
    if T == 1 and self.unrolls_decoding(cache):
      for name, groups in self.repetitions().items():
        x, updates[name] = _decode_unrolled(x, groups, cache.layers[name], span)
      return self.norm(x), cache.append(updates, span)
    if self.groups is not None:
      graphdef, stacked = self._stacked()

      def apply(x: Array, inputs: tuple[nnx.State, list[LayerCache]]) -> tuple[Array, list[LayerCache]]:
        params, caches = inputs
        stream, updates = nnx.merge(graphdef, params).extend(ResidualStream(x), caches, span)
        return stream.value, updates

      x, updates["groups"] = jax.lax.scan(apply, x, (stacked, cache.layers["groups"]))  # inlined, it would copy the cache
    if self.tail is not None:
      caches = jax.tree.map(lambda leaf: leaf[0], cache.layers["tail"])
      stream, update = self.tail.extend(ResidualStream(x), caches, span)
      x, updates["tail"] = stream.value, jax.tree.map(lambda leaf: leaf[None], update)
    return self.norm(x), cache.append(updates, span)

  def unrolls_decoding(self, cache: Cache) -> bool:
    """Whether decoding calls the layers one by one instead of in a loop.

    Kernels that index into the stacked arrays of a cache need it. On a GPU it is always faster, because a loop would copy each
    layer's share of the cache.
    """
    return dispatch.platform() == "gpu" or (dispatch.platform() == "tpu" and self.skips_unused_slots(cache))

  def skips_unused_slots(self, cache: Cache) -> bool:
    """Whether decoding with such a cache reads every row up to its own length, so that `cache_slots` saves nothing."""
    keys = cache.keys
    return keys is not None and skips_unused_slots(
      jax.ShapeDtypeStruct(keys.shape, keys.dtype), self.config.num_heads, layers.activation_dtype(self.config),
      paged=cache.table is not None, implementation=self.config.implementation)

  def unstacked(self, fuse: bool = True) -> Atma:
    """A copy for unrolled decoding, which launches fewer kernels because every group has arrays of its own.

    Forward passes over whole sequences and chunks still work; they stack the arrays first, once per pass.

    Args:
      fuse: let mixers replace matrices that belong together by one (`Mixer.fuse_projections`).
    """
    model = nnx.merge(*nnx.split(self))
    if model.groups is not None:
      model.groups = nnx.List(self.repetitions()["groups"])
    if fuse:
      for groups in model.repetitions().values():
        for group in groups:
          for block in group.blocks:
            block.mixer.fuse_projections()
    return model

  def repetitions(self) -> dict[str, list[Group]]:
    """The groups of blocks one by one, by the names of `Cache.layers`."""
    found = {}
    if self.groups is not None:
      found["groups"] = list(self.groups) if isinstance(self.groups, nnx.List) else [
        _unstack(self.groups, i) for i in range(self._repeats)]
    if self.tail is not None:
      found["tail"] = [self.tail]
    return found

  def _stacked(self) -> tuple[nnx.GraphDef, nnx.State]:
    """The groups as one whose arrays have a first axis, over repetitions."""
    if not isinstance(self.groups, nnx.List):
      return nnx.split(self.groups)
    graphdefs, states = zip(*map(nnx.split, self.groups))
    return graphdefs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _check_tokens(tokens: Int[Array, "B T"]) -> None:
  chex.assert_rank(tokens, 2, custom_message="tokens must be of shape (B, T)")
  chex.assert_type(tokens, int, custom_message="tokens must be integers")


def _unstack(stacked: Group, index: int) -> Group:
  """One of stacked groups, its parameters without the axis of the stack."""
  graphdef, state = nnx.split(stacked)
  group = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))
  for _, parameter in nnx.iter_graph(group):
    if isinstance(parameter, nnx.Param):
      parameter.set_metadata(logical_axes=parameter.get_metadata("logical_axes")[1:])
  return group


def _decode_unrolled(x: Float[Array, "B 1 C"], groups: Sequence[Group], caches: Sequence[LayerCache],
                     span: TokenSpan) -> tuple[Float[Array, "B 1 C"], list[LayerCache]]:
  """Extends the groups one by one; what is large in the stacked caches is read and updated in place.

  On a GPU the blocks get more rows than the caches have, if their mixers accept that; the outputs of those rows are dropped.
  """
  updates, rows = [], x.shape[0]
  padded = all(block.mixer.accepts_padded_rows for block in groups[0].blocks)
  if dispatch.platform() == "gpu" and rows < layers.FEW_ROWS and active_mesh() is None and padded:
    x = layers.pad_rows(x, layers.FEW_ROWS)  # for the matrix units anyway; a norm of a single row would take two steps
  stream = ResidualStream(x)
  for repetition, group in enumerate(groups):
    stream, update = group.extend(stream, [cache.select(repetition) for cache in caches], span)
    caches = [cache.carry(new) for cache, new in zip(caches, update, strict=True)]
    updates.append(update)
  return stream.value[:rows], [cache.stack_updates(own) for cache, own in zip(caches, zip(*updates), strict=True)]


def parameter_metadata(model: Atma) -> tuple[dict[str, Any], dict[str, Any]]:
  """Trees shaped like ``nnx.to_pure_dict(nnx.state(model, nnx.Param))``: logical axes, and optimizer groups.

  Works on an abstract model (`nnx.eval_shape`) too.
  """
  state = nnx.state(model, nnx.Param)
  flat = nnx.to_flat_state(state)

  def tree(name: str) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.from_flat_state([(path, p.replace(p.get_metadata(name))) for path, p in flat]))

  return tree("logical_axes"), tree("optimizer")


def count_parameters(config: ModelConfig) -> int:
  """Parameters of a model of this configuration, counted from shapes alone."""
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

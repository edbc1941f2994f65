"""Atma: embedding, scanned groups of blocks, final norm, soft-capped head."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.config import ModelConfig
from atma_jax.models import layers
from atma_jax.models.block import NOTHING, Group, Summands, Tap, normed_sum
from atma_jax.models.cache import Cache, GlobalPast, Past, Span
from atma_jax.models.mixers.attention import GlobalMixer
from atma_jax.models.parallel import check_length
from atma_jax.ops import soft_cap
from atma_jax.ops.core import dispatch
from atma_jax.ops.core.dispatch import KERNEL_OUTPUTS
from atma_jax.ops.polar_attention.cached.api import skips_unused_slots
from atma_jax.ops.squared_gate import api as squared_gate
from atma_jax.sharding import active_mesh, constrain

REMAT_POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(*KERNEL_OUTPUTS, layers.RESIDUAL, layers.NORM_SUM, squared_gate.RESULT)),
  "block": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nnx.Module):
  """Token embedding (V, C)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.dtype = layers.activation_dtype(config)
    self.embedding = layers.parameter(config, rngs, layers.normal(1.0), (config.vocab_size, config.width),
                                      ("vocab", "embed"), "embedding")

  def __call__(self, tokens: jax.Array) -> jax.Array:
    table = constrain(self.embedding[...].astype(self.dtype), ("vocab", "features"))  # whole rows: gathered over fsdp first
    return table[tokens]


class Head(nnx.Module):
  """Untied linear head with bias and a smooth cap: (B, T, C) -> float32 logits (B, T, V) in (-cap, cap)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.cap, self.dtype = config.logit_cap, layers.activation_dtype(config)
    self.kernel = layers.parameter(config, rngs, layers.zeros, (config.width, config.vocab_size), ("embed", "vocab"),
                                   "head")
    self.bias = layers.parameter(config, rngs, layers.zeros, (config.vocab_size,), ("vector",), "vector")

  def __call__(self, hidden: jax.Array) -> jax.Array:
    wide = jnp.promote_types(jnp.float32, self.dtype)
    return soft_cap(layers.product(hidden, self.kernel[...].astype(self.dtype), self.bias[...].astype(wide), wide), self.cap)


class Atma(nnx.Module):
  """The decoder of arXiv 2606.25156: ``Atma(config.model, rngs=nnx.Rngs(0))(tokens (B, T) int32) -> (B, T, V)``.

  Whole repetitions of `config.block_pattern` are stacked and scanned, so that compile time does not grow with depth;
  what is left of an incomplete repetition follows unstacked.
  """

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

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits (B, T, V), float32 (float64 for float64 activations)."""
    return self.head(self.hidden(tokens))

  def hidden(self, tokens: jax.Array) -> jax.Array:
    """The final norm's output (B, T, C), from which `ops.cross_entropy` takes the loss without storing logits."""
    return self._apply(tokens, None)[0]

  def tapped(self, tokens: jax.Array, tap: Tap) -> tuple[jax.Array, list[Any]]:
    """`hidden`, and what `tap` made of every block's trace: one result a layer, in order (see `transformer.Tap`)."""
    hidden, results = self._apply(tokens, tap)
    stacked = results.get("groups", [])
    repeats = self.config.num_layers // len(self.config.block_pattern)
    layers = [jax.tree.map(lambda leaf, g=g: leaf[g], block) for g in range(repeats) for block in stacked]
    return hidden, [*layers, *results.get("tail", [])]

  def _apply(self, tokens: jax.Array, tap: Tap | None) -> tuple[jax.Array, dict[str, list[Any]]]:
    """The final norm's output, and the tap's results: stacked over the groups, and those of the tail."""
    check_length(tokens.shape[1])
    x, results = constrain(self.embed(tokens), ("batch", "sequence", "features")), {}
    pattern, summands = len(self.config.block_pattern), NOTHING
    repeats = self.config.num_layers // pattern
    if hasattr(self, "groups"):
      graphdef, stacked = self._stacked()
      first = pattern * jnp.arange(repeats)

      def scanned(x: jax.Array, inputs: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, list[Any]]:
        params, first = inputs
        return nnx.merge(graphdef, params)(x, tap, first)

      def inlined(x: jax.Array, summands: Summands, inputs: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, Summands, list[Any]]:
        params, first = inputs
        return nnx.merge(graphdef, params).late(x, summands, tap, first)

      if self.config.scan:
        x, results["groups"] = jax.lax.scan(self._rematerialised(scanned), x, (stacked, first))
      else:
        leaves, structure = jax.tree.flatten((stacked, first))
        found, apply = [], self._rematerialised(inlined)
        for group in zip(*map(jnp.unstack, leaves)):
          x, summands, result = apply(x, summands, jax.tree.unflatten(structure, group))
          found.append(result)
        results["groups"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    if hasattr(self, "tail"):
      x, summands, results["tail"] = self._rematerialised(
        lambda x, summands, group: group.late(x, summands, tap, pattern * repeats))(x, summands, self.tail)
    products, _ = summands
    if products:
      return normed_sum(self.norm, x, summands, dispatch.fitting_implementation(self.config.implementation))[1], results
    return self.norm(x), results

  def extend(self, tokens: jax.Array, cache: Cache, counts: jax.Array | None = None, *,
             reach: int | None = None) -> tuple[jax.Array, Cache]:
    """The final norm's output for tokens that follow those of a cache: chunked prefill (T > 1) and decoding (T = 1).

    Args:
      tokens: (B, T) int32.
      cache: of B rows, with room for the new tokens unless the model has a window.
      counts: (B,) int32, how many of a row's T tokens count; the rest is padding on the right. None is all T.
      reach: slots of keys and values that are read, a value of `slots_for` that every row that counts keeps within; 0
        says that the cache is empty, and the ops of the full forward pass serve the call. None is all of them.

    Returns:
      (B, T, C), meaningless where padded, and the cache after the tokens that count.
    """
    B, T = tokens.shape
    span = Span(cache.lengths, jnp.full(B, T, jnp.int32) if counts is None else counts, cache.table)
    x, updates = constrain(self.embed(tokens), ("batch", "sequence", "features")), {}
    if T == 1 and self.decodes_in_turn(cache):
      for name, groups in self._repetitions().items():
        x, updates[name] = _in_turn(x, groups, cache.layers[name], span, reach)
      return self.norm(x), cache.after(updates, span)
    if hasattr(self, "groups"):
      graphdef, stacked = self._stacked()

      def apply(x: jax.Array, inputs: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
        params, pasts = inputs
        return nnx.merge(graphdef, params).extend(x, pasts, span, reach)

      x, updates["groups"] = jax.lax.scan(apply, x, (stacked, cache.layers["groups"]))  # inlined, it would copy the cache
    if hasattr(self, "tail"):
      x, update = self.tail.extend(x, jax.tree.map(lambda leaf: leaf[0], cache.layers["tail"]), span, reach)
      updates["tail"] = jax.tree.map(lambda leaf: leaf[None], update)
    return self.norm(x), cache.after(updates, span)

  def decodes_in_turn(self, cache: Cache) -> bool:
    """Whether decoding goes from layer to layer without a loop, as kernels that find their layer in stacked arrays need it;
    on a GPU always, because the loop's copies of each layer's share would cost more."""
    return dispatch.platform() == "gpu" or (dispatch.platform() == "tpu" and self.skips_unused_slots(cache))

  def skips_unused_slots(self, cache: Cache) -> bool:
    """Whether decoding reads every row of such a cache up to its own length, so that no `reach` is needed."""
    return cache.keys is not None and skips_unused_slots(
      cache.keys, self.config.num_heads, layers.activation_dtype(self.config), paged=cache.table is not None,
      implementation=dispatch.fitting_implementation(self.config.implementation))

  def _repetitions(self) -> dict[str, list[Group]]:
    """The groups of blocks one by one, by the names of `Cache.layers`."""
    found = {}
    if hasattr(self, "groups"):
      repeats = self.config.num_layers // len(self.config.block_pattern)
      found["groups"] = list(self.groups) if isinstance(self.groups, nnx.List) else [
        _of_stack(self.groups, i) for i in range(repeats)]
    if hasattr(self, "tail"):
      found["tail"] = [self.tail]
    return found

  def _stacked(self) -> tuple[nnx.GraphDef, nnx.State]:
    """The groups as one whose arrays have a first axis, over repetitions."""
    if not isinstance(self.groups, nnx.List):
      return nnx.split(self.groups)
    graphdefs, states = zip(*map(nnx.split, self.groups))
    return graphdefs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

  def apart(self, join: bool = True) -> Atma:
    """A copy that computes the same in fewer steps when it `decodes_in_turn`; on a GPU each costs its start.

    Groups have arrays of their own, which are read where they lie (whole sequences and chunks stack them first, once a
    pass); with `join`, matrices of a global mixer that belong together are one.
    """
    model = nnx.merge(*nnx.split(self))
    if hasattr(self, "groups"):
      model.groups = nnx.List(self._repetitions()["groups"])
    for _, module in list(nnx.iter_graph(model)):
      if join and isinstance(module, GlobalMixer):
        module.join()
    return model

  def _rematerialised(self, apply: Any) -> Any:
    if self.config.remat == "none":
      return apply
    return jax.checkpoint(apply, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not self.config.scan)


def _of_stack(stacked: Group, index: int) -> Group:
  """One of stacked groups, its parameters without the axis of the stack."""
  graphdef, state = nnx.split(stacked)
  group = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))
  for _, parameter in nnx.iter_graph(group):
    if isinstance(parameter, nnx.Param):
      parameter.set_metadata(logical_axes=parameter.get_metadata("logical_axes")[1:])
  return group


def _in_turn(x: jax.Array, groups: list[Group], pasts: list[Past], span: Span,
             reach: int | None) -> tuple[jax.Array, list[Past]]:
  """`Group.extend` of one group after the other, without a loop: what is large in the pasts is used where it lies.

  Blocks get more rows than the pasts have; what comes of the others is dropped.
  """
  updates, rows = [], x.shape[0]
  if dispatch.platform() == "gpu" and rows < layers.FEW_ROWS and active_mesh() is None:
    x = layers.fill(x, layers.FEW_ROWS)  # for the matrix units anyway; a norm of a single row would take two steps
  for repetition, group in enumerate(groups):
    x, update = group.extend(x, [past.at(repetition) for past in pasts], span, reach)
    pasts = [dataclasses.replace(past, memory=new.memory) if isinstance(past, GlobalPast) else past
             for past, new in zip(pasts, update, strict=True)]
    updates.append(update)
  return x[:rows], [past.stepped(list(own)) for past, own in zip(pasts, zip(*updates), strict=True)]


def parameter_metadata(model: Atma) -> tuple[Any, Any]:
  """Trees shaped like ``nnx.to_pure_dict(nnx.state(model, nnx.Param))``: logical axes, and optimizer groups.

  Works on an abstract model (`nnx.eval_shape`) too.
  """
  state = nnx.state(model, nnx.Param)
  flat = nnx.to_flat_state(state)

  def tree(name: str) -> Any:
    return nnx.to_pure_dict(nnx.from_flat_state([(path, p.replace(p.get_metadata(name))) for path, p in flat]))

  return tree("logical_axes"), tree("optimizer")


def count_parameters(config: ModelConfig) -> int:
  """Parameters of a model of this configuration, counted from shapes alone."""
  model = nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

"""One training step: gradients over microbatches, the update, and the guard against non-finite numbers."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
import optax

from atma_jax.config import Config
from atma_jax.data.shards import split_mask
from atma_jax.data.sources import masks
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.models.mixers import without_documents
from atma_jax.sharding import constrain, named_sharding
from atma_jax.training.objective import auxiliary_loss, language_model_loss
from atma_jax.training.optimizer import RecipeOptimizer
from atma_jax.training.state import TrainState

Metrics = dict[str, jax.Array]  # scalars
TrainStep = jax.stages.Wrapped  # jitted (TrainState, tokens (B, T + 1)) -> (TrainState, Metrics)
Batch = tuple[Int[Array, "B T+1"], Float[Array, "B T"] | None]  # tokens, and the weights of the last T, None if they are equal
_AUXILIARY_STREAM = 0x617578  # folded into the seed, so that the draws are not those of the parameters


def make_train_step(config: Config, definition: ModelDefinition, optimizer: optax.GradientTransformation, mesh: Mesh,
                    state: TrainState, *, end_of_text: int | None = None) -> TrainStep:
  """Makes the jitted training step.

  Args:
    config: the recipe.
    definition: the model.
    optimizer: made by `atma_jax.training.state.optimizer_for`, or any other. The learning rates of the former are reported, and
      of another those that `optax.inject_hyperparams` keeps in its state.
    mesh: the devices.
    state: a state, or its shapes, whose shardings are pinned for input and output, so that the step compiles once.
    end_of_text: the tokenizer's id, which `train.document_masks` needs; without them it has no part in the step.

  Raises:
    UserError: document masks, and a mixer that does not know of them, or a source of conversations.

  Returns:
    ``(state, tokens (B, T + 1) int32) -> (state, metrics)``, with tokens as `TrainingData` gives them. The call reuses the
    buffers of the state it is given. The metrics are scalars on the devices: loss (nats per token), z (mean squared
    log-partition function), norms of gradient, update and parameters, learning rates, and the counts of skipped steps; with
    auxiliary objectives also their terms and ``total``, the loss that is minimised.
  """
  train, decay = config.train, config.train.ema_decay
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  replicated = NamedSharding(mesh, PartitionSpec())
  if train.document_masks and end_of_text is None:
    raise ValueError("end_of_text: must be given with config.train.document_masks")
  if train.document_masks and (kind := without_documents(config.model)):
    raise UserError(f"config.train.document_masks=True: must be False with mixer {kind}, which does not keep documents apart")
  if train.document_masks and masks(config.data.sources):
    raise UserError("config.train.document_masks=True: must be False with sources of conversations, whose messages all end "
                    "with end-of-text")
  first_token = end_of_text if train.document_masks else None
  auxiliary = train.auxiliary.regularizer != "baseline" or train.auxiliary.distractors > 0
  masked = masks(config.data.sources)

  def loss_fn(params: Params, batch: Batch, number: Int[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
    """The loss to minimise, and its reported terms; ``loss`` is one of them if other objectives are added to it."""
    tokens, weights = batch
    model = definition.merge(params)
    options: dict[str, Any] = {"z_loss": train.z_loss, "chunk": train.loss_chunk, "first_token": first_token}
    if auxiliary:
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(train.seed), _AUXILIARY_STREAM), number)
      return auxiliary_loss(model, tokens, key, train.auxiliary, weights, **options)
    loss, z = language_model_loss(model, tokens, weights, **options)
    return loss, {"z": z}

  def gradients(params: Params, batch: Batch, number: Int[Array, ""]) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
    """``((loss, terms), gradient)``, means over the microbatches."""
    value_and_grad = functools.partial(jax.value_and_grad(loss_fn, has_aux=True), number=number)
    if train.accumulation == 1:
      return value_and_grad(params, batch)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
      microbatch = jax.tree.map(lambda rows: constrain(rows, ("batch", None)), microbatch)
      return jax.tree.map(jnp.add, total, value_and_grad(params, microbatch)), None

    # Microbatch i takes rows i, i + n, i + 2 n, ... of n microbatches, so that every device keeps its own rows of the batch.
    microbatches = jax.tree.map(lambda rows: jnp.swapaxes(rows.reshape(-1, train.accumulation, rows.shape[1]), 0, 1), batch)
    first = jax.tree.map(lambda rows: rows[0], microbatches)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(value_and_grad, params, first))
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda leaf: leaf / train.accumulation, total)

  def step(state: TrainState, tokens: Int[Array, "B T+1"]) -> tuple[TrainState, Metrics]:
    chex.assert_rank(tokens, 2)
    chex.assert_type(tokens, jnp.int32)
    (loss, terms), grads = gradients(state.params, _batch(tokens, masked), state.step)
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = {}
    if decay is not None and state.ema:
      ema = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, state.ema, params)

    def keep(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    bad = jnp.where(good, 0, 1)
    applied = state.step - state.bad_steps_total
    new_state = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state),
                           keep(ema, state.ema), jnp.where(good, 0, state.bad_steps + 1), state.bad_steps_total + bad)
    metrics = {"loss": loss, **({"total": loss} if auxiliary else {}), **terms, "grad_norm": grad_norm,
               "update_norm": optax.tree.norm(updates), "param_norm": optax.tree.norm(params),
               "bad_steps": new_state.bad_steps, "bad_steps_total": new_state.bad_steps_total}
    if isinstance(optimizer, RecipeOptimizer):  # another one may have other groups, or none
      metrics |= {f"learning_rate/{group}": rate for group, rate in optimizer.rates(applied).items()}
    else:  # what `optax.inject_hyperparams` keeps
      found = optax.tree.get_all_with_path(opt_state, "learning_rate", lambda _, value: isinstance(value, jax.Array))
      names = ["learning_rate"] if len(found) == 1 else [f"learning_rate/{index}" for index in range(len(found))]
      metrics |= {name: rate for name, (_, rate) in zip(names, found, strict=True)}
    return new_state, metrics

  return jax.jit(step, donate_argnums=0, in_shardings=(shardings, named_sharding(mesh, ("batch", None))),
                 out_shardings=(shardings, replicated))


def _batch(tokens: Int[Array, "B T+1"], masked: bool) -> Batch:
  """The tokens without `MASKED`, and weights whose mean over the whole batch is 1, or 0 if no token of it counts.

  So the mean over microbatches of their weighted losses is the mean over the tokens that count, however these are spread.
  """
  if not masked:
    return tokens, None
  tokens, counts = split_mask(tokens)
  weights = counts[:, 1:].astype(jnp.float32)
  return tokens, weights * (weights.size / jnp.maximum(jnp.sum(weights), 1))

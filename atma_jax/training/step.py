"""One training step: gradients over microbatches, clip, update, and the guard against non-finite numbers."""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from atma_jax.config import Config
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.sharding import constrain, named_sharding
from atma_jax.training.objective import auxiliary_loss, language_model_loss
from atma_jax.training.optimizer import learning_rates
from atma_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
_AUXILIARY_STREAM = 0x617578  # folded into the seed: not the keys that the parameters are drawn from


def make_train_step(config: Config, definition: ModelDefinition, optimizer: optax.GradientTransformation, mesh: Mesh,
                    state: TrainState) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
  """Jitted ``(state, tokens (B, T + 1)) -> (state, metrics)``; the old state's buffers are reused.

  `state` gives the shardings, which are pinned on both sides so that the step compiles once. Metrics are scalars on
  the devices: loss (nats a token), z (mean squared log-partition), gradient, update and parameter norms, learning
  rates, and the counts of skipped steps; with auxiliary objectives also their terms and the total that is descended.
  """
  train = config.train
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  replicated = NamedSharding(mesh, PartitionSpec())
  auxiliary = train.auxiliary.regularizer != "baseline" or train.auxiliary.distractors > 0

  def loss_fn(params: Params, tokens: jax.Array, number: jax.Array) -> tuple[jax.Array, Metrics]:
    """The loss, and terms of it that are reported, ``loss`` among them where it is not the whole."""
    model, options = definition.merge(params), {"z_loss": train.z_loss, "chunk": train.loss_chunk}
    if auxiliary:
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(train.seed), _AUXILIARY_STREAM), number)
      return auxiliary_loss(model, tokens, key, train.auxiliary, **options)
    loss, z = language_model_loss(model, tokens, **options)
    return loss, {"z": z}

  def gradients(params: Params, tokens: jax.Array, number: jax.Array) -> tuple[tuple[jax.Array, Metrics], Params]:
    value_and_grad = functools.partial(jax.value_and_grad(loss_fn, has_aux=True), number=number)
    if train.accumulation == 1:
      return value_and_grad(params, tokens)

    def add(total, microbatch):
      return jax.tree.map(jnp.add, total, value_and_grad(params, constrain(microbatch, ("batch", None)))), None

    # Rows are dealt out in turn, so that every device keeps its own rows of the batch.
    microbatches = jnp.swapaxes(tokens.reshape(-1, train.accumulation, tokens.shape[1]), 0, 1)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(value_and_grad, params, microbatches[0]))
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda leaf: leaf / train.accumulation, total)

  def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
    (loss, terms), grads = gradients(state.params, tokens, state.step)
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = {}
    if state.ema:
      ema = jax.tree.map(lambda old, new: train.ema_decay * old + (1 - train.ema_decay) * new, state.ema, params)

    def keep(new, old):
      return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    bad = jnp.where(good, 0, 1)
    applied = state.step - state.bad_steps_total
    new_state = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state),
                           keep(ema, state.ema), jnp.where(good, 0, state.bad_steps + 1), state.bad_steps_total + bad)
    metrics = {"loss": loss, **({"total": loss} if auxiliary else {}), **terms, "grad_norm": grad_norm,
               "update_norm": optax.tree.norm(updates), "param_norm": optax.tree.norm(params),
               "bad_steps": new_state.bad_steps, "bad_steps_total": new_state.bad_steps_total}
    metrics |= {f"learning_rate/{group}": rate
                for group, rate in learning_rates(config.optimizer, train.steps, applied).items()}
    return new_state, metrics

  return jax.jit(step, donate_argnums=0, in_shardings=(shardings, named_sharding(mesh, ("batch", None))),
                 out_shardings=(shardings, replicated))

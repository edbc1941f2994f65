"""Continued training: a new run that starts from the weights of a checkpoint (``config.train.init_from``).

Only the weights are taken over, from the newest good step of a training workdir or from a published checkpoint. The optimizer,
the schedule and the data begin anew; ``config.optimizer.warmup_steps`` and ``config.optimizer.learning_rate_scale`` soften the
start.
"""

from __future__ import annotations

import dataclasses

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from atma_jax.checkpoints.load import load_model, load_tokenizer_of
from atma_jax.checkpoints.model_hub import is_on_hub
from atma_jax.checkpoints.steps import FOLDER, absolute
from atma_jax.config import TOKENIZER_OF_INIT_FROM, Config, leaves, shown
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition, params_of
from atma_jax.training.state import TrainState


def check_start(config: Config, workdir: str) -> None:
  """Raises `UserError`, before anything is prepared, if a new run is to start from what is no directory.

  A run that goes on from a step of its own no longer needs the checkpoint it started from.
  """
  origin = config.train.init_from
  if origin and not is_on_hub(origin) and not (absolute(workdir) / FOLDER).is_dir() and not absolute(origin).is_dir():
    raise UserError(f"config.train.init_from={origin}: no such directory; legal: a training workdir, a published checkpoint, "
                    "hf:USER/NAME, or empty")


def initial_tokenizer(config: Config) -> Tokenizer | None:
  """The tokenizer of ``config.train.init_from`` if ``config.data.tokenizer`` asks for it, else None.

  Raises:
    UserError: the checkpoint cannot be read.
  """
  if config.data.tokenizer != TOKENIZER_OF_INIT_FROM:
    return None
  try:
    return load_tokenizer_of(config.train.init_from)
  except UserError as error:
    raise UserError(f"config.train.init_from={config.train.init_from}: {error}") from error


def with_initial_weights(state: TrainState, config: Config, definition: ModelDefinition, tokenizer: Tokenizer,
                         mesh: Mesh) -> TrainState:
  """Replaces the weights of a fresh state by those of ``config.train.init_from``.

  Fields of the model may differ as long as every parameter has the same name and shape; those that do are logged.

  Args:
    state: a fresh state.
    config: of the new run.
    definition: of its model.
    tokenizer: of its data.
    mesh: of its devices.

  Returns:
    The state with other weights, in the dtype of this run, which its moving average starts from, too.

  Raises:
    UserError: the checkpoint cannot be read, or its parameters are those of another architecture.
  """
  origin = f"config.train.init_from={config.train.init_from}"
  try:
    loaded = load_model(config.train.init_from, mesh=mesh)
  except UserError as error:
    raise UserError(f"{origin}: {error}") from error
  stored, wanted = params_of(loaded.model), definition.abstract_params(mesh)
  theirs = {leaf.name: leaf.value for leaf in leaves(loaded.config.model, "config.model")}
  other = [f"{leaf.name}={shown(leaf.value)} (there: {shown(theirs[leaf.name])})"
           for leaf in leaves(config.model, "config.model") if leaf.value != theirs[leaf.name]]
  for name in sorted({*stored, *wanted}):
    shapes = [params[name].shape if name in params else "absent" for params in (stored, wanted)]
    if shapes[0] != shapes[1]:
      raise UserError(f"{origin}: another architecture: parameter {name} is {shapes[0]} there and {shapes[1]} here; fields that "
                      f"differ: {', '.join(other) or 'none'}")
  if other:
    logging.info("%s: fields of the model that differ: %s", origin, ", ".join(other))
  if (loaded.tokenizer.kind, loaded.tokenizer.to_bytes()) != (tokenizer.kind, tokenizer.to_bytes()):
    if config.data.tokenizer == TOKENIZER_OF_INIT_FROM:
      raise UserError(f"{origin}: {config.data.directory} was prepared with the tokenizer of another checkpoint: name another "
                      "config.data.directory or remove that one")
    logging.warning("%s: its tokenizer is not that of the data: the same token may mean something else", origin)
  shardings = {name: leaf.sharding for name, leaf in wanted.items()}

  def take(stored: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.copy(stored[name]).astype(wanted[name].dtype) for name in wanted}

  with jax.set_mesh(mesh):
    copies = [jax.jit(take, out_shardings=shardings)(stored) for _ in range(2 if state.ema else 1)]
  logging.info("%s: weights of step %d", origin, loaded.step)
  return dataclasses.replace(state, params=copies[0], ema=copies[-1] if state.ema else state.ema)

"""Periodic validation: loss on the validation stream, and on held-out documents past the training length."""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
import pathlib

import chex
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
import numpy as np

from atma_jax.config import Config
from atma_jax.data.pipeline import heldout_documents, validation_batches
from atma_jax.data.shards import split_mask
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.sharding import named_sharding


def make_validation(config: Config, definition: ModelDefinition, mesh: Mesh,
                    directory: pathlib.Path) -> Callable[[Params], dict[str, float]]:
  """Makes the validation of a run.

  Args:
    config: the recipe.
    definition: the model.
    mesh: the devices.
    directory: the prepared data.

  Returns:
    ``params -> {"validation/loss": nats, "validation/loss_at_4x": nats, ...}``. The losses at multiples of the training length
    are means over nested prefixes of the same documents, those as long as the largest multiple; multiples that no document
    reaches are left out. Of conversations, the first loss is that of the answers, the others are those of all tokens.
  """
  T, rows = config.data.sequence_length, mesh.shape["data"] * mesh.shape["fsdp"]
  sharding = named_sharding(mesh, ("batch", None))

  @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # so that every process has all losses
  def losses(params: Params, tokens: Int[Array, "B T+1"]) -> Float[Array, "B T"]:
    chex.assert_rank(tokens, 2)
    model = definition.merge(params)
    return model.token_losses(model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk=config.train.loss_chunk)

  batch_size = config.data.batch_size // config.train.accumulation
  documents = list(heldout_documents(directory)) if config.data.heldout_documents else []
  reached = [m for m in config.train.validation_lengths if any(len(d) > m * T for d in documents)]
  documents = [d[: max(reached) * T + 1] for d in documents if len(d) > max(reached) * T] if reached else []
  padded = -(-len(documents) // rows) * rows  # the first documents again, so that the rows divide over the mesh
  prefixes = np.stack([documents[i % len(documents)] for i in range(padded)]) if documents else None

  def place(tokens: Int[np.ndarray, "B T+1"]) -> Int[Array, "B T+1"]:
    return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])

  def validate(params: Params) -> dict[str, float]:
    batches = itertools.islice(validation_batches(config.data, directory, batch_size, T), config.train.validation_batches)
    with jax.set_mesh(mesh):
      tokens, counts = zip(*(split_mask(batch["tokens"]) for batch in batches))
      found = np.asarray([np.asarray(losses(params, place(rows))) for rows in tokens])
      counted = np.asarray(counts)[..., 1:]
      results = {"validation/loss": float(found.mean() if counted.all() else found[counted].mean())}
      if prefixes is not None:
        per_token = np.concatenate([np.asarray(losses(params, place(prefixes[i : i + rows]))) for i in range(0, padded, rows)])
        results |= {f"validation/loss_at_{m}x": float(per_token[:, : m * T].mean()) for m in reached}
    return results

  return validate

"""Periodic validation: loss on the validation stream, and on held-out documents past the training length."""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
import pathlib

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from atma_jax.config import Config
from atma_jax.data.pipeline import heldout_documents, validation_batches
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.ops import token_losses
from atma_jax.sharding import named_sharding, parts


def make_validation(config: Config, definition: ModelDefinition, mesh: Mesh,
                    directory: pathlib.Path) -> Callable[[Params], dict[str, float]]:
  """``params -> {"validation/loss": nats, "validation/loss_at_4x": nats, ...}``.

  The losses at multiples of the training length are means over nested prefixes of the same documents, those as long as
  the largest multiple; multiples that no document reaches are left out.
  """
  T, rows = config.data.sequence_length, mesh.shape["data"] * mesh.shape["fsdp"]
  sharding = named_sharding(mesh, ("batch", None))

  @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # every process sees all losses
  def losses(params: Params, tokens: jax.Array) -> jax.Array:
    model = definition.merge(params)
    return token_losses(model.hidden(tokens[:, :-1]), model.head.kernel[...], model.head.bias[...], tokens[:, 1:],
                        cap=config.model.logit_cap, chunk=config.train.loss_chunk, parts=parts("sequence"))

  batch_size = config.data.batch_size // config.train.accumulation
  documents = [d for d in heldout_documents(directory)] if config.data.heldout_documents else []
  reached = [m for m in config.train.validation_lengths if any(len(d) > m * T for d in documents)]
  documents = [d[: max(reached) * T + 1] for d in documents if len(d) > max(reached) * T] if reached else []
  documents = np.stack([documents[i % len(documents)] for i in range(-(-len(documents) // rows) * rows)]) if documents else None

  def place(rows: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

  def validate(params: Params) -> dict[str, float]:
    batches = itertools.islice(validation_batches(config.data, directory, batch_size, T), config.train.validation_batches)
    with jax.set_mesh(mesh):
      sums = [losses(params, place(batch["tokens"])) for batch in batches]
      results = {"validation/loss": float(np.mean([np.asarray(s) for s in sums]))}
      if documents is not None:
        parts = [np.asarray(losses(params, place(documents[i : i + rows]))) for i in range(0, len(documents), rows)]
        per_token = np.concatenate(parts)
        results |= {f"validation/loss_at_{m}x": float(per_token[:, : m * T].mean()) for m in reached}
    return results

  return validate

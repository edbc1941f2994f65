"""Forward passes over held-out documents that look inside the model: the results of a tap for every layer."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int
import numpy as np

from atma_jax.errors import UserError, divides_over_context
from atma_jax.evaluation.resources import memory_errors
from atma_jax.evaluation.scoring import batch_devices
from atma_jax.evaluation.suite import Inputs
from atma_jax.models.block import Tap
from atma_jax.sharding import named_sharding

_BATCH_TOKENS = 8192
_MOST_DOCUMENTS = 8


def document_rows(inputs: Inputs, suite: str) -> Int[np.ndarray, "N T"]:
  """End-of-text and the beginnings of at most 8 held-out documents, together as long as the longest length.

  Raises:
    UserError: no document is that long; the message names `suite`.
  """
  longest = inputs.lengths[-1]
  documents = [d for d in inputs.documents if len(d) >= longest - 1][:_MOST_DOCUMENTS]
  if not documents:
    most = max(map(len, inputs.documents), default=0)
    raise UserError(f"--suite={suite}: no held-out document has the longest length of {longest} tokens, the longest has "
                    f"{most}: shorten --multiples, or prepare more config.data.heldout_documents")
  return np.stack([np.concatenate([[inputs.tokenizer.eot_id], d[:longest - 1]]) for d in documents]).astype(np.int32)


def tap_layers(inputs: Inputs, rows: Int[np.ndarray, "N T"], tap: Tap) -> list[Any]:
  """The results of `tap` for every layer, as NumPy arrays whose first axis is that of the rows.

  Rows are spread over the mesh and take one ordinary forward pass. Besides its activations, the results are all that needs
  memory. Every tap is compiled once per shape.

  Raises:
    OutOfMemory: a device cannot hold the pass.
    UserError: the mesh has a context axis that the rows do not divide over.
  """
  context = inputs.mesh.shape["context"]
  if not divides_over_context(rows.shape[1], context):
    raise UserError(f"--context={context}: a length of {rows.shape[1]} tokens is no multiple of {2 * context}")
  graphdef, state = nnx.split(inputs.model)
  sharding = named_sharding(inputs.mesh, ("batch", None))
  devices = batch_devices(inputs.mesh)
  size = min(max(1, _BATCH_TOKENS // rows.shape[1]), -(-len(rows) // devices)) * devices

  def compile_() -> jax.stages.Compiled:
    run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state).tapped(tokens, tap)[1],
                  out_shardings=NamedSharding(inputs.mesh, PartitionSpec()))
    return run.lower(state, jax.ShapeDtypeStruct((size, rows.shape[1]), np.int32, sharding=sharding)).compile()

  batches = []
  with memory_errors():
    for start in range(0, len(rows), size):
      batch = np.ascontiguousarray(rows[np.minimum(np.arange(start, start + size), len(rows) - 1)])
      tokens = jax.make_array_from_callback(batch.shape, sharding, lambda index, batch=batch: batch[index])
      results = inputs.scorer.run(("tapped", tap, graphdef, batch.shape), compile_, state, tokens)
      batches.append(jax.tree.map(lambda leaf: np.asarray(leaf), results))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:len(rows)], *batches)

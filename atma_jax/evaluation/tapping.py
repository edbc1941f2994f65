"""Passes over held-out documents that look inside: what a tap makes of every block, a row at a time spread over the mesh."""

from __future__ import annotations

import math
from typing import Any

from flax import nnx
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from atma_jax.errors import UserError
from atma_jax.evaluation.cells import Inputs
from atma_jax.evaluation.resources import memory_errors
from atma_jax.models.block import Tap
from atma_jax.sharding import named_sharding

_BATCH_TOKENS = 8192
_DOCUMENTS = 8


def document_rows(inputs: Inputs, suite: str) -> np.ndarray:
  """End-of-text and what follows, of at most 8 held-out documents as long as the longest length: (N, longest) int32.

  Raises:
    UserError: there is no such document.
  """
  longest = inputs.lengths[-1]
  documents = [d for d in inputs.documents if len(d) >= longest - 1][:_DOCUMENTS]
  if not documents:
    most = max(map(len, inputs.documents), default=0)
    raise UserError(f"--suite={suite}: no held-out document has the longest length of {longest} tokens, the longest has "
                    f"{most}: shorten --multiples, or prepare more config.data.heldout_documents")
  return np.stack([np.concatenate([[inputs.tokenizer.eot_id], d[:longest - 1]]) for d in documents]).astype(np.int32)


def tapped(inputs: Inputs, rows: np.ndarray, tap: Tap) -> list[Any]:
  """What `tap` makes of every layer over rows (N, T): its results, arrays with a leading axis of rows, in numpy.

  One normal forward pass; besides its activations, memory is what the results take. Compiled once a tap and shape.

  Raises:
    OutOfMemory: a device cannot hold what it takes.
    UserError: rows do not divide over a mesh that splits them.
  """
  context = inputs.mesh.shape["context"]
  if context > 1 and rows.shape[1] % (2 * context):
    raise UserError(f"--context={context}: a length of {rows.shape[1]} tokens is no multiple of {2 * context}")
  with memory_errors():
    return _tapped(inputs, rows, tap)


def _tapped(inputs: Inputs, rows: np.ndarray, tap: Tap) -> list[Any]:
  graphdef, state = nnx.split(inputs.model)
  sharding = named_sharding(inputs.mesh, ("batch", None))
  parts = math.prod(inputs.mesh.shape[axis] for axis in sharding.spec[0])
  size = min(max(1, _BATCH_TOKENS // rows.shape[1]), -(-len(rows) // parts)) * parts

  def compile_() -> jax.stages.Compiled:
    run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state).tapped(tokens, tap)[1],
                  out_shardings=NamedSharding(inputs.mesh, PartitionSpec()))
    return run.lower(state, jax.ShapeDtypeStruct((size, rows.shape[1]), np.int32, sharding=sharding)).compile()

  batches = []
  for start in range(0, len(rows), size):
    batch = np.ascontiguousarray(rows[np.minimum(np.arange(start, start + size), len(rows) - 1)])
    tokens = jax.make_array_from_callback(batch.shape, sharding, lambda index, batch=batch: batch[index])
    results = inputs.scorer.run(("tapped", tap, graphdef, batch.shape), compile_, state, tokens)
    batches.append(jax.tree.map(lambda leaf: np.asarray(leaf), results))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:len(rows)], *batches)

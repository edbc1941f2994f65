"""Per-token losses and predictions of a model, in batches spread over the mesh, compiled once a shape.

Attention streams over key blocks and the head over time, so memory grows linearly with the tokens of a batch: logits
exist for `chunk` time steps a sequence at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import copy
import math
import time

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from atma_jax.ops import token_losses, token_predictions
from atma_jax.sharding import named_sharding


class Scorer:
  """Scores rows of tokens under teacher forcing.

  Args:
    model: an `Atma`, or anything with ``hidden(tokens (B, T)) -> (B, T, C)`` and a ``head``.
    mesh: devices to spread the rows over; a batch has as many rows for each.
    cap: soft cap of the logits.
    batch_tokens: most tokens of a device's batch, except that one row always fits.
    chunk: time steps whose logits exist at once.
  """

  def __init__(self, model: nnx.Module, mesh: Mesh, *, cap: float, batch_tokens: int, chunk: int):
    self._graph, self._state = nnx.split(model)
    self._mesh = mesh
    self._cap, self._chunk, self._batch_tokens = cap, chunk, batch_tokens
    self._compiled: dict[tuple, jax.stages.Compiled] = {}
    self._rows_sharding = named_sharding(mesh, ("batch", None))
    self.compile_seconds = 0.0

  def of(self, model: nnx.Module) -> Scorer:
    """A scorer of another model; programs are shared with those of models of the same structure."""
    other = copy.copy(self)
    other._graph, other._state = nnx.split(model)
    return other

  @property
  def compilations(self) -> int:
    """Programs compiled so far."""
    return len(self._compiled)

  def losses(self, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Losses in nats of ``rows[:, 1:]`` given what precedes each; rows (N, L + 1) -> batches (n, L) float32, in order."""

    def losses(model, tokens):
      hidden = model.hidden(tokens[:, :-1])
      head = model.head
      return token_losses(hidden, head.kernel[...], head.bias[...], tokens[:, 1:], cap=self._cap, chunk=self._chunk)

    for result, in self._batches(losses, rows.shape[1], rows):
      yield result

  def at_positions(self, rows: np.ndarray, positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Losses (n, P) float32 and predictions (n, P) int32 of the tokens at `positions` (N, P), each at least 1.

    Logits exist at these positions only. Rows (N, L) may be padded on the right: the model is causal.
    """

    def at_positions(model, tokens, positions):
      hidden = jnp.take_along_axis(model.hidden(tokens), positions[:, :, None] - 1, axis=1)
      targets = jnp.take_along_axis(tokens, positions, axis=1)
      weights = model.head.kernel[...], model.head.bias[...]
      losses = token_losses(hidden, *weights, targets, cap=self._cap, chunk=self._chunk)
      return losses, token_predictions(hidden, *weights, cap=self._cap, chunk=self._chunk)

    yield from self._batches(at_positions, rows.shape[1], rows, positions)

  def _batches(self, function: Callable, length: int, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Calls ``function(model, *batch)`` on batches of one shape: the last is filled up with copies of its last row."""
    parts = math.prod(self._mesh.shape[axis] for axis in self._rows_sharding.spec[0])
    count = len(arrays[0])
    size = parts * min(max(1, self._batch_tokens // length), math.ceil(count / parts))
    for start in range(0, count, size):
      index = np.minimum(np.arange(start, start + size), count - 1)
      batch = [self._place(array[index]) for array in arrays]
      results = self._program(function, batch)(self._state, *batch)
      keep = min(size, count - start)
      yield tuple(np.asarray(r)[:keep] for r in (results if isinstance(results, tuple) else (results,)))

  def _place(self, array: np.ndarray) -> jax.Array:
    array = np.ascontiguousarray(array, np.int32)
    return jax.make_array_from_callback(array.shape, self._rows_sharding, lambda index: array[index])

  def _program(self, function: Callable, batch: list[jax.Array]) -> jax.stages.Compiled:
    key = (self._graph, function.__name__, *(array.shape for array in batch))
    if key not in self._compiled:
      started = time.perf_counter()
      everywhere = NamedSharding(self._mesh, PartitionSpec())
      call = jax.jit(lambda state, *batch: function(nnx.merge(self._graph, state), *batch), out_shardings=everywhere)
      with jax.set_mesh(self._mesh):
        self._compiled[key] = call.lower(self._state, *batch).compile()
      self.compile_seconds += time.perf_counter() - started
    return self._compiled[key]

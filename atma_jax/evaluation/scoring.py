"""Per-token losses and predictions of a model, in batches spread over the mesh, compiled once a shape.

Attention streams over key blocks and the head over time, so memory grows linearly with the tokens of a batch: logits
exist for `chunk` time steps a sequence at once. Rows longer than `prefill_chunk` are read piece by piece, the state of the
model carried from one to the next: the numbers are those of a single pass, and of what grows with the length only the
keys and values of the global blocks are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import copy
import functools
import math
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from atma_jax.evaluation.resources import OutOfMemory, available_bytes, memory_errors
from atma_jax.models.cache import Cache
from atma_jax.ops import token_losses, token_predictions
from atma_jax.sharding import named_sharding, parts

_PIECES = 128, 16_384  # least and most tokens of a piece, within which later keys are masked, not skipped


class Scorer:
  """Scores rows of tokens under teacher forcing.

  Args:
    model: an `Atma`, or, for rows within `prefill_chunk`, anything with ``hidden(tokens (B, T)) -> (B, T, C)`` and a ``head``.
    mesh: devices to spread the rows over; a batch has as many rows for each. With context > 1 rows are split as well,
      and always take one pass.
    cap: soft cap of the logits.
    batch_tokens: most tokens of a device's batch, except that one row always fits.
    chunk: time steps whose logits exist at once.
    prefill_chunk: most tokens of a row that is taken in one forward pass.
    memory_bytes: most that a program may take on a device, besides the parameters; None is what is free there.
  """

  def __init__(self, model: nnx.Module, mesh: Mesh, *, cap: float, batch_tokens: int, chunk: int,
               prefill_chunk: int = 65_536, memory_bytes: int | None = None):
    self._graph, self._state = nnx.split(model)
    self._config = getattr(model, "config", None)
    self._mesh = mesh
    self._cap, self._chunk, self._batch_tokens = cap, chunk, batch_tokens
    self._context = mesh.shape["context"]
    self._prefill_chunk = math.inf if self._context > 1 else prefill_chunk
    self._memory_bytes = memory_bytes
    self._compiled: dict[tuple, tuple[jax.stages.Compiled, int]] = {}
    self._rows_sharding = named_sharding(mesh, ("batch", None))
    self._parts = math.prod(mesh.shape[axis] for axis in self._rows_sharding.spec[0])
    self.compile_seconds = 0.0
    self.largest_program = 0  # bytes on a device, of those used since it was last set to 0

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
    """Losses in nats of ``rows[:, 1:]`` given what precedes each; rows (N, L + 1) -> batches (n, L) float32, in order.

    Raises:
      OutOfMemory: a device cannot hold what it takes.
    """
    length = rows.shape[1] - 1
    score = self._losses if length <= self._prefill_chunk else self._losses_in_pieces
    with memory_errors():
      for keep, index in self._batches(length, len(rows)):
        yield score(rows[index])[:keep]

  def at_positions(self, rows: np.ndarray, positions: np.ndarray, *,
                   batch_size: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Losses (n, P) float32 and predictions (n, P) int32 of the tokens at `positions` (N, P), each at least 1.

    Logits exist at these positions only. Rows (N, L) may be padded on the right: the model is causal. A `batch_size` is
    kept whatever N is; without one, a few rows make a batch of their own size.

    Raises:
      OutOfMemory: a device cannot hold what it takes.
    """
    score = self._at_positions if rows.shape[1] <= self._prefill_chunk else self._at_positions_in_pieces
    with memory_errors():
      for keep, index in self._batches(rows.shape[1], len(rows), batch_size):
        losses, predictions = score(rows[index], positions[index])
        yield losses[:keep], predictions[:keep]

  def _batches(self, length: int, count: int, size: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Row indices of batches of one size, the last filled up with its last row, and how many of each count."""
    if size is None:
      size = self._parts * min(max(1, self._batch_tokens * self._context // length), math.ceil(count / self._parts))
    size = math.ceil(size / self._parts) * self._parts
    for start in range(0, count, size):
      yield min(size, count - start), np.minimum(np.arange(start, start + size), count - 1)

  # --- In one pass ----------------------------------------------------------------------------------------------------

  def _losses(self, rows: np.ndarray) -> np.ndarray:

    def losses(model, tokens):
      return self._token_losses(model, model.hidden(tokens[:, :-1]), tokens[:, 1:], parts("sequence"))

    return np.asarray(self._call(losses, self._place(self._fill_up(rows, targets=1))))[:, : rows.shape[1] - 1]

  def _at_positions(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:

    def at_positions(model, tokens, positions):
      hidden = jnp.take_along_axis(model.hidden(tokens), positions[:, :, None] - 1, axis=1)
      return self._token_scores(model, hidden, jnp.take_along_axis(tokens, positions, axis=1))

    return tuple(map(np.asarray, self._call(at_positions, self._place(self._fill_up(rows)), self._place(positions))))

  def _fill_up(self, rows: np.ndarray, targets: int = 0) -> np.ndarray:
    """Rows padded on the right so that all but the last `targets` tokens divide over the context axis; the model is causal."""
    padding = -(rows.shape[1] - targets) % (2 * self._context) if self._context > 1 else 0
    return np.pad(rows, ((0, 0), (0, padding)))

  # --- Piece by piece, the state carried over -------------------------------------------------------------------------

  def _losses_in_pieces(self, rows: np.ndarray) -> np.ndarray:

    def piece_losses(model, cache, tokens):
      hidden, cache = model.extend(tokens[:, :-1], cache)
      return cache, self._token_losses(model, hidden, tokens[:, 1:])

    length = rows.shape[1] - 1
    cache, losses = self._cache(len(rows), length), []
    for start, width in self._pieces(length):
      piece = np.zeros((len(rows), width + 1), np.int32)
      part = rows[:, start:start + width + 1]
      piece[:, :part.shape[1]] = part
      cache, found = self._call(piece_losses, cache, self._place(piece), donate=True)
      losses.append(found)
    return np.concatenate(list(map(np.asarray, losses)), axis=1)[:, :length]

  def _at_positions_in_pieces(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:

    def piece_hidden(model, carry, tokens, positions):
      cache, found = carry
      offsets = positions - 1 - cache.lengths[:, None]
      hidden, cache = model.extend(tokens, cache)
      here = jnp.take_along_axis(hidden, jnp.clip(offsets, 0, tokens.shape[1] - 1)[:, :, None], axis=1)
      inside = (offsets >= 0) & (offsets < tokens.shape[1])
      return cache, jnp.where(inside[:, :, None], here, found)

    def scores(model, carry, targets):
      return carry, self._token_scores(model, carry, targets)

    length, at = rows.shape[1], self._place(positions)
    found = jnp.zeros((*positions.shape, self._config.width), self._config.activation_dtype)
    carry = self._cache(len(rows), length), jax.device_put(found, named_sharding(self._mesh, ("batch", None, None)))
    for start, width in self._pieces(length):
      piece = np.zeros((len(rows), width), np.int32)
      part = rows[:, start:start + width]
      piece[:, :part.shape[1]] = part
      carry = self._call(piece_hidden, carry, self._place(piece), at, donate=True)
    targets = self._place(np.take_along_axis(rows, positions, axis=1))
    return tuple(map(np.asarray, self._call(scores, carry[1], targets, donate=True)[1]))

  def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
    """Start and width of each piece: whole ones, and a rest whose width is the next power of two."""
    least, most = _PIECES[0], min(self._prefill_chunk, _PIECES[1])
    for start in range(0, length, most):
      yield start, min(most, max(least, 1 << (length - start - 1).bit_length()))

  def _cache(self, rows: int, length: int) -> Cache:
    """An empty cache for rows of this length, padding included, in one of eight sizes an octave."""
    needed = max(start + width for start, width in self._pieces(length))
    unit = max(1, (1 << (needed - 1).bit_length()) // 16)
    capacity = -(-needed // unit) * unit
    make = functools.partial(Cache.create, self._config, rows, capacity)
    shardings = jax.tree.map(lambda leaf: self._sharding(leaf.ndim > 1), jax.eval_shape(make))
    return self.run(("cache", rows, capacity), lambda: jax.jit(make, out_shardings=shardings).lower().compile())

  # --- Programs -------------------------------------------------------------------------------------------------------

  def _token_losses(self, model: Any, hidden: jax.Array, targets: jax.Array, pieces: int = 1) -> jax.Array:
    """Losses (B, T) of hidden (B, T, C); `pieces` is how many the time axis is split into over the mesh."""
    return token_losses(hidden, model.head.kernel[...], model.head.bias[...], targets, cap=self._cap, chunk=self._chunk,
                        parts=pieces)

  def _token_scores(self, model: Any, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    predictions = token_predictions(hidden, model.head.kernel[...], model.head.bias[...], cap=self._cap, chunk=self._chunk)
    return self._token_losses(model, hidden, targets), predictions

  def _sharding(self, stacked: bool) -> NamedSharding:
    """Of arrays (repetition, B, ...) or (B, ...): rows over the mesh."""
    return named_sharding(self._mesh, (None, "batch") if stacked else ("batch",))

  def _place(self, array: np.ndarray) -> jax.Array:
    array = np.ascontiguousarray(array, np.int32)
    return jax.make_array_from_callback(array.shape, self._rows_sharding, lambda index: array[index])

  def _call(self, function: Callable, *arguments: Any, donate: bool = False) -> Any:
    """``function(model, *arguments)``, compiled once a shape; `donate` gives up the first argument, a carry that comes back
    first and as it was laid out."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(arguments)]

    def compile_() -> jax.stages.Compiled:
      everywhere = NamedSharding(self._mesh, PartitionSpec())
      carry = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
      out = everywhere
      if donate:
        results = jax.eval_shape(lambda state, *a: function(nnx.merge(self._graph, state), *a), self._state, *arguments)
        same = jax.tree.structure(results) == jax.tree.structure(arguments[0])
        out = carry if same else (carry, everywhere)
      call = jax.jit(lambda state, *a: function(nnx.merge(self._graph, state), *a), out_shardings=out,
                     donate_argnums=1 if donate else ())
      return call.lower(self._state, *arguments).compile()

    return self.run((function.__name__, self._graph, *shapes), compile_, self._state, *arguments)

  def run(self, key: tuple, compile_: Callable[[], jax.stages.Compiled], *arguments: Any) -> Any:
    """The result of a program for these arguments, compiled where there is none of this key; the key's first entry names it.

    Raises:
      OutOfMemory: a device cannot hold what it takes.
    """
    if key not in self._compiled:
      started = time.perf_counter()
      with jax.set_mesh(self._mesh):
        compiled = compile_()
      self._compiled[key] = compiled, self._bytes_needed(compiled)
      self.compile_seconds += time.perf_counter() - started
    compiled, needed = self._compiled[key]
    self.largest_program = max(self.largest_program, needed)
    free = self._memory_bytes if self._memory_bytes is not None else available_bytes(self._mesh.devices.flat[0])
    if free is not None and needed > free:
      raise OutOfMemory(f"{key[0]} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free")
    return compiled(*arguments)

  def _bytes_needed(self, compiled: jax.stages.Compiled) -> int:
    """What a call takes on a device besides its arguments."""
    sizes = compiled.memory_analysis()
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes

"""Per-token losses and predictions of a model: batches are spread over a mesh, and each shape is compiled once.

Compiling takes longer than most evaluations, so programs are few: the layers and what is asked of their output are programs of
their own, rows are padded to a few lengths, and batches of one length always have as many rows. All suites that read contexts
of one length share the program of the layers.

Attention streams over blocks of keys, and the head over time: logits exist for `chunk` time steps of each row at once. So the
memory of a batch grows linearly with its tokens. A row longer than `prefill_chunk` is read piece by piece, and the model's
cache is carried from one piece to the next. The results are those of a single pass, and all that still grows with the length
are the keys and values of the global blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import copy
import functools
import math
import time
from typing import Any

from absl import logging
import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
import numpy as np

from atma_jax.evaluation.resources import OutOfMemory, available_bytes, memory_errors
from atma_jax.models import Atma
from atma_jax.models.cache import Cache
from atma_jax.models.residual import ACTIVATIONS
from atma_jax.sharding import named_sharding

_SHORTEST_PIECE, _LONGEST_PIECE = 128, 16_384  # tokens; within a piece later keys are masked, between pieces they do not exist
_SHORTEST_ROW, _FEWEST_POSITIONS = 16, 8
_WITH_LAYERS = ("hidden", "extend", "tapped")  # names of programs
_WHOLE_OCTAVES = 2048  # rows up to here are padded to powers of two, longer ones to a sixteenth of the next one


class Scorer:
  """Scores rows of tokens under teacher forcing.

  Args:
    model: the model.
    mesh: devices that the rows of a batch are spread over. With a context axis the rows themselves are split as well, and
      always take a single pass.
    batch_tokens: most tokens of a batch on each device, except that one row is always allowed.
    chunk: time steps whose logits exist at once.
    prefill_chunk: most tokens of a row that are read in one forward pass.
    memory_bytes: most memory that a program may use on a device, besides the parameters; None is what is free there.
  """

  def __init__(self, model: Atma, mesh: Mesh, *, batch_tokens: int, chunk: int, prefill_chunk: int = 65_536,
               memory_bytes: int | None = None):
    self._graph, self._state = nnx.split(model)
    self._config = model.config
    self._mesh = mesh
    self._chunk, self._batch_tokens = chunk, batch_tokens
    self._context = mesh.shape["context"]
    self._prefill_chunk = math.inf if self._context > 1 else prefill_chunk
    self._memory_bytes = memory_bytes
    self._compiled: dict[tuple[Any, ...], tuple[jax.stages.Compiled, int]] = {}
    self.compile_seconds = 0.0
    self.largest_program = 0  # bytes on a device, of the programs run since this was last set to 0

  def for_model(self, model: Atma) -> Scorer:
    """A scorer of another model, which shares compiled programs with all scorers of models of the same structure."""
    other = copy.copy(self)
    other._graph, other._state = nnx.split(model)
    return other

  def rows_at_once(self, length: int) -> int:
    """Rows of this length in a full batch, over all devices."""
    return round_up_rows(batch_devices(self._mesh) * max(1, self._batch_tokens * self._context // length), self._mesh)

  @property
  def compilations(self) -> int:
    """Number of programs with the model's layers compiled so far; those that read their output take a tenth of the time."""
    return sum(name in _WITH_LAYERS for name, *_ in self._compiled)

  def losses(self, rows: Int[np.ndarray, "N T+1"]) -> Iterator[Float[np.ndarray, "n T"]]:
    """Yields batches of losses, in nats and in order, of every token but the first given the tokens before it.

    Raises:
      OutOfMemory: the computation does not fit on a device.
    """
    chex.assert_rank(rows, 2)
    length = rows.shape[1] - 1
    score = self._losses if length <= self._prefill_chunk else self._losses_in_pieces
    with memory_errors():
      for keep, index in self._batches(length, len(rows)):
        yield score(rows[index])[:keep]

  def at_positions(self, rows: Int[np.ndarray, "N T"], positions: Int[np.ndarray, "N P"], *,
                   batch_size: int | None = None) -> Iterator[tuple[Float[np.ndarray, "n P"], Int[np.ndarray, "n P"]]]:
    """Yields batches of losses in nats, and of predictions, of the tokens at some positions only.

    Args:
      rows: may be padded on the right, because the model is causal.
      positions: each at least 1. Logits exist for these positions only.
      batch_size: rows of every batch of a caller who sees to it himself that shapes are few; rows and positions are then not
        padded. By default it goes by `batch_tokens`.

    Raises:
      OutOfMemory: the computation does not fit on a device.
    """
    chex.assert_rank((rows, positions), 2)
    chex.assert_equal_shape_prefix((rows, positions), 1)
    length, count = rows.shape[1] - 1, positions.shape[1]  # nothing follows the last token
    score = self._at_positions if length <= self._prefill_chunk else self._at_positions_in_pieces
    if batch_size is None:
      more = max(_FEWEST_POSITIONS, 1 << (count - 1).bit_length()) - count
      positions = np.pad(positions, ((0, 0), (0, more)), mode="edge")
    with memory_errors():
      for keep, index in self._batches(length, len(rows), batch_size):
        width = self._padded(length) if batch_size is None else self._divisible(length)
        losses, predictions = score(rows[index], positions[index], width)
        yield losses[:keep, :count], predictions[:keep, :count]

  def _batches(self, length: int, count: int, size: int | None = None) -> Iterator[tuple[int, Int[np.ndarray, " size"]]]:
    """Splits `count` rows into batches of equal size: how many rows of each are real, and the indices of its rows.

    The last batch is filled up with repetitions of the last row. The size depends on the length alone, if it is not given; but
    with a context axis, where rows are long as a rule, few rows make a smaller batch.
    """
    if size is None:
      devices = batch_devices(self._mesh)
      most = max(1, self._batch_tokens * self._context // self._padded(length))
      size = devices * (min(most, math.ceil(count / devices)) if self._context > 1 else most)
    size = round_up_rows(size, self._mesh)
    for start in range(0, count, size):
      yield min(size, count - start), np.minimum(np.arange(start, start + size), count - 1)

  # --- In one pass ----------------------------------------------------------------------------------------------------

  def _losses(self, rows: Int[np.ndarray, "B T+1"]) -> Float[np.ndarray, "B T"]:
    length = rows.shape[1] - 1
    hidden = self._hidden(rows, self._padded(length))
    targets = self._place(_widened(rows[:, 1:], hidden.shape[1]))
    return np.asarray(self._call(self._token_losses, hidden, targets))[:, :length]

  def _at_positions(self, rows: Int[np.ndarray, "B T"], positions: Int[np.ndarray, "B P"],
                    width: int) -> tuple[Float[np.ndarray, "B P"], Int[np.ndarray, "B P"]]:

    def at_positions(model: Atma, hidden: Float[Array, "B T C"], positions: Int[Array, "B P"],
                     targets: Int[Array, "B P"]) -> tuple[Float[Array, "B P"], Int[Array, "B P"]]:
      return self._token_scores(model, jnp.take_along_axis(hidden, positions[:, :, None] - 1, axis=1), targets)

    targets = self._place(np.take_along_axis(rows, positions, axis=1))
    losses, predictions = self._call(at_positions, self._hidden(rows, width), self._place(positions), targets)
    return np.asarray(losses), np.asarray(predictions)

  def _hidden(self, rows: Int[np.ndarray, "B T+1"], width: int) -> Float[Array, "B width C"]:
    """The output of the final norm for all tokens but the last, padded on the right."""

    def hidden(model: Atma, tokens: Int[Array, "B T"]) -> Float[Array, "B T C"]:
      return model.hidden(tokens)

    return self._call(hidden, self._place(_widened(rows[:, :-1], width)), out=self._activations)

  def _token_losses(self, model: Atma, hidden: Float[Array, "B T C"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    return model.token_losses(hidden, targets, chunk=self._chunk)

  def _padded(self, length: int) -> int:
    """The width to which rows of this length are padded in a single pass; longer rows are read in pieces."""
    if self._context > 1 or length > self._prefill_chunk:
      return self._divisible(length)
    octave = 1 << (max(length, _SHORTEST_ROW) - 1).bit_length()
    unit = octave if octave <= _WHOLE_OCTAVES else octave // 16
    return min(-(-length // unit) * unit, max(length, int(self._prefill_chunk)))

  def _divisible(self, length: int) -> int:
    """The least width that divides over the context axis."""
    return length + (-length % (2 * self._context) if self._context > 1 else 0)

  # --- Piece by piece, with a cache -----------------------------------------------------------------------------------

  def _losses_in_pieces(self, rows: Int[np.ndarray, "B T+1"]) -> Float[np.ndarray, "B T"]:
    length, losses = rows.shape[1] - 1, []
    for start, hidden in self._hidden_in_pieces(rows):
      targets = _widened(rows[:, start + 1:start + 1 + hidden.shape[1]], hidden.shape[1])
      losses.append(self._call(self._token_losses, hidden, self._place(targets)))
    return np.concatenate(list(map(np.asarray, losses)), axis=1)[:, :length]

  def _at_positions_in_pieces(self, rows: Int[np.ndarray, "B T"], positions: Int[np.ndarray, "B P"],
                              width: int) -> tuple[Float[np.ndarray, "B P"], Int[np.ndarray, "B P"]]:
    del width  # pieces have widths of their own

    def pick(model: Atma, found: Float[Array, "B P C"], hidden: Float[Array, "B t C"],
             offsets: Int[Array, "B P"]) -> Float[Array, "B P C"]:
      del model
      here = jnp.take_along_axis(hidden, jnp.clip(offsets, 0, hidden.shape[1] - 1)[:, :, None], axis=1)
      inside = (offsets >= 0) & (offsets < hidden.shape[1])
      return jnp.where(inside[:, :, None], here, found)

    def scores(model: Atma, hidden: Float[Array, "B P C"], targets: Int[Array, "B P"]) -> tuple[Array, Array]:
      return self._token_scores(model, hidden, targets)

    rows_of = named_sharding(self._mesh, ("batch", None, None))
    found = jax.device_put(jnp.zeros((*positions.shape, self._config.width), self._config.activation_dtype), rows_of)
    for start, hidden in self._hidden_in_pieces(rows):
      found = self._call(pick, found, hidden, self._place(positions - 1 - start), donate=True, out=rows_of)
    targets = self._place(np.take_along_axis(rows, positions, axis=1))
    losses, predictions = self._call(scores, found, targets)
    return np.asarray(losses), np.asarray(predictions)

  def _hidden_in_pieces(self, rows: Int[np.ndarray, "B T+1"]) -> Iterator[tuple[int, Float[Array, "B t C"]]]:
    """Where each piece of the rows starts, and the output of the final norm for its tokens; the last token is not read."""

    def extend(model: Atma, cache: Cache, tokens: Int[Array, "B t"]) -> tuple[Cache, Float[Array, "B t C"]]:
      hidden, cache = model.extend(tokens, cache)
      return cache, hidden

    length = rows.shape[1] - 1
    cache = self._empty_cache(len(rows), length)
    for start, width in self._pieces(length):
      piece = _widened(rows[:, start:min(start + width, length)], width)
      out = jax.tree.map(lambda leaf: leaf.sharding, cache), self._activations
      cache, hidden = self._call(extend, cache, self._place(piece), donate=True, out=out)
      yield start, hidden

  def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
    """Start and width of each piece: the last one is as wide as the next power of two allows, all others are full."""
    longest = int(min(self._prefill_chunk, _LONGEST_PIECE))
    for start in range(0, length, longest):
      yield start, min(longest, max(_SHORTEST_PIECE, 1 << (length - start - 1).bit_length()))

  def _empty_cache(self, rows: int, length: int) -> Cache:
    """A cache for rows of this length, padding included, rounded up to one of eight sizes per octave."""
    needed = max(start + width for start, width in self._pieces(length))
    unit = max(1, (1 << (needed - 1).bit_length()) // 16)
    capacity = -(-needed // unit) * unit
    make = functools.partial(Cache.create, self._config, rows, capacity)
    shardings = jax.tree.map(lambda leaf: self._cache_sharding(leaf.ndim > 1), jax.eval_shape(make))
    return self.run(("cache", rows, capacity), lambda: jax.jit(make, out_shardings=shardings).lower().compile())

  # --- Programs -------------------------------------------------------------------------------------------------------

  def _token_scores(self, model: Atma, hidden: Float[Array, "B P C"],
                    targets: Int[Array, "B P"]) -> tuple[Float[Array, "B P"], Int[Array, "B P"]]:
    """Losses and predictions of targets at some positions, whose hidden states are not split over the context axis."""
    predictions = model.token_predictions(hidden, chunk=self._chunk, whole=False)
    return model.token_losses(hidden, targets, chunk=self._chunk, whole=False), predictions

  def _cache_sharding(self, stacked: bool) -> NamedSharding:
    """Spreads the rows of an array (B, ...), or of a stacked one (repetition, B, ...), over the mesh."""
    return named_sharding(self._mesh, (None, "batch") if stacked else ("batch",))

  def _place(self, array: Int[np.ndarray, "B ..."]) -> jax.Array:
    array = np.ascontiguousarray(array, np.int32)
    return jax.make_array_from_callback(array.shape, named_sharding(self._mesh, ("batch", None)), lambda index: array[index])

  @property
  def _activations(self) -> NamedSharding:
    return named_sharding(self._mesh, ACTIVATIONS)

  def _call(self, function: Callable[..., Any], *arguments: Any, donate: bool = False, out: Any = None) -> Any:
    """``function(model, *arguments)``, compiled once per shape.

    Args:
      function: its name identifies it.
      *arguments: pytrees of arrays.
      donate: give the memory of the first argument up for the results.
      out: shardings of the results; None has every device hold all of them.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(arguments)]

    def compile_() -> jax.stages.Compiled:
      call = jax.jit(lambda state, *a: function(nnx.merge(self._graph, state), *a),
                     out_shardings=NamedSharding(self._mesh, PartitionSpec()) if out is None else out,
                     donate_argnums=1 if donate else ())
      return call.lower(self._state, *arguments).compile()

    return self.run((function.__name__, self._graph, *shapes), compile_, self._state, *arguments)

  def run(self, key: tuple[Any, ...], compile_: Callable[[], jax.stages.Compiled], *arguments: Any) -> Any:
    """The result of a program, which is compiled if there is none of this key yet.

    Args:
      key: identifies the program; its first entry is the name that errors use. Its last entry, if the program runs the
        model's layers, is the shape of the tokens.
      compile_: compiles the program, with the mesh set.
      *arguments: of the program.

    Raises:
      OutOfMemory: the program does not fit on a device.
    """
    if key not in self._compiled:
      started = time.perf_counter()
      if key[0] in _WITH_LAYERS:  # the others are small
        logging.info("compiling the model for %s tokens (program %s) ...", " x ".join(map(str, key[-1])), key[0])
      with jax.set_mesh(self._mesh):
        compiled = compile_()
      self._compiled[key] = compiled, _bytes_needed(compiled)
      self.compile_seconds += time.perf_counter() - started
    compiled, needed = self._compiled[key]
    self.largest_program = max(self.largest_program, needed)
    free = self._memory_bytes if self._memory_bytes is not None else available_bytes(self._mesh.devices.flat[0])
    if free is not None and needed > free:
      raise OutOfMemory(f"{key[0]} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free")
    return compiled(*arguments)


def _widened(rows: Int[np.ndarray, "B T"], width: int) -> Int[np.ndarray, "B width"]:
  """Rows padded on the right with token 0."""
  return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def _bytes_needed(compiled: jax.stages.Compiled) -> int:
  """Memory that a call needs on a device besides its arguments."""
  sizes = compiled.memory_analysis()
  assert sizes is not None, "every backend that jax supports analyses memory"
  return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def batch_devices(mesh: Mesh) -> int:
  """Number of devices that the rows of a batch are spread over."""
  return math.prod(mesh.shape[axis] for axis in named_sharding(mesh, ("batch",)).spec[0])


def round_up_rows(rows: int, mesh: Mesh) -> int:
  """The least number of rows, at least `rows`, that divides evenly over the mesh."""
  devices = batch_devices(mesh)
  return -(-rows // devices) * devices

"""Batches of tokens from a prepared directory: a Grain pipeline whose whole state is one number.

Each source is one long stream of tokens. It is cut into windows of T + 1 tokens that start T apart, so every token is a target
once per epoch; the last window wraps around to the stream's start, so no tail is lost. Windows are reshuffled every epoch, and
sources are mixed by weight. Sequence i of a run is the same whatever the number of processes and wherever the run was
interrupted, so the state is the index of the next sequence, and seeking costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import os
import pathlib
from typing import Any

import grain
from jaxtyping import Int
import numpy as np

from atma_jax.config import DataConfig
from atma_jax.data.manifest import check_settings, load_manifest, load_prepared_tokenizer, open_stream, settings_of
from atma_jax.data.shards import TokenStream, split_mask
from atma_jax.data.sources import masks
from atma_jax.data.tokenizers import check_tokens
from atma_jax.errors import UserError

_READ_THREADS = 2
_MOST_AHEAD, _MEMORY_AHEAD = 4096, 0.25  # batches, and share of this machine's memory


class TokenWindows:
  """Random access to the windows of a stream: window i holds the tokens [i T, i T + T], (T + 1,) int32.

  Args:
    stream: the tokens.
    sequence_length: T.
    vocab_size: of the tokenizer; a window with a larger id raises `UserError`.
    name: of the stream, for error messages.
    masked: whether tokens may have the bit `shards.MASKED`.
  """

  def __init__(self, stream: TokenStream, sequence_length: int, vocab_size: int, name: str, masked: bool = False):
    self._stream = stream
    self._length = sequence_length
    self._vocab_size = vocab_size
    self._name = name
    self._masked = masked

  def __len__(self) -> int:
    return -(-len(self._stream) // self._length)

  def __getitem__(self, index: int) -> Int[np.ndarray, " T+1"]:
    start = index * self._length
    tokens = self._stream.read(start, start + self._length + 1)
    check_tokens(split_mask(tokens)[0] if self._masked else tokens, self._vocab_size, self._name)
    return tokens

  def __repr__(self) -> str:
    return f"TokenWindows({self._name}, {len(self)} windows)"


class TrainingData:
  """Endless iterator over training batches, {"tokens": (rows, T + 1) int32}.

  Tokens of conversations that are read but not predicted are negative, see `atma_jax.data.shards.split_mask`.

  Part p of n holds the rows [p B / n, (p + 1) B / n) of every global batch. A process reads the parts that its devices hold.

  Args:
    config: the data options, which must be those that the directory was prepared with.
    directory: written by `atma_jax.data.prepare.prepare`.
    parts: the parts of each global batch to read, in this order.
    part_count: n, the number of parts that a global batch is divided into.

  Attributes:
    manifest: of the directory.
    tokenizer: of the directory.

  Raises:
    UserError: `batch_size` is not a multiple of `part_count`, `prefetch` is too large, or the directory is missing, damaged or
      prepared differently.
  """

  def __init__(self, config: DataConfig, directory: str | os.PathLike, *, parts: Sequence[int] = (0,), part_count: int = 1):
    if config.batch_size % part_count:
      raise UserError(f"config.data.batch_size={config.batch_size}: must be a multiple of {part_count} parts")
    _check_prefetch(config, len(parts) / part_count)
    directory = pathlib.Path(directory)
    self.manifest = load_manifest(directory)
    check_settings(self.manifest.settings, settings_of(config), directory)
    self.tokenizer = load_prepared_tokenizer(directory, self.manifest)
    self._config = config
    self._parts, self._part_count = _coarsest(parts, part_count)
    self._sequences = _mixed_sequences(config, directory, self.manifest.train, self.tokenizer.vocab_size)
    self._fingerprint, self._fingerprints = self.manifest.fingerprint, self.manifest.fingerprints
    self._next_sequence = 0
    self._batches: grain.DatasetIterator | None = None

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batches = self._batches
    if batches is None:
      batches = self._batches = self._open()
    tokens = next(batches)
    self._next_sequence += self._config.batch_size
    return {"tokens": tokens}

  def get_state(self) -> dict[str, Any]:
    """Returns the position as JSON-ready values, the same in every process. Batches read ahead do not count."""
    return {"next_sequence": self._next_sequence, "manifest": self._fingerprint}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `get_state` was called, with any number of processes and any batch size.

    Raises:
      UserError: the state belongs to other prepared data.
    """
    if state["manifest"] not in self._fingerprints:
      raise UserError("config.data.directory: the checkpoint was trained on other prepared data than it now holds; "
                      "name the directory it was trained on")
    self.close()
    self._next_sequence = state["next_sequence"]

  def close(self) -> None:
    """Stops the reading threads. The next batch starts new ones."""
    if self._batches is not None:
      self._batches.close()
      self._batches = None

  def _open(self) -> grain.DatasetIterator:
    count = self._part_count
    rows = self._sequences[self._next_sequence:]  # endless, so there is no remainder
    split = rows.batch(self._config.batch_size // count, drop_remainder=True)
    batches = split[self._parts[0]::count]
    if len(self._parts) > 1:
      end = len(split) // count * count  # slices of equal length
      batches = grain.experimental.ZipMapDataset([split[part:end:count] for part in self._parts]).map(np.concatenate)
    threads = min(_READ_THREADS, self._config.prefetch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(threads, self._config.prefetch)))


def _check_prefetch(config: DataConfig, share: float) -> None:
  """Bounds what is read ahead: all of it is asked for before the first batch comes, and kept in memory."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  size = 4 * share * config.batch_size * (config.sequence_length + 1)
  most = min(_MOST_AHEAD, int(memory * _MEMORY_AHEAD / size))
  if config.prefetch > most:
    raise UserError(f"config.data.prefetch={config.prefetch}: must be at most {most} batches of {size / 2**20:,.1f} MiB in this "
                    "process")


def check_state(state: dict[str, Any]) -> None:
  """Raises ValueError for anything that `TrainingData.get_state` does not return."""
  following, manifest = state.get("next_sequence"), state.get("manifest")
  whole = isinstance(following, int) and not isinstance(following, bool) and 0 <= following < 2**62 and isinstance(manifest, str)
  if not whole or state.keys() != {"next_sequence", "manifest"}:
    raise ValueError(f"{str(state)[:80]} is no position in the data")


def _coarsest(parts: Sequence[int], count: int) -> tuple[list[int], int]:
  """Describes the same rows as few, large parts: returns the parts and their count."""
  parts = list(parts)
  while len(parts) > 1 and count % 2 == 0 and len(parts) % 2 == 0 and all(
      a % 2 == 0 and b == a + 1 for a, b in zip(parts[::2], parts[1::2])):
    parts, count = [part // 2 for part in parts[::2]], count // 2
  return parts, count


def _mixed_sequences(config: DataConfig, directory: pathlib.Path, records: list[dict[str, Any]],
                     vocab_size: int) -> grain.MapDataset:
  """The endless sequence of windows, (T + 1,) each: every source reshuffled each epoch, all sources mixed by weight."""
  seeds = np.random.SeedSequence(config.shuffle_seed).generate_state(len(records))
  datasets = []
  for record, seed in zip(records, seeds):
    windows = TokenWindows(open_stream(directory, record), config.sequence_length, vocab_size, record["source"],
                           masks([record["source"]]))
    datasets.append(grain.MapDataset.source(windows).shuffle(seed=int(seed)).repeat())
  return grain.MapDataset.mix(datasets, config.weights) if len(datasets) > 1 else datasets[0]


def validation_batches(config: DataConfig, directory: str | os.PathLike, batch_size: int,
                       sequence_length: int) -> Iterator[dict[str, np.ndarray]]:
  """Iterates over the validation stream once, in order: {"tokens": (batch_size, sequence_length + 1) int32}, as `TrainingData`.

  Args:
    config: the data options, which must be those that the directory was prepared with.
    directory: the prepared directory.
    batch_size: windows in a batch; the last batch is filled up from the start of the stream.
    sequence_length: T; windows start T apart.

  Raises:
    UserError: there are no validation documents, or the directory was prepared with other options.
  """
  directory = pathlib.Path(directory)
  manifest = load_manifest(directory)
  check_settings(manifest.settings, settings_of(config), directory)
  stream = _evaluation_stream(directory, "validation")
  windows = TokenWindows(stream, sequence_length, manifest.tokenizer["vocab_size"], "validation", masks(config.sources))

  def batches() -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(windows), batch_size):
      yield {"tokens": np.stack([windows[i % len(windows)] for i in range(first, first + batch_size)])}

  return batches()


def validation_stream(directory: str | os.PathLike) -> Int[np.ndarray, " S"]:
  """Returns the tokens of the validation documents, each followed by end-of-text, (S,) int32."""
  stream = _evaluation_stream(pathlib.Path(directory), "validation")
  return split_mask(stream.read(0, len(stream)))[0]


def heldout_documents(directory: str | os.PathLike) -> list[Int[np.ndarray, " S"]]:
  """Returns the held-out documents, longest first: int32 arrays that start with end-of-text, as documents do in training."""
  directory = pathlib.Path(directory)
  manifest = load_manifest(directory)
  stream = _evaluation_stream(directory, "heldout")
  end = np.array([manifest.tokenizer["eot_id"]], np.int32)
  return [np.concatenate([end, split_mask(stream.read(document["start"], document["start"] + document["tokens"]))[0]])
          for document in manifest.heldout["documents"]]


def _evaluation_stream(directory: pathlib.Path, split: str) -> TokenStream:
  stream = open_stream(directory, getattr(load_manifest(directory), split))
  if not len(stream):
    raise UserError(f"{directory} was prepared without {split} documents: set config.data.{split}_documents above 0 "
                    "and prepare another directory")
  return stream

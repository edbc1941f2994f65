"""The state of one sequence on disk: everything that a prompt left behind, so that a later process can continue it.

A file is one ``.npz`` of plain arrays with a JSON header. Keys and values are stored in the order of their positions, so a state
can be restored into a cache of any capacity that holds it, bit for bit as it was saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from atma_jax.config import Config, ModelConfig
from atma_jax.errors import UserError
from atma_jax.models.cache import Cache

SCHEMA = 1
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # stored as these, because NumPy cannot store bfloat16
_IRRELEVANT = ("remat", "scan", "implementation", "init", "param_dtype")  # fields that states do not depend on


def save_state(path: str | os.PathLike, tokens: Int[np.ndarray, " T"], cache: Cache, config: ModelConfig) -> None:
  """Writes a state to a file. An existing file is replaced once the new one is complete.

  Args:
    path: of the file.
    tokens: (T,) that the state comes after.
    cache: of one row.
    config: of the model.

  Raises:
    UserError: the file cannot be written.
  """
  length = int(cache.lengths[0])
  if cache.lengths.shape != (1,) or length != len(tokens):
    raise ValueError(f"save_state: a cache of lengths {cache.lengths} is not one row after {len(tokens)} tokens")
  arrays: dict[str, Any] = {"tokens": np.asarray(tokens, np.int32)}
  dtypes = {}
  for name, array, is_ring in _named(cache):
    array = np.asarray(array)
    if is_ring:
      array = array[:, :, :, _slots_in_order(length, array.shape[3])]
    dtypes[name] = array.dtype.name
    arrays[name] = array.view(_BITS[array.dtype.itemsize])
  header = {"schema": SCHEMA, "model": _identity(config), "dtypes": dtypes}
  target, partial = pathlib.Path(path), pathlib.Path(f"{path}.partial")
  try:
    with partial.open("wb") as file:
      np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    partial.replace(target)
  except OSError as error:
    raise UserError(f"{path}: the state cannot be written: {error}") from error


def stored_tokens(path: str | os.PathLike, config: ModelConfig) -> Int[np.ndarray, " T"]:
  """Returns the tokens (T,) that the state in a file comes after. Raises `UserError` as `load_state` does."""
  return _read(path, config)[0]


def load_state(path: str | os.PathLike, config: ModelConfig, capacity: int,
               dtype: str | None = None) -> tuple[Int[np.ndarray, " T"], Cache]:
  """Reads a state into a cache of one row.

  Args:
    path: of the file.
    config: of the model.
    capacity: tokens that the cache is made for, see `Cache.create`.
    dtype: of keys and values, see `Cache.create`.

  Returns:
    The tokens (T,) that the state comes after, and the cache.

  Raises:
    UserError: there is no such file, it is not a state, or the state is of another model, of another dtype or too long.
  """
  tokens, dtypes, arrays = _read(path, config)
  if config.window is None and len(tokens) > capacity:
    raise UserError(f"{path}: holds {len(tokens)} tokens, more than the {capacity} that fit")
  cache = Cache.create(config, 1, capacity, dtype)
  restored = {}
  for name, empty, is_ring in _named(cache):
    if dtypes.get(name) != empty.dtype.name:
      raise UserError(f"{path}: {name} is {dtypes.get(name)}, not {empty.dtype.name}: set the cache dtype to what it is")
    array = arrays[name].view(empty.dtype)
    if is_ring:
      slots = _slots_in_order(len(tokens), empty.shape[3])
      ring = np.zeros(empty.shape, empty.dtype)
      kept = min(len(slots), array.shape[3])
      ring[:, :, :, slots[len(slots) - kept:]] = array[:, :, :, array.shape[3] - kept:]
      array = ring
    restored[name] = jnp.asarray(array)
  return tokens, _with_arrays(cache, restored)


def _read(path: str | os.PathLike, config: ModelConfig) -> tuple[np.ndarray, dict[str, str], dict[str, np.ndarray]]:
  """Tokens, and the dtypes and the bits of every array."""
  try:
    with pathlib.Path(path).open("rb") as raw:
      if not zipfile.is_zipfile(raw):
        raise ValueError("no archive of arrays")
      raw.seek(0)
      with np.load(raw) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    tokens, dtypes, model, schema = arrays.pop("tokens"), header["dtypes"], header["model"], header["schema"]
  except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{path}: not a saved state, or damaged: {error}") from error
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error
  if schema != SCHEMA:
    raise UserError(f"{path}: a state of schema {schema}; legal: {SCHEMA}")
  ours, theirs = _identity(config), _identity(Config.from_dict({"model": model}).model)  # fields added since take their defaults
  if different := [name for name, value in ours.items() if theirs[name] != value]:
    raise UserError(f"{path}: the state of another model: it differs in {', '.join(different)}")
  return tokens, dtypes, arrays


def _identity(config: ModelConfig) -> dict[str, Any]:
  """The configuration that states of a model depend on, as JSON gives it back."""
  values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _IRRELEVANT}
  return json.loads(json.dumps(values))


def _slots_in_order(length: int, slots: int) -> np.ndarray:
  """Slots of the positions that a ring holds, oldest first."""
  return np.arange(max(length - slots, 0), length) % slots


def _named(cache: Cache) -> list[tuple[str, jax.Array, bool]]:
  """The arrays of a cache with unique names, and whether their axis 3 is the ring of slots."""
  return [("lengths", cache.lengths, False)] + [
    (f"{group}.{i}.{name}", array, name in layer.rings)
    for group, layers in cache.layers.items() for i, layer in enumerate(layers) for name, array in layer.arrays().items()]


def _with_arrays(cache: Cache, arrays: dict[str, jax.Array]) -> Cache:
  """A cache like `cache` that holds arrays named as by `_named`."""
  layers = {group: [layer.with_arrays({name: arrays[f"{group}.{i}.{name}"] for name in layer.arrays()})
                    for i, layer in enumerate(layers)] for group, layers in cache.layers.items()}
  return Cache(arrays["lengths"], layers)

"""The state of one sequence on disk: everything a prompt left behind, so that any later process goes on from it.

One ``.npz`` of plain arrays and a JSON header. Keys and values are stored in the order of their positions, so a state goes
into a cache of any capacity that holds it; what is restored is bit for bit what was saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from atma_jax.config import Config, ModelConfig
from atma_jax.errors import UserError
from atma_jax.models.cache import Cache

SCHEMA = 1
_RINGS = ("keys", "values", "key_scale", "value_scale")  # arrays with an axis 3 of slots
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # NumPy stores these; bfloat16 it does not
_HOW_IT_IS_COMPUTED = ("remat", "scan", "implementation", "init", "param_dtype")


def save_state(path: str | os.PathLike, tokens: np.ndarray, cache: Cache, config: ModelConfig) -> None:
  """Writes the state of one row after `tokens` (n,); a file of that name is replaced once the new one is complete.

  Raises:
    UserError: the file cannot be written.
  """
  length = int(cache.lengths[0])
  if cache.lengths.shape != (1,) or length != len(tokens):
    raise ValueError(f"save_state: a cache of lengths {cache.lengths} is not one row after {len(tokens)} tokens")
  arrays, dtypes = {"tokens": np.asarray(tokens, np.int32)}, {}
  for name, array in _named(cache):
    array = np.asarray(array)
    if name.rpartition(".")[2] in _RINGS:
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


def stored_tokens(path: str | os.PathLike, config: ModelConfig) -> np.ndarray:
  """The tokens (n,) that the state in a file comes after; raises as `load_state` does."""
  return _read(path, config)[0]


def load_state(path: str | os.PathLike, config: ModelConfig, capacity: int,
               dtype: str | None = None) -> tuple[np.ndarray, Cache]:
  """The tokens and the state of one row, in a cache of `capacity` and of keys and values in `dtype` as `Cache.create` makes.

  Raises:
    UserError: no such file, not a state, of another model, of other keys and values, or too long.
  """
  tokens, dtypes, arrays = _read(path, config)
  if config.window is None and len(tokens) > capacity:
    raise UserError(f"{path}: holds {len(tokens)} tokens, more than the {capacity} that fit")
  cache = Cache.create(config, 1, capacity, dtype)
  restored = {}
  for name, empty in _named(cache):
    if dtypes.get(name) != empty.dtype.name:
      raise UserError(f"{path}: {name} is {dtypes.get(name)}, not {empty.dtype.name}: set the cache dtype to what it is")
    array = arrays[name].view(empty.dtype)
    if name.rpartition(".")[2] in _RINGS:
      slots = _slots_in_order(len(tokens), empty.shape[3])
      ring = np.zeros(empty.shape, empty.dtype)
      kept = min(len(slots), array.shape[3])
      ring[:, :, :, slots[len(slots) - kept:]] = array[:, :, :, array.shape[3] - kept:]
      array = ring
    restored[name] = jnp.asarray(array)
  return tokens, _with_arrays(cache, restored)


def _read(path: str | os.PathLike, config: ModelConfig) -> tuple[np.ndarray, dict[str, str], dict[str, np.ndarray]]:
  """Tokens, dtypes and bits of every array."""
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
    raise UserError(f"{path}: a state of schema {schema}, not {SCHEMA}")
  ours, theirs = _identity(config), _identity(Config.from_dict({"model": model}).model)  # a newer field has its default
  if different := [name for name, value in ours.items() if theirs[name] != value]:
    raise UserError(f"{path}: the state of another model: it differs in {', '.join(different)}")
  return tokens, dtypes, arrays


def _identity(config: ModelConfig) -> dict:
  """What of a model its states depend on; JSON-ready."""
  values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _HOW_IT_IS_COMPUTED}
  return json.loads(json.dumps(values))


def _slots_in_order(length: int, slots: int) -> np.ndarray:
  """Slots of the last positions that a ring holds, oldest first."""
  return np.arange(max(length - slots, 0), length) % slots


def _named(cache: Cache) -> list[tuple[str, jax.Array]]:
  """Every array of a cache by a name of its own."""
  return [("lengths", cache.lengths)] + [
    (f"{group}.{i}.{field.name}", getattr(past, field.name))
    for group, pasts in cache.layers.items() for i, past in enumerate(pasts)
    for field in dataclasses.fields(past) if getattr(past, field.name) is not None]


def _with_arrays(cache: Cache, arrays: dict[str, jax.Array]) -> Cache:
  layers = {
    group: [dataclasses.replace(past, **{field.name: arrays[f"{group}.{i}.{field.name}"] for field in dataclasses.fields(past)
                                         if getattr(past, field.name) is not None}) for i, past in enumerate(pasts)]
    for group, pasts in cache.layers.items()}
  return Cache(arrays["lengths"], layers)

"""The state of one sequence on disk: everything that a prompt left behind, so that a later process can continue it.

A file is one ``.npz`` of plain arrays with a JSON header. Keys and values are stored in the order of their positions, so a state
can be restored into a cache of any capacity that holds it, bit for bit as it was saved. One digest binds the tokens, the length,
the configuration, the identity of the weights and every array. A file is refused unless each of its members is exactly what the
model's own shapes demand, which is known from their sizes before any of them is read.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import stat
from typing import Any, NamedTuple
import zipfile

import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.errors import UserError
from atma_jax.models.cache import Cache

SCHEMA = 2
LARGEST_HEADER = 64 * 1024  # bytes
_PIECE = 1 << 20  # bytes read at once, which bounds the table of contents, too
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # stored as these, because NumPy cannot store bfloat16
_IRRELEVANT = ("remat", "scan", "implementation", "init", "param_dtype")  # fields that states do not depend on
_SCHEMA = {"schema": int, "model": dict, "weights": str, "length": int, "kept": int, "dtypes": dict, "digest": str}
# What reading a damaged archive raises; RuntimeError is an encrypted member, and a header that is nested too deeply.
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, RuntimeError, OverflowError, zipfile.BadZipFile)


class _Member(NamedTuple):
  """What an array of a file has to be."""

  shape: tuple[int, ...]
  dtype: np.dtype[Any]

  @property
  def head(self) -> bytes:
    """The bytes in front of the elements, as NumPy writes them."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape})
    return file.getvalue()

  @property
  def size(self) -> int:
    """Bytes in the file."""
    return len(self.head) + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def save_state(path: str | os.PathLike, tokens: Int[np.ndarray, " T"], cache: Cache, config: ModelConfig,
               weights: str = "") -> None:
  """Writes a state to a file. An existing file is replaced once the new one is complete.

  Args:
    path: of the file.
    tokens: (T,) that the state comes after.
    cache: of one row.
    config: of the model.
    weights: what `atma_jax.inference.weights_identity.weights_identity` says of the model, which `load_state` must be told again.

  Raises:
    UserError: the file cannot be written.
  """
  length = int(cache.lengths[0])
  if cache.lengths.shape != (1,) or length != len(tokens):
    raise ValueError(f"save_state: a cache of lengths {cache.lengths} is not one row after {len(tokens)} tokens")
  arrays: dict[str, Any] = {"tokens": np.asarray(tokens, np.int32)}
  dtypes, kept = {}, length
  for name, array, is_ring in _named(cache):
    array = np.asarray(array)
    if is_ring:
      array = np.ascontiguousarray(array[:, :, :, _slots_in_order(length, array.shape[3])])
      kept = array.shape[3]
    dtypes[name] = array.dtype.name
    arrays[name] = array.view(_BITS[array.dtype.itemsize])
  header = {"schema": SCHEMA, "model": _identity(config), "weights": weights, "length": length, "kept": kept, "dtypes": dtypes}
  digest = _start_digest(header)
  for array in arrays.values():
    digest.update(np.ascontiguousarray(array).data)
  header["digest"] = digest.hexdigest()
  target, partial = pathlib.Path(path), pathlib.Path(f"{path}.partial")
  try:
    with partial.open("wb") as file:
      np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    partial.replace(target)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise UserError(f"{path}: the state cannot be written: {error.strerror or error}") from error


def stored_tokens(path: str | os.PathLike, config: ModelConfig) -> Int[np.ndarray, " T"]:
  """Returns the tokens (T,) that the state in a file comes after, if it holds any.

  Only `load_state` finds out whether they are as they were saved.

  Raises:
    UserError: as `load_state`.
  """
  with _opened(path) as archive:
    header = _read_header(archive, path, config)
    return _read_tokens(archive, header, config, hashlib.sha256())


def load_state(path: str | os.PathLike, config: ModelConfig, capacity: int, dtype: str | None = None,
               weights: str = "") -> tuple[Int[np.ndarray, " T"], Cache]:
  """Reads a state into a cache of one row.

  Args:
    path: of the file.
    config: of the model.
    capacity: tokens that the cache is made for, see `Cache.create`.
    dtype: of keys and values, see `Cache.create`.
    weights: what `atma_jax.inference.weights_identity.weights_identity` says of the model.

  Returns:
    The tokens (T,) that the state comes after, and the cache.

  Raises:
    UserError: there is no such file, it is not a state or not as it was saved, or the state is of another model, of other
      weights, of another dtype or too long.
  """
  with _opened(path) as archive:
    header = _read_header(archive, path, config)
    if header["weights"] != weights:
      raise UserError(f"{path}: the state of other weights: another step or checkpoint of the same configuration wrote it")
    length = header["length"]
    if config.window is None and length > capacity:
      raise UserError(f"{path}: holds {length} tokens, more than the {capacity} that fit")
    cache = jax.eval_shape(lambda: Cache.create(config, 1, capacity, dtype))
    for name, empty, _ in _named(cache):
      if (stored := header["dtypes"].get(name)) != empty.dtype.name:
        raise UserError(f"{path}: {name} is {str(stored)[:60]}, not {empty.dtype.name}: set the cache dtype to what it is")
    members = {name: _Member((*empty.shape[:3], header["kept"], *empty.shape[4:]) if is_ring else empty.shape,
                             np.dtype(_BITS[empty.dtype.itemsize])) for name, empty, is_ring in _named(cache)}
    _check_sizes(archive, members)
    digest = _start_digest({name: value for name, value in header.items() if name != "digest"})
    tokens = _read_tokens(archive, header, config, digest)
    arrays = {name: _read_member(archive, name, member, digest) for name, member in members.items()}
    if digest.hexdigest() != header["digest"]:
      raise ValueError("its digest is that of other content")
    if int(arrays["lengths"][0]) != length:
      raise ValueError(f"lengths: {arrays['lengths'][0]}, not the {length} of its tokens")
  restored = {}
  for name, empty, is_ring in _named(cache):
    array = arrays[name].view(empty.dtype)
    if is_ring:
      slots = _slots_in_order(length, empty.shape[3])
      ring = np.zeros(empty.shape, empty.dtype)
      kept = min(len(slots), array.shape[3])
      ring[:, :, :, slots[len(slots) - kept:]] = array[:, :, :, array.shape[3] - kept:]
      array = ring
    restored[name] = jnp.asarray(array)
  return tokens, _with_arrays(cache, restored)


# --- Files ------------------------------------------------------------------------------------------------------------


class _ShortReads(io.FileIO):
  """A file of which little is read at once, so that a table of contents cannot be larger than that either."""

  def read(self, size: int | None = -1, /) -> bytes:
    data = super().read(_PIECE + 1 if size is None or size < 0 else size) if size is None or size <= _PIECE else None
    if data is None or len(data) > _PIECE:
      raise ValueError("its table of contents is too large")
    return data


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
  """Opens a file as an archive of plain arrays; what goes wrong with it inside the context becomes a `UserError`."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise UserError(f"{path}: must be a regular file")
    with _ShortReads(os.fspath(path)) as raw, zipfile.ZipFile(raw) as archive:
      size = os.fstat(raw.fileno()).st_size
      for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
          raise ValueError(f"{info.filename[:60]!r} is compressed or encrypted")
        if info.header_offset + info.file_size > size:
          raise ValueError(f"{info.filename[:60]!r} is larger than the file")
      yield archive
  except _DAMAGE as error:
    raise UserError(f"{path}: not a saved state, or damaged: {str(error)[:200]}") from error
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error


def _read_header(archive: zipfile.ZipFile, path: str | os.PathLike, config: ModelConfig) -> dict[str, Any]:
  """The header, of the right fields and types, of a state of a model like this one."""
  size = archive.getinfo("header.npy").file_size - len(_Member((0,), np.dtype(np.uint8)).head)
  if not 0 < size <= LARGEST_HEADER:
    raise ValueError(f"a header of {size} bytes")
  content = _read_member(archive, "header", _Member((size,), np.dtype(np.uint8)), hashlib.sha256())
  header = json.loads(content.tobytes())
  if not isinstance(header, dict) or type(header.get("schema")) is not int:
    raise ValueError("its header has no schema")
  if header["schema"] != SCHEMA:
    raise UserError(f"{path}: a state of schema {header['schema']}; legal: {SCHEMA}; save it again with --save_state")
  wrong = [name for name, kind in _SCHEMA.items() if type(header.get(name)) is not kind]
  if wrong or header.keys() != _SCHEMA.keys():
    odd = [*wrong, *sorted(header.keys() - _SCHEMA.keys())]
    raise ValueError(f"its header has other fields or types: {', '.join(odd)[:100]}")
  least = header["length"] if config.window is None else min(header["length"], config.window)
  if not 1 <= least <= header["kept"] <= header["length"]:
    raise ValueError(f"a state of {header['kept']} positions after {header['length']} tokens")
  ours = _identity(config)
  # Fields added since the state was saved take their defaults.
  theirs = _merged(_identity(ModelConfig()), header["model"])
  if different := [name for name in ours.keys() | theirs.keys() if json.dumps(ours.get(name)) != json.dumps(theirs.get(name))]:
    raise UserError(f"{path}: the state of another model: it differs in {', '.join(sorted(different))[:200]}")
  return header


def _read_tokens(archive: zipfile.ZipFile, header: dict[str, Any], config: ModelConfig, digest: Any) -> Int[np.ndarray, " T"]:
  """The tokens, as many as the header says and all of the model's."""
  tokens = _read_member(archive, "tokens", _Member((header["length"],), np.dtype("<i4")), digest)
  if tokens.min() < 0 or tokens.max() >= config.vocab_size:
    raise ValueError(f"tokens: must be from 0 to {config.vocab_size - 1}")
  return tokens


def _check_sizes(archive: zipfile.ZipFile, members: dict[str, _Member]) -> None:
  """Raises unless the archive has these members, beside header and tokens, and each has the size of its array."""
  found = archive.namelist()
  if sorted(found) != sorted(f"{name}.npy" for name in ("header", "tokens", *members)):
    odd = sorted({f"{name}.npy" for name in ("header", "tokens", *members)} ^ set(found)) or found
    raise ValueError(f"other arrays than the model has: {', '.join(odd)[:100]}")
  for name, member in members.items():
    if archive.getinfo(f"{name}.npy").file_size != member.size:
      raise ValueError(f"{name}: not of shape {member.shape}")


def _read_member(archive: zipfile.ZipFile, name: str, member: _Member, digest: Any) -> np.ndarray:
  """Reads an array of which everything but the elements is known, and adds these to a digest."""
  info = archive.getinfo(f"{name}.npy")
  if info.file_size != member.size:
    raise ValueError(f"{name}: not an array of shape {member.shape} and dtype {member.dtype}")
  array = np.empty(member.shape, member.dtype)
  view = array.reshape(-1).view(np.uint8).data
  with archive.open(info) as file:
    if file.read(len(member.head)) != member.head:
      raise ValueError(f"{name}: not an array of shape {member.shape} and dtype {member.dtype}")
    position = 0
    while piece := file.read(_PIECE // 2):
      view[position : position + len(piece)] = piece
      position += len(piece)
  digest.update(view)
  return array


def _start_digest(header: dict[str, Any]) -> Any:
  """A digest of a header, to which the arrays are still to be added in their order."""
  return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + b"\0")


def _identity(config: ModelConfig) -> dict[str, Any]:
  """The configuration that states of a model depend on, as JSON gives it back."""
  values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _IRRELEVANT}
  return json.loads(json.dumps(values))


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
  """The values, and defaults for what they lack, at every depth."""
  merged = defaults | values
  for name, value in values.items():
    if isinstance(value, dict) and isinstance(defaults.get(name), dict):
      merged[name] = _merged(defaults[name], value)
  return merged


# --- Arrays -----------------------------------------------------------------------------------------------------------


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

"""Reads and writes files of named tensors: ``weights.pt``, from ``torch.save({"model": state_dict})``, and safetensors.

A tensor is read when `numpy.asarray` is called on it, and tensors are written one at a time, so that neither direction holds a
second copy of the model. The pickle inside ``weights.pt`` goes through a reader that knows tensors and plain values only
(`atma_jax.pytorch.pickle_reader`), so a hostile file cannot run code. Sizes are checked against the archive before anything is
allocated: no tensor is larger than what is stored for it, and all storages together are not larger than the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
import pickle
import struct
from typing import Any
import zipfile

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from atma_jax.errors import UserError
from atma_jax.json_input import MalformedJSON, check_regular, parse_json, read_bytes
from atma_jax.pytorch.pickle_reader import MOST_BYTES, MalformedPickle, Reconstructor, read_pickle

STORAGE_DTYPES = {"FloatStorage": np.dtype(np.float32), "DoubleStorage": np.dtype(np.float64),
                  "HalfStorage": np.dtype(np.float16), "BFloat16Storage": np.dtype(ml_dtypes.bfloat16)}
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_SAFETENSORS_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.float16): "F16",
                      np.dtype(ml_dtypes.bfloat16): "BF16"}
_MOST_DIRECTORY_BYTES = 8 << 20  # of the archive's list of members, each of which takes at least 46
_MOST_AXES = 8
_MOST_SHARED = 4  # tied weights are stored once and read as often as they have names
_ENCRYPTED = 1  # flag of a member
_ALIGNMENT = 64  # bytes; where tensors start inside weights.pt
_DIGEST = "data_sha256"  # of the bytes after the header, in the metadata of the safetensors files written here

TensorSpec = tuple[str, tuple[int, ...], np.dtype]  # name, shape and dtype


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, which `numpy.asarray` reads.

  Attributes:
    shape: of the tensor.
    dtype: of its elements.
    read: reads the array; a new copy at every call.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
    """Reads the array, as numpy's conversion protocol asks; `copy` is ignored because every read makes one."""
    del copy
    array = self.read()
    return array if dtype is None else array.astype(dtype)


Tensors = Mapping[str, StoredTensor | np.ndarray]  # by name


def required(tensors: Tensors, name: str, source: pathlib.Path | str) -> StoredTensor | np.ndarray:
  """Returns the tensor of this name; raises `UserError`, naming `source`, if there is none."""
  if name not in tensors:
    raise UserError(f"{source}: tensor {name!r} is missing")
  return tensors[name]


def read_json(path: pathlib.Path, what: str, hint: str) -> Any:
  """Reads a JSON file of a checkpoint.

  Args:
    path: the file.
    what: what it should be, for the error if it is malformed.
    hint: what to do if it is missing.

  Raises:
    UserError: it is missing or malformed.
  """
  try:
    return parse_json(read_bytes(path))
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file; {hint}") from error
  except (OSError, MalformedJSON) as error:
    raise UserError(f"{path}: not {what}: {error}") from error


def open_state_dict(path: pathlib.Path) -> dict[str, StoredTensor]:
  """Opens ``weights.pt`` and returns its tensors by name, none of them read yet.

  Raises:
    UserError: the file does not exist, or is not a ``{"model": state_dict}`` of floating-point tensors.
  """
  check_regular(path)
  try:
    content = _Archive(path).load()
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file") from error
  except Exception as error:  # whatever a damaged or hostile file makes the reader of zip files raise
    raise UserError(f"{path}: not a PyTorch checkpoint of tensors: {error or type(error).__name__}") from error
  if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
    raise UserError(f"{path}: must hold {{'model': state_dict}}")
  for name, tensor in content["model"].items():
    if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
      shown = repr(name[:200]) if isinstance(name, str) else name
      raise UserError(f"{path}: entry {shown} of 'model' is {type(tensor).__name__}, not a tensor")
  return {name.removeprefix("_orig_mod."): _reporting_damage(tensor, path, name) for name, tensor in content["model"].items()}


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all tensors of ``weights.pt``, by name; raises what `open_state_dict` does.

  Raises:
    UserError: also if tensors share storages so much that they are several times as large as the file.
  """
  tensors = open_state_dict(path)
  total, most = sum(tensor.size * tensor.dtype.itemsize for tensor in tensors.values()), _MOST_SHARED * path.stat().st_size
  if total > most:
    raise UserError(f"{path}: its tensors share storages and take {total / 2**30:.2f} GiB, over {_MOST_SHARED} times the file")
  return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def open_safetensors(paths: Sequence[pathlib.Path]) -> dict[str, StoredTensor]:
  """Opens safetensors files and returns their tensors by name, none of them read yet.

  Raises:
    UserError: the library `safetensors` is not installed, a file is damaged or has another digest than it says, or two files hold
      a tensor of the same name.
  """
  try:
    import safetensors
  except ImportError as error:
    raise UserError(f"{paths[0]}: reading safetensors needs the extra: pip install 'atma_jax[convert]'") from error
  dtypes = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
  tensors: dict[str, StoredTensor] = {}
  for path in paths:
    check_regular(path)
    try:
      file = safetensors.safe_open(path, "numpy")
      views = {name: file.get_slice(name) for name in list(file.keys())}
      expected = (file.metadata() or {}).get(_DIGEST)
      found = None if expected is None else _digest_of_data(path)
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f"{path}: not a safetensors file: {error}") from error
    if found != expected:
      raise UserError(f"{path}: damaged: the digest of its tensors differs from the one it holds ({_DIGEST})")
    for name, view in views.items():
      if name in tensors:
        raise UserError(f"{path}: tensor {name!r} is in another file too")
      if view.get_dtype() not in dtypes:
        raise UserError(f"{path}: tensor {name!r} is of type {view.get_dtype()}; legal: {', '.join(dtypes)}")
      tensors[name] = StoredTensor(tuple(view.get_shape()), dtypes[view.get_dtype()], functools.partial(file.get_tensor, name))
  return tensors


def write_state_dict(path: pathlib.Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]) -> None:
  """Writes ``weights.pt`` as ``torch.save({"model": state_dict})`` does; equal tensors give equal files.

  Args:
    path: where to write.
    specs: name, shape and dtype of every tensor.
    arrays: the tensors in the same order, each made when it is written.

  Raises:
    ValueError: an array is not what its spec says.
  """
  with zipfile.ZipFile(path, "w") as archive:

    def add(name: str, content: bytes | memoryview) -> None:
      info = zipfile.ZipInfo(f"{path.stem}/{name}")
      assert archive.fp is not None  # the archive is open
      offset = archive.fp.tell() + 30 + len(info.filename) + 4  # where content starts after a header without padding
      padding = -offset % _ALIGNMENT
      info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
      info.file_size = len(content)
      with archive.open(info, "w") as member:
        member.write(content)

    add("data.pkl", _pickle(specs))
    add("byteorder", b"little")
    for index, array in enumerate(_checked(specs, arrays)):
      add(f"data/{index}", array.reshape(-1).view(np.uint8).data)
    add("version", b"3\n")


def write_safetensors(path: pathlib.Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]) -> None:
  """Writes a safetensors file, one array at a time; the library's own writer needs all of them in memory.

  Its metadata holds a digest of the tensors, which `open_safetensors` verifies. Arguments and errors are those of
  `write_state_dict`.
  """
  digest = hashlib.sha256()
  unknown = "0" * len(digest.hexdigest())  # until the tensors are written
  header: dict[str, Any] = {"__metadata__": {"format": "pt", _DIGEST: unknown}}
  start = 0
  for name, shape, dtype in specs:
    stop = start + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    start = stop
  content = json.dumps(header, separators=(",", ":")).encode()
  content += b" " * (-len(content) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(content)) + content)
    for array in _checked(specs, arrays):
      data = array.reshape(-1).view(np.uint8).data
      digest.update(data)
      file.write(data)
    file.seek(8)
    file.write(content.replace(unknown.encode(), digest.hexdigest().encode(), 1))


def _digest_of_data(path: pathlib.Path) -> str:
  """Returns the SHA-256 of what follows the header of a safetensors file."""
  with open(path, "rb") as file:
    file.seek(8 + struct.unpack("<Q", file.read(8))[0])
    return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Yields the arrays, made contiguous, after comparing each with its spec."""
  for (name, shape, dtype), array in zip(specs, arrays, strict=True):
    if array.shape != shape or array.dtype != dtype:
      raise ValueError(f"{name}: array of {array.dtype} {array.shape} must be {dtype} {shape}")
    yield np.ascontiguousarray(array)


def _pickle(specs: Sequence[TensorSpec]) -> bytes:
  """Returns the pickle of ``{"model": state_dict}``, with the opcodes that PyTorch writes.

  It is written opcode by opcode because it names functions of PyTorch, which `pickle` would have to import.
  """

  def plain(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # without the opcodes PROTO and STOP

  def name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

  parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, plain("model"), pickle.EMPTY_DICT, pickle.MARK]
  for index, (tensor, shape, dtype) in enumerate(specs):
    strides = tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))
    storage = [pickle.MARK, plain("storage"), name("torch", _STORAGE_NAMES[dtype]), plain(str(index)), plain("cpu"),
               plain(math.prod(shape)), pickle.TUPLE, pickle.BINPERSID]
    hooks = [name("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
    parts += [plain(tensor), name("torch._utils", "_rebuild_tensor_v2"), pickle.MARK, *storage, plain(0), plain(shape),
              plain(strides), plain(False), *hooks, pickle.TUPLE, pickle.REDUCE]
  return b"".join([*parts, pickle.SETITEMS, pickle.SETITEM, pickle.STOP])


class _LimitedFile(io.FileIO):
  """A file of which no single read is larger than `most`, if that is set: the reader of zip files reads the whole directory."""

  most: int | None = None

  def read(self, size: int | None = -1, /) -> bytes:
    size = -1 if size is None else size
    if self.most is None:
      return super().read(size)
    content = super().read(min(size, self.most + 1) if size >= 0 else self.most + 1)
    if len(content) > self.most:
      raise zipfile.BadZipFile(f"its list of members is larger than {self.most >> 20} MiB")
    return content


class _Archive:
  """The zip file of ``weights.pt``."""

  def __init__(self, path: pathlib.Path):
    self._file = _LimitedFile(path)
    self._file.most = _MOST_DIRECTORY_BYTES
    self._zip = zipfile.ZipFile(self._file)
    self._file.most = None
    self._bytes = path.stat().st_size
    self._root = next((name.removesuffix("data.pkl") for name in self._zip.namelist() if name.endswith("/data.pkl")), None)
    self._storages: dict[str, _Storage] = {}
    self._stored = 0  # bytes of all of them

  def load(self) -> Any:
    """The object in ``data.pkl``, its tensors not read yet."""
    if self._root is None:
      raise zipfile.BadZipFile("it has no member data.pkl")
    order = self._root + "byteorder"
    if order in self._zip.namelist() and self._content(order, 16) != b"little":
      raise zipfile.BadZipFile("its numbers are not little-endian")
    return read_pickle(self._content(self._root + "data.pkl", MOST_BYTES), _find_global, self._storage)

  def _content(self, name: str, most: int) -> bytes:
    """A whole member, which has no more than `most` bytes."""
    member = self._member(name)
    if member.file_size > most:
      raise zipfile.BadZipFile(f"{name} has {member.file_size} bytes, more than {most}")
    return self._zip.read(member)

  def _member(self, name: str) -> zipfile.ZipInfo:
    """A member that is neither encrypted nor compressed in an unusual way; its own header must say so, too."""
    member = self._zip.getinfo(name)
    self._file.seek(member.header_offset)
    header = self._file.read(8).ljust(8, b"\0")
    if (member.flag_bits | header[6]) & _ENCRYPTED:
      raise zipfile.BadZipFile(f"{name} is encrypted")
    return member

  def _storage(self, pid: Any) -> _Storage:
    """The storage that a persistent id names: a member of the archive that holds as many uncompressed numbers as it says."""
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
      raise MalformedPickle("refused persistent id of what is no storage")
    _, dtype, key, _, size = pid
    if not isinstance(dtype, np.dtype) or not isinstance(key, str) or type(size) is not int or len(key) > 64:
      raise MalformedPickle("a storage is described wrongly")
    if key not in self._storages:
      member = self._member(f"{self._root}data/{key}")
      self._stored += member.file_size
      if member.compress_type != zipfile.ZIP_STORED or self._stored > self._bytes:
        raise MalformedPickle(f"{member.filename} is compressed, or larger than the file")
      self._storages[key] = _Storage(self._zip, member, dtype, member.file_size // dtype.itemsize)
    storage = self._storages[key]
    if storage.dtype != dtype or storage.member.file_size != size * dtype.itemsize:
      raise MalformedPickle(f"{storage.member.filename} is not {size} stored numbers of type {dtype}")
    return storage


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A flat array of `size` numbers in a member of the archive, which tensors are views of."""

  archive: zipfile.ZipFile
  member: zipfile.ZipInfo
  dtype: np.dtype
  size: int

  def read(self) -> np.ndarray:
    """Reads the whole array."""
    return np.frombuffer(self.archive.read(self.member), self.dtype)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any) -> StoredTensor:
  """The view of a storage that the arguments of ``torch._utils._rebuild_tensor_v2`` describe."""
  del unused  # requires_grad and backward hooks
  if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
    raise MalformedPickle("a tensor is described wrongly")
  if len(shape) != len(strides) or len(shape) > _MOST_AXES or any(type(n) is not int for n in (offset, *shape, *strides)):
    raise MalformedPickle("a tensor is described wrongly")
  if min((offset, *strides, *shape)) < 0 or math.prod(shape) > storage.size:
    raise MalformedPickle("a tensor is larger than its storage")
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else offset
  if last >= max(storage.size, 1):
    raise MalformedPickle("a tensor reaches outside its storage")
  steps = [stride * storage.dtype.itemsize for stride in strides] if all(shape) else [0] * len(shape)

  def read() -> np.ndarray:
    return np.lib.stride_tricks.as_strided(storage.read()[offset:], shape, steps)

  return StoredTensor(shape, storage.dtype, read)


def _empty_dict(*arguments: Any) -> dict[str, Any]:
  """An ordered dict, to which the pickle adds its items."""
  if arguments:
    raise MalformedPickle("an OrderedDict with arguments")
  return {}


_GLOBALS: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): Reconstructor(_empty_dict),
  ("torch._utils", "_rebuild_tensor_v2"): Reconstructor(_rebuild_tensor),
  **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
}


def _find_global(module: str, name: str) -> Any:
  """The few globals that a state dict needs."""
  if (module, name) not in _GLOBALS:
    raise MalformedPickle(f"refused global {f'{module[:100]}.{name[:100]}'!r}")
  return _GLOBALS[module, name]


def _reporting_damage(tensor: StoredTensor, path: pathlib.Path, name: str) -> StoredTensor:
  """Makes the tensor raise a `UserError` with its name if it turns out to be damaged when it is read."""

  def read() -> np.ndarray:
    try:
      return tensor.read()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
      raise UserError(f"{path}: tensor {name!r} is damaged: {error}") from error

  return dataclasses.replace(tensor, read=read)

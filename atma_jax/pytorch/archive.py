"""Files of named tensors, without PyTorch: ``weights.pt`` (``torch.save({"model": state_dict})``) and safetensors.

Tensors are read one at a time, when an array is asked of them, and written one at a time: neither direction ever holds a
second copy of a model. The pickle inside ``weights.pt`` is read by an unpickler that knows tensors and nothing else: any
other name in it is refused, so a hostile file cannot run code.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import json
import math
import pathlib
import pickle
import struct
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from atma_jax.errors import UserError

STORAGE_DTYPES = {"FloatStorage": np.dtype(np.float32), "DoubleStorage": np.dtype(np.float64),
                  "HalfStorage": np.dtype(np.float16), "BFloat16Storage": np.dtype(ml_dtypes.bfloat16)}
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_SAFETENSORS_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.float16): "F16",
                      np.dtype(ml_dtypes.bfloat16): "BF16"}
_ALIGNMENT = 64  # bytes, of the tensors inside weights.pt

Shaped = tuple[str, tuple[int, ...], np.dtype]  # name, shape and dtype of a tensor


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file; ``numpy.asarray`` reads it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy  # every reading is a copy
    array = self.read()
    return array if dtype is None else array.astype(dtype)


Tensors = dict[str, "StoredTensor | np.ndarray"]


def open_state_dict(path: pathlib.Path) -> Tensors:
  """The tensors of ``weights.pt`` by name, none of them read yet.

  Raises:
    UserError: there is no such file, or it is no ``{"model": state_dict}`` of floating-point tensors.
  """
  try:
    archive = zipfile.ZipFile(path)
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    content = _TensorUnpickler(archive, root).load()
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file") from error
  except Exception as error:  # whatever a damaged or hostile file makes the readers of zip and pickle raise
    raise UserError(f"{path}: not a PyTorch checkpoint of tensors: {error or type(error).__name__}") from error
  if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
    raise UserError(f"{path}: must hold {{'model': state_dict}}")
  for name, tensor in content["model"].items():
    if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
      raise UserError(f"{path}: entry {name!r} of 'model' is {type(tensor).__name__}, not a tensor")
  return {name.removeprefix("_orig_mod."): _named(tensor, path, name) for name, tensor in content["model"].items()}


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of ``weights.pt`` by name, as arrays."""
  return {name: np.asarray(tensor) for name, tensor in open_state_dict(path).items()}


def open_safetensors(paths: Sequence[pathlib.Path]) -> Tensors:
  """The tensors of safetensors files by name, none of them read yet.

  Raises:
    UserError: the library is not installed, or a file is damaged or repeats a name of another.
  """
  try:
    import safetensors
  except ImportError as error:
    raise UserError(f"{paths[0]}: reading safetensors needs the extra: pip install 'atma_jax[convert]'") from error
  dtypes = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
  tensors: Tensors = {}
  for path in paths:
    try:
      file = safetensors.safe_open(path, "numpy")
      slices = {name: file.get_slice(name) for name in list(file.keys())}
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f"{path}: not a safetensors file: {error}") from error
    for name, part in slices.items():
      if name in tensors:
        raise UserError(f"{path}: tensor {name!r} is in another file too")
      if part.get_dtype() not in dtypes:
        raise UserError(f"{path}: tensor {name!r} is of type {part.get_dtype()}; legal: {', '.join(dtypes)}")
      read = lambda file=file, name=name: file.get_tensor(name)
      tensors[name] = StoredTensor(tuple(part.get_shape()), dtypes[part.get_dtype()], read)
  return tensors


def write_state_dict(path: pathlib.Path, shapes: Sequence[Shaped], arrays: Iterable[np.ndarray]) -> None:
  """Writes ``weights.pt`` as ``torch.save({"model": state_dict})`` does; equal tensors give equal bytes.

  Args:
    path: the file.
    shapes: name, shape and dtype of every tensor.
    arrays: the tensors, in the same order.
  """
  with zipfile.ZipFile(path, "w") as archive:

    def add(name: str, content: bytes | memoryview) -> None:
      info = zipfile.ZipInfo(f"{path.stem}/{name}")
      offset = archive.fp.tell() + 30 + len(info.filename) + 4  # of the content, after a header and an empty extra field
      padding = -offset % _ALIGNMENT
      info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
      info.file_size = len(content)
      with archive.open(info, "w") as member:
        member.write(content)

    add("data.pkl", _pickle(shapes))
    add("byteorder", b"little")
    for index, array in enumerate(_checked(shapes, arrays)):
      add(f"data/{index}", array.reshape(-1).view(np.uint8).data)
    add("version", b"3\n")


def write_safetensors(path: pathlib.Path, shapes: Sequence[Shaped], arrays: Iterable[np.ndarray]) -> None:
  """Writes a safetensors file, of the arguments of `write_state_dict`. The library's own writer wants all arrays at once."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for name, shape, dtype in shapes:
    stop = start + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    start = stop
  content = json.dumps(header, separators=(",", ":")).encode()
  content += b" " * (-len(content) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(content)) + content)
    for array in _checked(shapes, arrays):
      file.write(array.reshape(-1).view(np.uint8).data)


def _checked(shapes: Sequence[Shaped], arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """The arrays, contiguous and little-endian, once they are what was announced."""
  for (name, shape, dtype), array in zip(shapes, arrays, strict=True):
    if array.shape != shape or array.dtype != dtype:
      raise ValueError(f"{name}: {array.dtype}{array.shape} is not the {dtype}{shape} announced")
    yield np.ascontiguousarray(array)


def _pickle(shapes: Sequence[Shaped]) -> bytes:
  """``{"model": state_dict}`` in the opcodes that PyTorch uses, its own names among them, which only it could import."""

  def plain(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # between the protocol and the stop

  def name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

  parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, plain("model"), pickle.EMPTY_DICT, pickle.MARK]
  for index, (tensor, shape, dtype) in enumerate(shapes):
    strides = tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))
    storage = [pickle.MARK, plain("storage"), name("torch", _STORAGE_NAMES[dtype]), plain(str(index)), plain("cpu"),
               plain(math.prod(shape)), pickle.TUPLE, pickle.BINPERSID]
    hooks = [name("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
    parts += [plain(tensor), name("torch._utils", "_rebuild_tensor_v2"), pickle.MARK, *storage, plain(0), plain(shape),
              plain(strides), plain(False), *hooks, pickle.TUPLE, pickle.REDUCE]
  return b"".join([*parts, pickle.SETITEMS, pickle.SETITEM, pickle.STOP])


class _TensorUnpickler(pickle.Unpickler):
  """Reads tensors, dicts and plain values; refuses every other global."""

  def __init__(self, archive: zipfile.ZipFile, root: str):
    super().__init__(archive.open(root + "data.pkl"))
    self._archive, self._root = archive, root

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _RebuildTensor()
    if module == "torch" and name in STORAGE_DTYPES:
      return STORAGE_DTYPES[name]
    raise pickle.UnpicklingError(f"refused global {module}.{name}")

  def persistent_load(self, pid: tuple) -> _Storage:
    kind, dtype, key, _, size = pid
    if kind != "storage":
      raise pickle.UnpicklingError(f"refused persistent id of kind {kind!r}")
    member = self._archive.getinfo(f"{self._root}data/{key}")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != size * dtype.itemsize:
      raise pickle.UnpicklingError(f"{member.filename} is not {size} stored numbers of type {dtype}")
    return _Storage(self._archive, member, dtype, size)


@dataclasses.dataclass(frozen=True)
class _Storage:
  """The numbers that tensors are views of."""

  archive: zipfile.ZipFile
  member: zipfile.ZipInfo
  dtype: np.dtype
  size: int

  def read(self) -> np.ndarray:
    return np.frombuffer(self.archive.read(self.member), self.dtype)


class _RebuildTensor:
  """``torch._utils._rebuild_tensor_v2``; without attributes that a pickle could set."""

  __slots__ = ()

  def __call__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *unused: Any) -> StoredTensor:
    del unused  # requires_grad and backward hooks
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else offset
    if min((offset, *strides, *shape)) < 0 or last >= max(storage.size, 1):
      raise pickle.UnpicklingError("tensor reaches outside its storage")

    def read() -> np.ndarray:
      return np.lib.stride_tricks.as_strided(storage.read()[offset:], shape, [s * storage.dtype.itemsize for s in strides])

    return StoredTensor(tuple(shape), storage.dtype, read)


def _named(tensor: StoredTensor, path: pathlib.Path, name: str) -> StoredTensor:
  """The same, whose damage is told with the name of the tensor."""

  def read() -> np.ndarray:
    try:
      return tensor.read()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
      raise UserError(f"{path}: tensor {name!r} is damaged: {error}") from error

  return dataclasses.replace(tensor, read=read)

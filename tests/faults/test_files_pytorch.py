"""PyTorch files from strangers: no code runs, time and memory are bounded, and the end is a value or one line."""

from __future__ import annotations

import os
import pathlib
import pickle
import pickletools
import struct
import time
import tracemalloc
from typing import Any
import zipfile

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from atma_jax.errors import UserError
from atma_jax.pytorch import archive, read_state_dict
from atma_jax.pytorch.archive import open_state_dict, write_state_dict
from atma_jax.pytorch.pickle_reader import MOST_BYTES, MOST_OPCODES, MalformedPickle, Reconstructor, read_pickle

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
MOST_MEMORY = 64 << 20  # bytes that any of these small files may make the reader take


def write(path: pathlib.Path) -> bytes:
  """Writes two small tensors and returns the pickle inside."""
  write_state_dict(path, [(name, array.shape, array.dtype) for name, array in TENSORS.items()], TENSORS.values())
  with zipfile.ZipFile(path) as file:
    return file.read("weights/data.pkl")


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
  """The pickle of two small tensors."""
  return write(tmp_path_factory.mktemp("valid") / "weights.pt")


def with_pickle(path: pathlib.Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> pathlib.Path:
  """Writes the two tensors with another pickle in the place of theirs."""
  write(path)
  with zipfile.ZipFile(path) as old:
    members = {info.filename: old.read(info) for info in old.infolist()}
  with zipfile.ZipFile(path, "w", compression) as new:
    for name, old_content in members.items():
      new.writestr(name, content if name.endswith("data.pkl") else old_content,
                   compression if name.endswith("data.pkl") else zipfile.ZIP_STORED)
  return path


def must_not_run(*_: Any) -> None:
  raise AssertionError("code of the pickle ran")


def outcome(content: bytes) -> Any:
  """What reading a pickle gives: a value, or the `MalformedPickle`; everything else, and too much memory, fails the test."""
  def find_global(module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return Reconstructor(dict)
    if module == "torch" and name.endswith("Storage"):
      return np.dtype(np.float32)
    if module == "torch._utils":
      return Reconstructor(lambda *arguments: arguments[:1])
    raise MalformedPickle(f"refused global {f'{module}.{name}'!r}")

  tracemalloc.start()
  try:
    return read_pickle(content, find_global, lambda pid: pid)
  except MalformedPickle as error:
    assert str(error) and len(str(error).splitlines()) == 1
    return error
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_MEMORY


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
ARGUMENTS = st.binary(max_size=5) | st.sampled_from([
  b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00", b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\n__import__\n",
  b"X\x04\x00\x00\x00true", b"\xff" * 8, b"(", b"tR.", b"ccollections\nOrderedDict\n)R"])


@given(st.data())
@settings(max_examples=120, deadline=5000)
def test_mutations_of_a_valid_pickle(valid, data):
  """Bytes changed, cut out and put in, opcodes and hostile names among them."""
  content = bytearray(valid)
  for _ in range(data.draw(st.integers(1, 6))):
    place = data.draw(st.integers(0, len(content)))
    content[place:place + data.draw(st.integers(0, 8))] = b"".join(
      data.draw(st.lists(st.sampled_from(OPCODES) | ARGUMENTS, max_size=6))) * data.draw(st.sampled_from([1, 1, 1, 200]))
  with pytest.MonkeyPatch.context() as patch:
    for name in ("builtins.eval", "builtins.exec", "os.system", "subprocess.Popen"):
      patch.setattr(name, must_not_run)
    outcome(bytes(content))


@given(st.lists(st.sampled_from(OPCODES) | ARGUMENTS, max_size=200))
@settings(max_examples=200, deadline=5000)
def test_random_programs(parts):
  """Opcodes in any order."""
  outcome(b"\x80\x02" + b"".join(parts) + b".")


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
                      | st.tuples(inner, inner), max_leaves=12)


@given(VALUES, st.sampled_from([2, 3, 4, 5]))
@settings(max_examples=60, deadline=5000)
def test_plain_values_come_back(value, protocol):
  """What the standard library pickles of plain values is read as it was."""
  assert outcome(pickle.dumps(value, protocol)) == value


def shared_tuples(depth: int) -> bytes:
  """A tuple of 2^depth references, which never ends if it is hashed, shown or compared."""
  return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


CASES = {
  "memo index": (b"\x80\x02K\x00r\xff\xff\xff\x7f.", None),
  "shared tuple as a key": (b"\x80\x02}" + shared_tuples(60) + b"K\x00s.", "a key is a tuple"),
  "shared tuple as a model": (b"\x80\x02}X\x05\x00\x00\x00model" + shared_tuples(60) + b"s.", "must hold"),
  "shared tuple as a tensor": (b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00a" + shared_tuples(60) + b"ss.", "is tuple"),
  "deep tuple": (b"\x80\x02)" + b"\x85" * 30_000 + b".", "must hold"),
  "deep tuple as a key": (b"\x80\x02})" + b"\x85" * 30_000 + b"K\x00s.", "a key is a tuple"),
  "attribute get": (b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x00sb.", "must hold"),
  "attributes of a global": (b"\x80\x02ctorch\nFloatStorage\n}b.", "refused attributes"),
  "text of 4 GiB": (b"\x80\x02X\xff\xff\xff\xff", "cut off"),
  "whole number of 255 bytes": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "255 bytes"),
  "call of a global": (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "refused global .os.system"),
  "call of a dtype": (b"\x80\x02ctorch\nFloatStorage\n)R.", "refused call"),
  "extension": (b"\x80\x02\x82\x01.", "refused opcode"),
  "instance": (b"\x80\x02(ios\nsystem\n.", "refused opcode"),
  "mark at the end": (b"\x80\x02(.", "nothing to work on"),
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_pickles(tmp_path, name):
  """Each ends at once, in one line that names the file."""
  content, reason = CASES[name]
  path, started = with_pickle(tmp_path / "weights.pt", content), time.monotonic()
  tracemalloc.start()
  with pytest.raises(UserError, match=rf"weights\.pt: .*{reason or ''}") as caught:
    open_state_dict(path)
  assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
  tracemalloc.stop()
  assert len(str(caught.value)) < 500 and time.monotonic() - started < 5


def test_a_pickle_that_inflates(tmp_path):
  """A megabyte that inflates to a gigabyte is refused by the size that it states; one that lies about it, when it is read."""
  path = with_pickle(tmp_path / "weights.pt", b"\x80\x02" + b"N0" * MOST_BYTES, zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 1 << 20
  with pytest.raises(UserError, match=r"data\.pkl has .* bytes"):
    open_state_dict(path)


def test_a_pickle_of_too_many_opcodes():
  """Time is bounded by the number of opcodes."""
  with pytest.raises(MalformedPickle, match="opcodes"):
    read_pickle(b"\x80\x02" + b"N" * MOST_OPCODES + b".", must_not_run, must_not_run)


def test_tensors_are_not_larger_than_what_is_stored(tmp_path, valid):
  """Stride 0 repeats a number without storing it."""
  strides, shape = b"K\x03K\x01\x86", b"K\x02K\x03\x86"
  assert valid.count(strides) == valid.count(shape) == 1
  grown = valid.replace(shape, b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86").replace(strides, b"K\x00K\x00\x86")
  with pytest.raises(UserError, match="a tensor is larger than its storage"):
    open_state_dict(with_pickle(tmp_path / "weights.pt", grown))


def test_storages_are_not_larger_than_the_file(tmp_path, monkeypatch):
  """Members that overlap, and those that claim more than the file has, are refused before anything is read."""
  write(tmp_path / "weights.pt")
  monkeypatch.setattr(zipfile.ZipFile, "getinfo", lambda self, name, get=zipfile.ZipFile.getinfo: claims(get(self, name)))

  def claims(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    if "/data/" in info.filename:
      info.file_size = 1 << 40
    return info

  with pytest.raises(UserError, match="larger than the file"):
    open_state_dict(tmp_path / "weights.pt")


def test_shared_storages_are_counted(tmp_path):
  """Many names of one storage may not multiply the file."""
  one = np.ones((256, 256), np.float32)
  path = tmp_path / "weights.pt"
  write_state_dict(path, [(f"t{i}", one.shape, one.dtype) for i in range(9)], [one, *[np.zeros_like(one)] * 8])
  with zipfile.ZipFile(path) as file:
    members = {info.filename: file.read(info) for info in file.infolist()}
  content = members["weights/data.pkl"]
  for i in range(1, 9):
    content = content.replace(b"X\x01\x00\x00\x00%d" % i, b"X\x01\x00\x00\x000")
    del members[f"weights/data/{i}"]
  with zipfile.ZipFile(path, "w") as new:
    for name, old in members.items():
      new.writestr(name, content if name.endswith("data.pkl") else old)
  assert len(open_state_dict(path)) == 9
  with pytest.raises(UserError, match="share storages"):
    read_state_dict(path)


def entry_of(content: bytes | bytearray, name: str) -> int:
  """Where the archive's list describes a member."""
  return content.rindex(b"PK\x01\x02", 0, content.rindex(f"weights/{name}".encode()))


@pytest.mark.parametrize("where", ["directory", "member"])
@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_encrypted_members(tmp_path, where, name):
  """The flag counts wherever it is set."""
  path = tmp_path / "weights.pt"
  write(path)
  content = bytearray(path.read_bytes())
  entry = entry_of(content, name)
  content[struct.unpack_from("<I", content, entry + 42)[0] + 6 if where == "member" else entry + 8] |= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match="is encrypted"):
    open_state_dict(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, 99])
def test_compressed_tensors(tmp_path, method):
  """Tensors are stored as they are."""
  path = tmp_path / "weights.pt"
  write(path)
  content = bytearray(path.read_bytes())
  struct.pack_into("<H", content, entry_of(content, "data/0") + 10, method)
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"weights/data/0 is compressed"):
    open_state_dict(path)


def test_a_directory_of_members_that_is_too_large(tmp_path, monkeypatch):
  """The list of members is read as a whole, so it is bounded."""
  monkeypatch.setattr(archive, "_MOST_DIRECTORY_BYTES", 200)
  write(tmp_path / "weights.pt")
  with pytest.raises(UserError, match="list of members"):
    open_state_dict(tmp_path / "weights.pt")


@given(st.data())
@settings(max_examples=60, deadline=5000)
def test_damaged_archives(tmp_path_factory, data):
  """Flipped, cut and repeated bytes anywhere in the file: the two tensors as they were, or one line."""
  path = tmp_path_factory.mktemp("damaged") / "weights.pt"
  write(path)
  content = bytearray(path.read_bytes())
  for _ in range(data.draw(st.integers(1, 3))):
    place = data.draw(st.integers(0, len(content) - 1))
    content[place:place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
  path.write_bytes(content)
  try:
    tensors = read_state_dict(path)
  except UserError as error:
    assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
  else:
    assert all(array.nbytes <= 64 for array in tensors.values())


def test_special_files(tmp_path):
  """A FIFO is refused at once."""
  os.mkfifo(tmp_path / "weights.pt")
  with pytest.raises(UserError, match="is a FIFO, must be a file"):
    open_state_dict(tmp_path / "weights.pt")

"""Saved states from anywhere: what is not exactly what was saved is refused in one line, in bounded memory, before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tracemalloc
from typing import Any
import zipfile

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.saved_state import load_state, save_state, stored_tokens
from atma_jax.inference.weights_identity import weights_identity
from atma_jax.models.cache import Cache
from tests.small_model import SMALL, lively_model

TOKENS, CAPACITY, WEIGHTS = np.arange(40, 59, dtype=np.int32), 32, "these weights"
RUNS = settings(max_examples=150, deadline=None, derandomize=True)


def random_cache() -> Cache:
  rng = np.random.default_rng(0)
  cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), Cache.create(SMALL, 1, CAPACITY))
  return dataclasses.replace(cache, lengths=jnp.array([len(TOKENS)], jnp.int32))


class Saved:
  """The file of a state, and what is loaded from it."""

  def __init__(self, path: pathlib.Path):
    save_state(path, TOKENS, random_cache(), SMALL, WEIGHTS)
    self.content = path.read_bytes()
    self.arrays = arrays_of(load_state(path, SMALL, CAPACITY, None, WEIGHTS))

  def is_same(self, arrays: list[np.ndarray], *, shapes_only: bool = False) -> bool:
    """Whether these arrays are those of the state, or, if somebody has signed others, might be."""
    return len(arrays) == len(self.arrays) and all(
      a.dtype == b.dtype and a.shape == b.shape and (shapes_only or np.array_equal(a, b)) for a, b in zip(arrays, self.arrays))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
  return Saved(tmp_path_factory.mktemp("saved") / "state.npz")


def arrays_of(loaded: tuple[np.ndarray, Cache]) -> list[np.ndarray]:
  return [np.asarray(x) for x in jax.tree.leaves(loaded)]


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Callable[[bytes], list[np.ndarray] | None]:
  """Loads a state from bytes: its arrays, or None if it was refused in one line that names the file."""
  path = tmp_path_factory.mktemp("states") / "state.npz"

  def load(content: bytes) -> list[np.ndarray] | None:
    path.write_bytes(content)
    try:
      arrays = arrays_of(load_state(path, SMALL, CAPACITY, None, WEIGHTS))
    except UserError as error:
      assert str(error).startswith(f"{path}: ") and len(str(error)) < 600 and "\n" not in str(error)
      arrays = None
    with contextlib.suppress(UserError):  # it looks at less, and so may let more pass, but nothing else
      tokens = stored_tokens(path, SMALL)
      assert tokens.dtype == np.int32 and tokens.ndim == 1 and tokens.min() >= 0 and tokens.max() < SMALL.vocab_size
    return arrays

  return load


def members(content: bytes) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(content)) as file:
    return {name: file[name] for name in file.files}


def written(arrays: dict[str, Any], save: Callable[..., None] = np.savez) -> bytes:
  file = io.BytesIO()
  save(file, **arrays)
  return file.getvalue()


def with_header(arrays: dict[str, np.ndarray], header: Any) -> dict[str, np.ndarray]:
  return arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}


def signed(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> dict[str, np.ndarray]:
  """With the digest of what they are, as somebody would write it who knows how."""
  own = {name: value for name, value in header.items() if name != "digest"}
  digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode() + b"\0")
  for name, array in arrays.items():
    if name != "header":
      digest.update(np.ascontiguousarray(array).tobytes())
  return with_header(arrays, own | {"digest": digest.hexdigest()})


def header_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  return json.loads(arrays["header"].tobytes())


def test_written_again_it_is_the_same(saved, load):
  """What these tests do to a file is no damage by itself."""
  arrays = members(saved.content)
  for content in (saved.content, written(arrays), written(signed(arrays, header_of(arrays)))):
    assert saved.is_same(load(content))
  np.testing.assert_array_equal(saved.arrays[0], TOKENS)


@RUNS
@given(data=st.data())
def test_flipped_bits(saved, load, data):
  """The same state, where no bit of it was hit, or a refusal."""
  content = bytearray(saved.content)
  for position in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)):
    content[position // 8] ^= 1 << position % 8
  arrays = load(bytes(content))
  assert arrays is None or saved.is_same(arrays)


@RUNS
@given(cut=st.integers(0, 10**6), more=st.binary(max_size=40))
def test_cut_and_extended(saved, load, cut, more):
  """A file that ends early, or goes on."""
  arrays = load(saved.content[: cut % (len(saved.content) + 1)] + more)
  assert arrays is None or saved.is_same(arrays)


ARRAYS = st.one_of(
  st.builds(np.zeros, st.lists(st.integers(0, 4), max_size=5).map(tuple),
            st.sampled_from(["<i4", "<u4", "<f4", "<f8", "|u1", "<i8", ">i4", "|b1", "<U4", "<c8"])),
  st.lists(st.integers(-5, 400), max_size=40).map(lambda values: np.array(values, np.int32)),
  st.lists(st.floats(width=32), max_size=40).map(lambda values: np.array(values, np.float32)))


@RUNS
@given(data=st.data(), sign=st.booleans())
def test_replaced_members(saved, load, data, sign):
  """Any array in the place of another, or one more, or one less; even where the digest is that of the new content."""
  arrays = members(saved.content)
  names = st.sampled_from([*arrays, "more"])
  for name, new in data.draw(st.dictionaries(names, ARRAYS | st.none() | names, min_size=1, max_size=3)).items():
    if new is None:
      arrays.pop(name, None)
    else:
      arrays[name] = arrays.get(new, np.zeros(3)) if isinstance(new, str) else new
  if sign and "header" in arrays:
    arrays = signed(arrays, header_of(members(saved.content)))
  loaded = load(written(arrays))
  assert loaded is None or saved.is_same(loaded, shapes_only=sign)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
                      max_leaves=5)


@RUNS
@given(data=st.data())
def test_changed_headers(saved, load, data):
  """Any value in the place of a field, at any depth, or one more or one less; even with the digest that belongs to it."""
  arrays = members(saved.content)
  header = header_of(arrays)
  owner, field = header, data.draw(st.sampled_from([*header, "more"]))
  if isinstance(owner.get(field), dict) and data.draw(st.booleans()):
    owner = owner[field]
    field = data.draw(st.sampled_from([*owner, "more"]))
  if data.draw(st.booleans()):
    owner[field] = data.draw(VALUES)
  else:
    owner.pop(field, None)
  sign = data.draw(st.booleans()) and isinstance(header, dict)
  loaded = load(written(signed(arrays, header) if sign else with_header(arrays, header)))
  assert loaded is None or saved.is_same(loaded)


@pytest.mark.parametrize("header", [[], None, 5, "x", {}, [[]] * 3], ids=repr)
def test_headers_of_other_types(saved, load, header):
  assert load(written(with_header(members(saved.content), header))) is None


def hostile(saved: Saved) -> Iterator[tuple[str, bytes]]:
  """Files that claim or unfold to far more than they are."""
  arrays = members(saved.content)
  yield "deep", written(arrays | {"header": np.frombuffer(b"[" * 60_000, np.uint8)})
  yield "digits", written(arrays | {"header": np.frombuffer(b'{"schema": ' + b"9" * 60_000 + b"}", np.uint8)})
  yield "deflated", written(arrays | {"tokens": np.zeros(30_000_000, np.int32)}, np.savez_compressed)
  yield "deflated as it was", written(arrays, np.savez_compressed)
  yield "longer", written(signed(arrays | {"tokens": np.zeros(2_000_000, np.int32)}, header_of(arrays) | {"length": 2_000_000}))
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name, array in arrays.items():
      with archive.open(f"{name}.npy", "w") as member:
        shape = (2_500_000_000_000,) if name == "tokens" else array.shape
        np.lib.format.write_array_header_1_0(member, {"descr": array.dtype.str, "fortran_order": False, "shape": shape})
        member.write(array.tobytes())
  yield "claims 10 TB", file.getvalue()
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for i in range(40_000):
      archive.writestr(f"{i}", b"")
  yield "40,000 members", file.getvalue()
  for position, bits, name in ((8, 99, "method"), (6, 1, "encrypted")):
    content = bytearray(saved.content)
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
      content[content.index(signature) + position + shift] |= bits
    yield name, bytes(content)


def test_bombs(saved, load):
  """Nothing is allocated for what a file only claims, or would unfold to."""
  for name, content in hostile(saved):
    tracemalloc.start()
    refused = load(content) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused and peak < 2 * len(content) + 6e6, (name, peak)


def test_what_is_no_file(tmp_path):
  """A pipe would hang, and a folder is none."""
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", pathlib.Path("/dev/zero")):
    with pytest.raises(UserError, match=r"regular file|No such file"):
      load_state(path, SMALL, CAPACITY)


def test_other_weights_are_refused(tmp_path):
  """A state is continued by the weights that it was saved with, and by no others."""
  def engine_of(model: Any, prefixes: int = 1) -> Engine:
    return Engine(model, ByteTokenizer(), rows=1, capacity=CAPACITY, chunk=16, prefixes=prefixes)

  model = lively_model()
  path = tmp_path / "state.npz"
  save_state(path, TOKENS, random_cache(), SMALL, weights_identity(model))
  np.testing.assert_array_equal(engine_of(model).load(path), TOKENS)
  graphdef, params = nnx.split(model)
  leaves, tree = jax.tree.flatten(params)
  leaves[3] = leaves[3].at[(0,) * leaves[3].ndim].add(1e-6)
  with pytest.raises(UserError, match="other weights"):
    engine_of(nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))).load(path)
  for action in (lambda engine: engine.load(path), lambda engine: engine.save(path, [1])):
    with pytest.raises(UserError, match="prefixes=0"):
      action(engine_of(model, 0))


@pytest.fixture(scope="module")
def weights() -> tuple[Any, Any, str]:
  model = lively_model()
  return *nnx.split(model), weights_identity(model)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_identity_of_weights(weights, data):
  """Any bit of any parameter changes it, and so does exchanging two of them."""
  graphdef, params, identity = weights
  leaves, tree = jax.tree.flatten(params)
  which = data.draw(st.integers(0, len(leaves) - 1))
  bits = np.array(leaves[which]).view(np.uint32)
  flat = bits.reshape(-1)
  i, j = (data.draw(st.integers(0, flat.size - 1)) for _ in range(2))
  if data.draw(st.booleans()):
    flat[i] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
  else:
    flat[[i, j]] = flat[[j, i]]
  changed = not np.array_equal(bits, np.array(leaves[which]).view(np.uint32))
  leaves[which] = jnp.asarray(bits.view(np.float32))
  again = weights_identity(nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)))
  assert (again != identity) == changed

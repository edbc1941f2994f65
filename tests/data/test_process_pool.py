"""The pool of worker processes: how many there are, and how little each takes to start."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types

import pytest

from atma_jax.data import prepare as prepare_module
from atma_jax.data import process_pool
from atma_jax.errors import UserError


class Counted:
  """A function that counts how often it is pickled."""

  pickled = 0

  def __reduce__(self):
    Counted.pickled += 1
    return Counted, ()

  def __call__(self, item: int) -> int:
    return -item


def seen_in_worker(_: int) -> tuple[str | None, list[str]]:
  """BLAS threads, and which modules there are of some that tokenising does not need."""
  unwanted = ("jax", "flax", "orbax", "grain")
  return os.environ.get("OPENBLAS_NUM_THREADS"), [name for name in unwanted if name in sys.modules]


def length_and(text: str, item: int) -> tuple[int, int]:
  return len(text), item


def fail_at_three(item: int) -> int:
  if item == 3:
    raise UserError("three")
  return item


def test_by_default_workers_are_one_a_core_and_bounded(monkeypatch):
  for cores, workers in ((1, 1), (12, 12), (32, 32), (64, 32), (256, 32)):
    monkeypatch.setattr(process_pool, "_cores", lambda cores=cores: cores)
    assert process_pool.default_workers() == workers


def test_what_a_worker_imports_first_starts_no_threads():
  command = "import sys, atma_jax.data.process_pool; print(sorted(sys.modules.keys() & {'numpy', 'pyarrow', 'jax'}))"
  result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "[]"


def test_a_worker_imports_its_functions_modules_only_each_with_one_thread(tmp_path, monkeypatch):
  main = types.ModuleType("__main__")
  main.__file__ = str(tmp_path / "main.py")
  marker = tmp_path / "imported"
  (tmp_path / "main.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
  monkeypatch.setitem(sys.modules, "__main__", main)
  before = dict(os.environ)
  assert prepare_module.__name__ in sys.modules  # this file imports all that a worker tokenises with
  with process_pool.Pool(2, seen_in_worker) as pool:
    assert list(pool.map(range(2))) == [("1", [])] * 2
  assert not marker.exists()
  assert sys.modules["__main__"] is main and dict(os.environ) == before


@pytest.mark.slow
def test_the_function_is_pickled_once_for_all_workers():
  Counted.pickled = 0
  with process_pool.Pool(3, Counted()) as pool:
    assert list(pool.map(range(9))) == [-item for item in range(9)]
  assert Counted.pickled == 1


@pytest.mark.slow
def test_starting_a_worker_does_not_wait_for_it(monkeypatch):
  """A function of any size: what goes through the pipe to a starting process fits in it."""
  sizes = []
  dump = process_pool.multiprocessing.reduction.dump
  monkeypatch.setattr(process_pool.multiprocessing.reduction, "dump",
                      lambda value, file: (dump(value, file), sizes.append(file.tell())))
  with process_pool.Pool(2, functools.partial(length_and, "x" * 5_000_000)) as pool:
    assert list(pool.map(range(4))) == [(5_000_000, item) for item in range(4)]
  assert sizes and max(sizes) < 16 << 10


@pytest.mark.slow
def test_no_more_workers_than_items():
  with process_pool.Pool(6, Counted()) as pool:
    assert list(pool.map([5, 7])) == [-5, -7]
    assert len(process_pool.multiprocessing.active_children()) <= 2


def test_an_error_comes_in_its_place():
  with process_pool.Pool(2, fail_at_three) as pool:
    results = pool.map(range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="three"):
      next(results)


def test_no_room_for_the_function_is_said_in_one_line(monkeypatch):
  def no_folder():
    raise FileNotFoundError(2, "No usable temporary directory found")
  monkeypatch.setattr(process_pool.tempfile, "TemporaryFile", no_folder)
  with pytest.raises(UserError, match="temporary file: No usable temporary directory found; TMPDIR names"), \
       process_pool.Pool(2, fail_at_three):
    pass

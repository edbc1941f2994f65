"""Shared fixtures. The process sees one CPU device; tests/multidevice sees eight (its own process).

Programs are compiled once a test run, not once a process: the workers, and the mains they start, share a compilation cache
that lasts as long as the run. Runs compared bit for bit then run the same program.
"""

from __future__ import annotations

import atexit
import os
import pathlib
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit it; jax reads it when it is imported
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="atma_jax-tests-")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden():
  """Loads a golden file by name as a dict of arrays; skips where the golden folder is absent."""
  folder = pathlib.Path(os.environ.get("ATMA_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
  if not folder.is_dir():
    pytest.skip(f"no golden files: set ATMA_GOLDEN (looked in {folder})")

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name) as file:
      return {key: file[key] for key in file.files}

  load.folder = folder
  return load


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with jax.enable_x64(True):
    yield

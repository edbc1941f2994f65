"""Shared fixtures. The process sees one CPU device; tests/multidevice sees eight (its own process)."""

from __future__ import annotations

import os
import pathlib

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

"""Where compiled programs are kept."""

from __future__ import annotations

import jax
import pytest

from atma_jax import __version__
from atma_jax.compilation_cache import use_compilation_cache


@pytest.fixture
def chosen(monkeypatch):
  """The settings that were made, none of which JAX sees."""
  found = {}
  monkeypatch.setattr(jax.config, "update", found.__setitem__)
  return found


@pytest.mark.parametrize("workdir", [None, "/runs/a/"])
def test_auto_is_the_run_or_the_users_cache_unless_the_environment_says_otherwise(chosen, monkeypatch, workdir):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  use_compilation_cache("auto", workdir)
  assert chosen == {}
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", "/home/someone/cache")
  use_compilation_cache("auto", workdir)
  users = f"/home/someone/cache/atma_jax/{__version__}-jax{jax.__version__}/xla_cache"
  assert chosen["jax_compilation_cache_dir"].startswith(f"{'/runs/a/xla_cache' if workdir else users}/cpu-")


def test_a_directory_and_off(chosen):
  use_compilation_cache("/somewhere")
  assert chosen["jax_compilation_cache_dir"] == "/somewhere"
  use_compilation_cache("off")
  assert chosen["jax_enable_compilation_cache"] is False

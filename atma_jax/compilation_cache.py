"""The persistent cache of compiled programs, which spares a restart the compilation."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax


def use_compilation_cache(choice: str, workdir: str) -> None:
  """Turns JAX's persistent compilation cache on or off.

  Args:
    choice: a directory, "off", or "auto": JAX_COMPILATION_CACHE_DIR if that is set, otherwise ``WORKDIR/xla_cache``. There, the
      programs of a CPU go to a folder for its model, because XLA uses whatever instructions a machine has.
    workdir: the directory of the run.
  """
  if choice == "off":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if choice == "auto":
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
      return
    choice = f"{workdir.rstrip('/')}/xla_cache"
    if jax.default_backend() == "cpu":
      choice += f"/cpu-{_cpu_model()}"
  jax.config.update("jax_compilation_cache_dir", choice if "://" in choice else os.path.abspath(choice))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu_model() -> str:
  """A hash of the model and the instruction sets of this machine's CPU."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  known = sorted({line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part")})
  return hashlib.sha256("\n".join([platform.machine(), *known]).encode()).hexdigest()[:12]

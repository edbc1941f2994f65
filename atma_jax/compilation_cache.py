"""The persistent cache of compiled programs, which spares a restart the compilation."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import platform
import tempfile

from absl import logging
import jax

from atma_jax.errors import UserError


def use_compilation_cache(choice: str, workdir: str) -> None:
  """Turns JAX's persistent compilation cache on or off.

  Args:
    choice: a directory, "off", or "auto": JAX_COMPILATION_CACHE_DIR if that is set, otherwise ``WORKDIR/xla_cache``. There, the
      programs of a CPU go to a folder for its model, because XLA uses whatever instructions a machine has.
    workdir: the directory of the run.

  Raises:
    UserError: nothing can be written to a local directory. One that "auto" chose may be read-only: then a finished run can still
      be recognised, and nothing is kept.
  """
  if choice == "off":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  chosen = False
  if choice == "auto":
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
      return
    choice, chosen = f"{workdir.rstrip('/')}/xla_cache", True
    if jax.default_backend() == "cpu":
      choice += f"/cpu-{_cpu_model()}"
  if "://" not in choice:
    choice = os.path.abspath(choice)
    try:
      os.makedirs(choice, exist_ok=True)
      with tempfile.TemporaryFile(dir=choice):
        pass
    except OSError as error:
      if not chosen or error.errno != errno.EROFS:
        raise UserError(f"--compilation_cache={choice}: cannot be written: {error.strerror or error}; legal: a directory, auto, "
                        "off") from error
      logging.warning("compiled programs are not kept: %s cannot be written: %s", choice, error.strerror)
      jax.config.update("jax_enable_compilation_cache", False)
      return
  jax.config.update("jax_compilation_cache_dir", choice)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu_model() -> str:
  """A hash of the model and the instruction sets of this machine's CPU."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  known = sorted({line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part")})
  return hashlib.sha256("\n".join([platform.machine(), *known]).encode()).hexdigest()[:12]

"""The persistent cache of compiled programs, which spares a restart, or another run of the same programs, the compilation."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import platform
import tempfile

from absl import logging
import jax

from atma_jax import __version__
from atma_jax.errors import UserError

HELP = ("Directory of compiled programs; auto is JAX_COMPILATION_CACHE_DIR if that is set, otherwise a folder of this version in "
        "the user's cache, ~/.cache/atma_jax; off keeps none.")


def use_compilation_cache(choice: str, workdir: str | None = None) -> None:
  """Turns JAX's persistent compilation cache on or off.

  Args:
    choice: a directory, "off", or "auto": JAX_COMPILATION_CACHE_DIR if that is set, otherwise ``WORKDIR/xla_cache``, or a folder
      of the user's cache. There, the programs of a CPU go to a folder for its model, because XLA uses whatever instructions a
      machine has.
    workdir: the directory of the run; None for a command that has none. All of a user's commands then share one cache, which
      has a folder for each version of this package and of JAX.

  Raises:
    UserError: nothing can be written to a local directory. A run's directory that "auto" chose may be read-only, and the user's
      cache may be closed: then nothing is kept, and the log says so.
  """
  if choice == "off":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  chosen = False
  if choice == "auto":
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
      return
    choice = f"{workdir.rstrip('/')}/xla_cache" if workdir is not None else str(user_cache())
    chosen = True
    if jax.default_backend() == "cpu":
      choice += f"/cpu-{_cpu_model()}"
  if "://" not in choice:
    choice = os.path.abspath(choice)
    try:
      os.makedirs(choice, exist_ok=True)
      with tempfile.TemporaryFile(dir=choice):
        pass
    except OSError as error:
      if not chosen or (workdir is not None and error.errno != errno.EROFS):
        raise UserError(f"--compilation_cache={choice}: cannot be written: {error.strerror or error}; legal: a directory, auto, "
                        "off") from error
      logging.warning("compiled programs are not kept: %s cannot be written: %s", choice, error.strerror)
      jax.config.update("jax_enable_compilation_cache", False)
      return
  jax.config.update("jax_compilation_cache_dir", choice)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def user_cache() -> pathlib.Path:
  """Where the commands of this user keep compiled programs: below XDG_CACHE_HOME, or ~/.cache."""
  root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  return root / "atma_jax" / f"{__version__}-jax{jax.__version__}" / "xla_cache"


def _cpu_model() -> str:
  """A hash of the model and the instruction sets of this machine's CPU."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  known = sorted({line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part")})
  return hashlib.sha256("\n".join([platform.machine(), *known]).encode()).hexdigest()[:12]

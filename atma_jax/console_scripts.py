"""The commands ``atma-train``, ``atma-evaluate``, ...: each runs ``python -m atma_jax.NAME`` in its own process.

Layer 0: standard library only. Every function here is an entry point in ``pyproject.toml``.
"""

from __future__ import annotations

from collections.abc import Callable
import runpy


def _command(name: str) -> Callable[[], None]:
  """A function that runs the main `name` as ``python -m`` does: its flags, its exit code, its name in messages."""
  def run() -> None:
    runpy.run_module(f"atma_jax.{name}", run_name="__main__", alter_sys=True)

  return run


ablate = _command("ablate")
benchmark = _command("benchmark")
compile_ahead = _command("compile_ahead")
convert = _command("convert")
evaluate = _command("evaluate")
fetch_data = _command("fetch_data")
generate = _command("generate")
lm_eval = _command("lm_eval")
prepare_data = _command("prepare_data")
scaling = _command("scaling")
serve = _command("serve")
train = _command("train")

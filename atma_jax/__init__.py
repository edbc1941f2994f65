"""ATMA: length-invariant language models in JAX and Flax.

    Atma, Config                     the model and everything that can be configured
    load_model, load_pytorch         a trained model from its directory, a published one from PyTorch's files
    generate, evaluate               text from a checkpoint, and its losses and retrieval past the training length
    language_model_loss, save_model  for training loops of your own; `launch/notebooks/atma_tour.ipynb` has one
    register_mixer                   makes a mixer of your own a kind of block
    polar_attention, gated_delta     the two operations, on arrays

Every name is imported when it is first used, so that ``import atma_jax`` costs nothing and starts no accelerator.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from atma_jax.checkpoints.load import load_model
  from atma_jax.checkpoints.store import save_model
  from atma_jax.config import Config
  from atma_jax.evaluation.api import evaluate
  from atma_jax.inference.api import generate
  from atma_jax.models import Atma
  from atma_jax.models.mixers import register_mixer
  from atma_jax.ops import gated_delta, polar_attention
  from atma_jax.pytorch import load_pytorch
  from atma_jax.training.objective import language_model_loss

__version__ = "0.1.0"  # pyproject.toml reads it from here
__all__ = [
  "Atma",
  "Config",
  "__version__",
  "evaluate",
  "gated_delta",
  "generate",
  "language_model_loss",
  "load_model",
  "load_pytorch",
  "polar_attention",
  "register_mixer",
  "save_model",
]

STARTED = time.perf_counter()  # as good as the start of the process: what takes long is imported after this

_MODULE_OF = {
  "Atma": "models",
  "Config": "config",
  "evaluate": "evaluation.api",
  "gated_delta": "ops",
  "generate": "inference.api",
  "language_model_loss": "training.objective",
  "load_model": "checkpoints.load",
  "load_pytorch": "pytorch",
  "polar_attention": "ops",
  "register_mixer": "models.mixers",
  "save_model": "checkpoints.store",
}


def __getattr__(name: str) -> Any:
  if name not in _MODULE_OF:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
  globals()[name] = value  # found at once from now on
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
  """A package in which a public name is never hidden by the submodule of the same name.

  ``atma_jax.generate`` and ``atma_jax.evaluate`` are functions here and commands as modules (``python -m``). Python binds a
  submodule to its package when it is imported, whoever imports it; for these names that would replace the function.
  """

  def __setattr__(self, name: str, value: Any) -> None:
    if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
      super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

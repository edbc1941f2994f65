"""Reads checkpoints of the published PyTorch code into `Atma`, and writes them, without PyTorch."""

from atma_jax.pytorch.archive import read_state_dict
from atma_jax.pytorch.directory import FORMATS, is_published, load_pytorch, read_published, write_published
from atma_jax.pytorch.published_config import model_config, to_published
from atma_jax.pytorch.published_tensors import from_state_dict, parameter_names, to_state_dict

__all__ = [
  "FORMATS",
  "from_state_dict",
  "is_published",
  "load_pytorch",
  "model_config",
  "parameter_names",
  "read_published",
  "read_state_dict",
  "to_published",
  "to_state_dict",
  "write_published",
]

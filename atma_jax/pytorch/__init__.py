"""Published PyTorch checkpoints to and from `Atma`, without PyTorch."""

from atma_jax.pytorch.archive import read_state_dict
from atma_jax.pytorch.directory import FORMATS, is_published, load_pytorch, read_published, write_published
from atma_jax.pytorch.layout import from_state_dict, model_config, parameter_names, to_published, to_state_dict

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

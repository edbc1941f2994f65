"""The matched rope baseline of `atma_378m`, from which only the core of the attention differs: projections, gates and memory are
the same.

  python -m atma_jax.train --config=configs/atma_378m_rope.py --workdir=DIR

Hardware and data: those of `atma_378m`.
Expected (the paper's run): mean bits per byte 1.439 at 2K and 2.512 at 256K: it does not hold past the training length.
"""

import pathlib

from atma_jax.cli import load_recipe
from atma_jax.config import Config


def get_config() -> Config:
  """`atma_378m` with `model.attention="rope"`."""
  config = load_recipe(str(pathlib.Path(__file__).with_name("atma_378m.py")))
  config.name, config.model.attention = "atma_378m_rope", "rope"
  return config

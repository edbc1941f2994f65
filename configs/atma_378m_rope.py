"""The matched rope baseline of `atma_378m`: the same surround, projections, gates and memory; only the core differs.

  python -m atma_jax.train --config=configs/atma_378m_rope.py --workdir=DIR --config.data.sources=bin:/data/fineweb_train_*.bin

Hardware and data: as `atma_378m`.
Expected (the paper's run): mean bits per byte 1.439 at 2K and 2.512 at 256K: it does not hold past the training length.
"""

import importlib.util
import pathlib

from atma_jax.config import Config


def get_config() -> Config:
  """`atma_378m` with `model.attention="rope"`."""
  spec = importlib.util.spec_from_file_location("atma_378m", pathlib.Path(__file__).with_name("atma_378m.py"))
  recipe = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(recipe)
  config = recipe.get_config()
  config.name, config.model.attention = "atma_378m_rope", "rope"
  return config

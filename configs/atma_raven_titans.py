"""Raven in place of attention: four Raven layers with the gated-delta memory among twelve local ones, with Raven's recipe.

  python -m atma_jax.train --config=configs/atma_raven_titans.py --workdir=DIR

Optimizer, data and schedule: those of configs/raven_native.py. Hardware: by the compiler's plan for an H200, a microbatch of
65,536 tokens takes 28 GiB (192 GiB if the backward pass did not recompute blocks). Expected (the published run): validation
loss 3.68 nats, needle at chance.
"""

import pathlib

from atma_jax.cli import load_recipe
from atma_jax.config import Config, ModelConfig


def get_config() -> Config:
  """382.4M parameters."""
  config = load_recipe(str(pathlib.Path(__file__).with_name("raven_native.py")))
  config.name = "atma_raven_titans"
  config.model = ModelConfig(block_pattern=("local", "local", "raven", "local"), num_heads=8, num_kv_heads=2, head_dim=128,
                             remat="block")
  return config

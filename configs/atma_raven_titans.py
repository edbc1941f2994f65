"""Raven in place of attention: four Raven layers with the gated-delta memory among twelve local ones, with Raven's recipe.

  python -m atma_jax.train --config=configs/atma_raven_titans.py --workdir=DIR --config.data.sources=bin:/data/fineweb_train_*.bin

Optimizer, data and schedule: those of configs/raven_native.py. Hardware: by the compiler's plan for an H200, a microbatch of
65,536 tokens takes 28 GiB (192 GiB if the backward pass did not recompute blocks). Expected (the published run): validation
loss 3.68 nats, needle at chance.
"""

from atma_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

STEPS = 1_900


def get_config() -> Config:
  """382.4M parameters."""
  return Config(
    name="atma_raven_titans",
    model=ModelConfig(block_pattern=("local", "local", "raven", "local"), num_heads=8, num_kv_heads=2, head_dim=128,
                      remat="block"),
    data=DataConfig(sources=("bin:data/fineweb_train_*.bin",), tokenizer="gpt2/tokenizer.json", sequence_length=2048,
                    batch_size=256),
    optimizer=OptimizerConfig(kind="adamw", schedule="cosine", warmup_steps=STEPS // 20, adam_b1=0.9, adam_b2=0.95,
                              adam_eps=1e-15),
    train=TrainConfig(steps=STEPS),
  )

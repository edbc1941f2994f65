"""Raven in all sixteen layers, with a recipe of its own: the recurrent baseline of the ATMA experiments.

  python -m atma_jax.train --config=configs/raven_native.py --workdir=DIR

Routed slot memory (goombalab/raven): 256 slots of which a token writes 32, no convolution; AdamW at 3e-4 with a cosine to a
tenth. The published runs add Gumbel noise to the router, which is left out here. Data: 1,900 steps of 524,288 tokens, the
published run of 1B tokens (--config.data.max_mib=5000 prepares no more). Hardware: that of configs/atma_378m.py; the backward
pass recomputes blocks, and a microbatch of 65,536 tokens takes 16 GiB (the compiler's plan for an H200). Expected (the published
run): validation loss 3.88 nats, needle at chance.
"""

from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimizerConfig, TrainConfig

STEPS = 1_900


def get_config() -> Config:
  """388.5M parameters."""
  return Config(
    name="raven_native",
    model=ModelConfig(block_pattern=("raven",), num_heads=4, num_kv_heads=4, head_dim=256, memory=MemoryConfig(enabled=False),
                      remat="block"),
    data=DataConfig(sources=("hf:HuggingFaceFW/fineweb-edu:sample-10BT",), tokenizer="gpt2", sequence_length=2048,
                    batch_size=256),
    optimizer=OptimizerConfig(kind="adamw", schedule="cosine", warmup_steps=STEPS // 20, adam_b1=0.9, adam_b2=0.95,
                              adam_eps=1e-15),
    train=TrainConfig(steps=STEPS),
  )

"""The published architecture on text that every machine has: 291.9M parameters, T = 2048, 252M tokens.

  python -m atma_jax.train --config=longrun --workdir=runs/longrun
  python -m atma_jax.evaluate --checkpoint=runs/longrun --output=runs/longrun/evaluation --suite=loss,gain \
    --multiples=1,2,4,8,16,32,64 --batch_tokens=131072

Data: the Python packages of the installation (340 MB in the runs that were measured; ten whole packages are held out) with a
SentencePiece vocabulary of 8192, and recall material made from them. An eighth of the steps shows every row the keys and values
of eight other rows besides its own text (`train.foreign_keys`); without that, the loss rises past 8 times the training length.
Hardware: two H200s. They made 410,000 tokens/s while nothing else ran on them, and trained for 811 s in all, the last third
beside other runs. The compiler's plan takes 45 GiB of each. On one, set --config.train.accumulation=2 (not run).
Expected (seed 0): stream loss 1.224 nats at 2K falling at every doubling to 1.107 at 128K; needle, all five digits right, 99 % at
2K and 85 % at 64K. configs/results/README.md, "The published size with foreign keys", has the rest.
"""

from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig, TrainConfig


def get_config() -> Config:
  """Polar attention and memory, 16 layers of width 1024, T = 2048."""
  return Config(
    name="longrun",
    model=ModelConfig(vocab_size=8192, null_length=2048, direction_scale=11.314, init="mimetic",
                      memory=MemoryConfig(max_half_life=2048.0), remat="dots", scan=False),
    data=DataConfig(sources=("python-packages", "recall:python-packages"), weights=(0.9, 0.1), heldout_documents=10,
                    sequence_length=2048, batch_size=64),
    train=TrainConfig(steps=1920, foreign_keys=(0, 0, 0, 0, 0, 0, 0, 16_384), loss_chunk=256, log_every=40, checkpoint_every=960,
                      validate_every=0),
  )

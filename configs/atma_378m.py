"""The published size and recipe: 378.22M parameters, polar attention and memory, 9.816B tokens at T = 2048.

  python -m atma_jax.train --config=configs/atma_378m.py --workdir=DIR --config.data.sources=bin:/data/fineweb_train_*.bin

Data: FineWeb-Edu as GPT-2 token shards (`.bin`), documents joined by the end-of-text token.
Hardware: made for an 8-device data-parallel host; on fewer devices raise train.accumulation. 65,536 tokens a device and
microbatch take 42.5 GiB (`python -m atma_jax.benchmark --table=step`), a microbatch with the optimizer 327 ms of an H200.
Expected (the paper's run): document loss 2.70 nats at 2K falling to 1.96 at 64K; induction needle 91 % at 2K, 93 % at 64K.
"""

from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig


def get_config() -> Config:
  """Polar attention, memory on: the defaults of `Config` but for memory and speed."""
  return Config(
    name="atma_378m",
    model=ModelConfig(remat="dots", scan=False),
    data=DataConfig(sources=("bin:data/fineweb_train_*.bin",), tokenizer="gpt2/tokenizer.json", sequence_length=2048,
                    batch_size=256),
    train=TrainConfig(steps=18_722, accumulation=1, loss_chunk=256),
  )

"""The published size and recipe: 378.22M parameters, polar attention and memory, 9.816B tokens at T = 2048.

  python -m atma_jax.train --config=configs/atma_378m.py --workdir=DIR

Data: the sample of 10 billion GPT-2 tokens of FineWeb-Edu, from the Hugging Face hub (extra `hf`), documents joined by the
end-of-text token. Ready shards do as well: --config.data.sources=bin:/data/fineweb_train_*.bin.
Hardware: a host with 8 data-parallel devices; on fewer devices raise train.accumulation. On an H200, a microbatch of 65,536
tokens takes 42.5 GiB and, with the optimizer, 327 ms (`python -m atma_jax.benchmark --table=step`).
Expected (the paper's run): document loss 2.70 nats at 2K falling to 1.96 at 64K; induction needle 91 % at 2K, 93 % at 64K.
"""

from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig


def get_config() -> Config:
  """Polar attention and memory: the defaults of `Config`, except for what the step takes and how fast it is."""
  return Config(
    name="atma_378m",
    model=ModelConfig(remat="dots", scan=False),
    data=DataConfig(sources=("hf:HuggingFaceFW/fineweb-edu:sample-10BT",), tokenizer="gpt2", sequence_length=2048,
                    batch_size=256),
    train=TrainConfig(steps=18_722, accumulation=1, loss_chunk=256),
  )

"""Seven billion parameters for a pod: 7.09B, T = 4096, 142.6B tokens (20 a parameter).

  python -m atma_jax.compile_ahead --config=configs/atma_7b.py --topology=v5p:4x4x8
  python -m atma_jax.train --config=configs/atma_7b.py --workdir=gs://BUCKET/atma_7b --config.data.directory=/data/atma_7b

Sizes: the published block at four times its width. Heads of 128 and four query heads per key/value head are kept; the MLP is
8/3 C wide, rounded to a multiple of 256, instead of 4 C, so that its three matrices hold 8 C^2 parameters, as the MLPs of
ungated 7B models do. With 4 C, and a mixer of two C^2 more than theirs, the same depth would make
9.2B. 32 blocks: 24 local, 8 global with memory.
Data: the sample of 100 billion GPT-2 tokens of FineWeb-Edu, from the Hugging Face hub (extra `hf`), documents joined by the
end-of-text token; 1.4 times over. Ready shards do as well: --config.data.sources=bin:/data/fineweb_train_*.bin.
Hardware: 128 chips of v5p. `compile_ahead` expects 28.8 of 95.7 GiB a device and steps of 4.1 s or more (arithmetic).
"""

from atma_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
  """Parameters, gradients and optimizer state are sharded over all devices (fsdp); the backward pass recomputes blocks."""
  return Config(
    name="atma_7b",
    model=ModelConfig(num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=11_008, remat="block"),
    data=DataConfig(sources=("hf:HuggingFaceFW/fineweb-edu:sample-100BT",), tokenizer="gpt2", sequence_length=4096,
                    batch_size=1024),
    optimizer=OptimizerConfig(warmup_steps=500),
    train=TrainConfig(steps=34_000, accumulation=1),
    mesh=MeshConfig(data=1, fsdp=-1),
  )

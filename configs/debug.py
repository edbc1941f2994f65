"""A run of seconds on a CPU, to see everything work: bytes, four tiny blocks, 40 steps.

  python -m atma_jax.train --config=debug --workdir=runs/debug
  python -m atma_jax.evaluate --checkpoint=runs/debug --output=runs/debug/evaluation

Data: 1 MiB of Python's standard library, which is read in about a second; four of its longest files are held out.
Hardware: any CPU, about half a minute. Expected: the loss falls from 5.5 to under 4 nats a byte.
"""

from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
  """Four blocks of width 32, T = 64."""
  return Config(
    name="debug",
    model=ModelConfig(vocab_size=257, num_layers=4, width=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64,
                      memory=MemoryConfig(), activation_dtype="float32"),
    data=DataConfig(sources=("python-library",), weights=(1.0,), tokenizer="bytes", max_mib=1, validation_documents=4,
                    heldout_documents=4, shard_tokens=1_000_000, sequence_length=64, batch_size=8),
    optimizer=OptimizerConfig(embedding_learning_rate=0.03),
    train=TrainConfig(steps=40, log_every=5, checkpoint_every=20, validate_every=20, validation_batches=2,
                      validation_lengths=(1, 2)),
  )

"""A small model with polar attention and memory, trained on Python source and measured past its training length on two CPU cores.

  bash launch/quickstart.sh

Data: half the Python installation's own source (`python-source`), half recall material (`recall:python-source`): records such
as "The access code for record 4071962 is 3 9 2 0 1", asked for again later, with real source in between. The recall half and
`init="mimetic"` are what lets so small a model learn to retrieve within 3.3 million tokens; the keys and values of the material
never occur in the evaluation. `null_length` is the training length, so that the logit of the null does not grow past the values
it was trained at; without it, a third of the digits are lost at 32 times that length. `direction_scale` is sqrt(head_dim), so
that the entries of polar attention's direction are as large as those of other activations; without it, every loss is higher.
Hardware: 2 CPU cores, about 6 minutes of training.
"""

from atma_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
  """About one million parameters, T = 256."""
  return Config(
    name="quickstart",
    model=ModelConfig(vocab_size=1024, num_layers=4, width=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=384,
                      null_length=256, direction_scale=5.657, activation_dtype="float32", init="mimetic"),
    data=DataConfig(sources=("python-source", "recall:python-source"), weights=(0.5, 0.5), tokenizer_vocab_size=1024,
                    tokenizer_train_mib=4, max_mib=12, validation_documents=32, heldout_documents=16,
                    shard_tokens=1_000_000, sequence_length=256, batch_size=16),
    optimizer=OptimizerConfig(embedding_learning_rate=0.1),
    train=TrainConfig(steps=800, log_every=20, checkpoint_every=100, validate_every=200, validation_lengths=(1, 2, 4, 8)),
  )

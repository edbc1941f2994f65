"""Fine-tunes the quickstart model on conversations: questions about the installed Python packages, answered by their docstrings.

  bash launch/quickstart.sh
  python -m atma_jax.train --config=chat --workdir=runs/chat
  python -m atma_jax.serve --checkpoint=runs/chat

Data: one question for each public function, method and class of this Python installation with a docstring, such as "What does
getsource in inspect do?", whose first paragraph is the answer (`docstrings`). Only answers are predicted. Conversations of your
own, one {"messages": [...]} a line:

  python -m atma_jax.train --config=chat --workdir=runs/mine --config.data.sources=chat:FILE.jsonl --config.train.steps=100

Another checkpoint is named by --config.train.init_from=DIR; the model here must then be its model. `atma_378m` and the like take
the same options as flags. The rates are a tenth of those of pre-training.
Hardware: 2 CPU cores, three minutes (168 s of steps beside other work). Expected, after `quickstart`: the loss of the answers
falls from 2.86 at step 20 to 2.33 nats a token at step 200, and is 2.82 on unseen questions
(configs/results/quickstart/chat_results.csv). A model of a million parameters learns how a docstring sounds; it does not learn
what the functions do, and its likeliest answers repeat themselves.
"""

import pathlib

from atma_jax.cli import load_recipe
from atma_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
  """The model of `quickstart`, T = 256, 200 steps."""
  return Config(
    name="chat",
    model=load_recipe(str(pathlib.Path(__file__).with_name("quickstart.py"))).model,
    data=DataConfig(sources=("docstrings",), tokenizer="init_from", max_mib=1, validation_documents=16, heldout_documents=0,
                    shard_tokens=1_000_000, sequence_length=256, batch_size=16),
    optimizer=OptimizerConfig(embedding_learning_rate=0.1, learning_rate_scale=0.1, warmup_steps=10),
    train=TrainConfig(steps=200, init_from="runs/quickstart", log_every=20, checkpoint_every=100, validate_every=100),
  )

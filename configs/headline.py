"""The headline comparison: polar attention with memory against matched softmax models, on Python source and recall material.

To train one model and evaluate it up to 128 times its training length:

  python -m atma_jax.train --config=configs/headline.py --workdir=runs/polar
  python -m atma_jax.evaluate --checkpoint=runs/polar --output=runs/polar/evaluation --suite=loss,needle,lookup \
    --lookup_haystacks=text --trials=400 --multiples=1,2,4,8,16,32,64,128 --batch_tokens=65536

To run the main contrast with two seeds (12 cells), and the whole grid (27 cells per seed: core, memory, bound on retention,
initialisation):

  python -m atma_jax.ablate --config=configs/headline.py --output=runs/headline --seeds=0,1 \
    --axis model.attention=polar,nope,rope --axis model.memory.enabled=true,false \
    --trials=400 --multiples=1,2,4,8,16,32,64,128 --batch_tokens=65536
  python -m atma_jax.ablate --config=configs/headline.py --output=runs/grid --seeds=0,1 --preset=headline \
    --trials=400 --multiples=1,2,4,8,16,32,64,128 --batch_tokens=65536

Data: the `.py` files of the Python installation with a SentencePiece vocabulary of 8192 (90 % of the sequences), and recall
material made from them (10 %), in which the keys and values of the evaluation never occur. 59M tokens in 900 steps of 65,536.
Hardware: one GPU of 80 GB runs three cells at a time (`--parallel=3`), each with four minutes of training on an H100 or H200;
with several GPUs, name all of them (`--gpus=0,1,2,3 --parallel=12`).
Expected: with `--config.data.sources=python-packages,recall:python-packages --config.data.heldout_documents=10` (whole packages
held out) and seed 7, stream loss 1.632 nats at 512 tokens, 1.401 at 16K, 1.419 at 64K; needle, all five digits right, 100, 98 and
96 %. An eighth of the steps shows every row the keys and values of sixteen other rows (`train.foreign_keys`); with
`--config.train.foreign_keys=0` the losses are 1.623, 1.465 and 1.560, the needle 98, 63 and 43 % (seed 8). The grid in
configs/results/headline was run without foreign keys and, where it does not say otherwise, without a bound on retention
(`--config.model.memory.max_half_life=None`). See configs/results/README.md.
"""

from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig, TrainConfig


def get_config() -> Config:
  """Polar attention and memory, 8 layers of width 512, T = 512."""
  return Config(
    name="headline",
    model=ModelConfig(vocab_size=8192, num_layers=8, width=512, num_heads=8, num_kv_heads=2, head_dim=64, mlp_width=2048,
                      null_length=512, direction_scale=8.0, memory=MemoryConfig(max_half_life=512.0), init="mimetic", scan=False),
    data=DataConfig(sources=("python-source", "recall:python-source"), weights=(0.9, 0.1), recall_max_mib=16,
                    sequence_length=512, batch_size=128),
    train=TrainConfig(steps=900, foreign_keys=(0, 0, 0, 0, 0, 0, 0, 8192), log_every=50, checkpoint_every=450, validate_every=0),
  )

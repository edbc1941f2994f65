"""Times ops, training steps and generation on this machine's default device, and compares the ops with their oracles.

    python -m atma_jax.benchmark [--table=ops,step,forward,generation] [--config=atma_378m] [--config.FIELD=VALUE ...]

All tables come from one process, so that their numbers can be compared:

* ``ops``: forward, and forward + backward, of polar attention, its softmax rival and the gated delta. TFLOP/s count the causal
  half of attention (3.5 times that with backward) and 8 D^2 operations a step of the gated delta (3 times that), and are also
  given as a fraction of a large matrix product's. Errors, of outputs and the worst gradient, are relative to float32 oracles.
* ``step``: the recipe's training step on random tokens: one microbatch of --step_tokens, the recipe's whole batch in such
  microbatches, and the optimizer alone.
* ``forward``: the recipe's model on long sequences.
* ``generation``: prefill and decoding of one sequence at each of --contexts, and decoding of --batches sequences at
  --batch_context. The predicted time of a step is the bytes that it must move over the bandwidth of a copy.
* ``tune``, only if it is asked for: candidates for the kernels' block sizes, and the entries for `atma_jax.ops.core.tiles`.
"""

from __future__ import annotations

from absl import flags

from atma_jax import cli
from atma_jax.benchmarks.block_sizes import tune
from atma_jax.benchmarks.generation_speed import Options, generation_table
from atma_jax.benchmarks.model_speed import forward_table, step_table
from atma_jax.benchmarks.op_speed import ops_table
from atma_jax.config import AT_LEAST_1, INT32
from atma_jax.errors import UserError
from atma_jax.memory_needs import check_model_fits
from atma_jax.models.cache import CACHE_DTYPES

TABLES = ("ops", "step", "forward", "generation", "tune")

_CONFIG = cli.define_config_flag("atma_378m")
_TABLE = flags.DEFINE_list("table", list(TABLES[:-1]), f"Tables to print: {', '.join(TABLES)}.")
_SHAPES = flags.DEFINE_list("shapes", ["8x2048", "2x8192", "1x32768"], "Shapes BxT, batch and length, of the table of ops.")
_STEP_TOKENS = flags.DEFINE_integer("step_tokens", 65_536, "Tokens in a microbatch.", lower_bound=1, upper_bound=INT32)
_FORWARD_LENGTHS = flags.DEFINE_list("forward_lengths", ["65536", "262144"], "Sequence lengths of the table of forward passes.")
_CONTEXTS = flags.DEFINE_list("contexts", ["2048", "131072"], "Prompt lengths for the generation of one sequence.")
_BATCHES = flags.DEFINE_list("batches", ["64", "256"], "Numbers of sequences that are decoded together.")
_BATCH_CONTEXT = flags.DEFINE_integer("batch_context", Options.batch_context, "Their prompt length.", lower_bound=1,
                                     upper_bound=INT32)
_CHUNK = flags.DEFINE_integer("chunk", Options.chunk, "Prompt tokens in one forward pass, a power of two.")
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", Options.decode_steps, "Tokens decoded per program.", lower_bound=1)
flags.DEFINE_alias("stride", "decode_steps")  # its earlier name
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, CACHE_DTYPES, "Dtype of keys and values. Default: the model's.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Calls of each function that are timed.", lower_bound=1, upper_bound=INT32)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of inputs and parameters.", lower_bound=0, upper_bound=(1 << 32) - 1)


def main() -> None:
  """Prints the tables that `--table` names; raises UserError on bad flags."""
  unknown = [name for name in _TABLE.value if name not in TABLES]
  if unknown or not _TABLE.value:
    raise UserError(f"--table={','.join(_TABLE.value)}: must be among {', '.join(TABLES)}")
  try:
    shapes = [(int(rows), int(length)) for rows, _, length in (shape.partition("x") for shape in _SHAPES.value)]
  except ValueError:
    shapes = []
  if not shapes or not all(AT_LEAST_1.allows(n) for shape in shapes for n in shape):
    raise UserError(f"--shapes={','.join(_SHAPES.value)}: must be BxT pairs such as 8x2048,1x32768")
  lengths, contexts, batches = (cli.whole_numbers(f.name, f.value) for f in (_FORWARD_LENGTHS, _CONTEXTS, _BATCHES))
  check_model_fits(_CONFIG.value.model, max(lengths) if "forward" in _TABLE.value else 0)
  if "tune" in _TABLE.value:
    tune(_CONFIG.value, shapes, _REPEATS.value, _SEED.value)
  if "ops" in _TABLE.value:
    ops_table(_CONFIG.value, shapes, _REPEATS.value, _SEED.value)
  if "step" in _TABLE.value:
    step_table(_CONFIG.value, _STEP_TOKENS.value, _REPEATS.value, _SEED.value)
  if "forward" in _TABLE.value:
    forward_table(_CONFIG.value, list(lengths), _SEED.value)
  if "generation" in _TABLE.value:
    options = Options(contexts, batches, batch_context=_BATCH_CONTEXT.value, chunk=_CHUNK.value,
                      decode_steps=_DECODE_STEPS.value, cache_dtype=_CACHE_DTYPE.value)
    generation_table(_CONFIG.value, options, _SEED.value)


if __name__ == "__main__":
  cli.run(main)

"""Times the ops and a whole training step on this machine's default device, and checks the ops against their oracle.

    python -m atma_jax.benchmark [--table=ops,step,forward,generation] [--config=configs/atma_378m.py] [--config.FIELD=VALUE ...]

Four tables, all in one process so that their numbers can be compared:

* ``ops``: forward and forward + backward of polar attention, its softmax rival and the gated delta; TFLOP/s of the causal
  half (3.5 x for forward + backward; the delta's recurrence 8 D^2 a step, 3 x) and their fraction of a large matrix
  product; relative error of outputs and of the worst gradient against the float32 oracle, at a length of at most 512.
* ``step``: the recipe's training step on random tokens: one microbatch of --step_tokens with the optimizer, the recipe's
  whole batch in such microbatches, and the optimizer alone.
* ``forward``: the recipe's model on long sequences.
* ``generation``: prefill and decoding of one sequence at --contexts, decoding of --batches sequences at --batch_context, each
  step's time beside the bytes it must move over the bandwidth of a copy.
* ``tune``, only if asked for: candidates for the kernels' block sizes, and the lines that belong into `atma_jax.ops.core.tiles`.
"""

from __future__ import annotations

import math

from absl import flags

from atma_jax import cli
from atma_jax.benchmarks.generation import Options, generation_table
from atma_jax.benchmarks.kernel_tables import forward_table, ops_table, step_table
from atma_jax.benchmarks.tuning import tune
from atma_jax.errors import UserError
from atma_jax.models.cache import CACHE_DTYPES

TABLES = ("ops", "step", "forward", "generation", "tune")

_CONFIG = cli.define_config_flag("configs/atma_378m.py")
_TABLE = flags.DEFINE_list("table", list(TABLES[:-1]), f"Tables to print: {', '.join(TABLES)}.")
_SHAPES = flags.DEFINE_list("shapes", ["8x2048", "2x8192", "1x32768"], "BxT of the ops.")
_STEP_TOKENS = flags.DEFINE_integer("step_tokens", 65_536, "Tokens of a microbatch.", lower_bound=1)
_FORWARD_LENGTHS = flags.DEFINE_list("forward_lengths", ["65536", "262144"], "Lengths of the long forward passes.")
_CONTEXTS = flags.DEFINE_list("contexts", ["2048", "131072"], "Contexts that one sequence is generated at.")
_BATCHES = flags.DEFINE_list("batches", ["64", "256"], "Numbers of sequences decoded together.")
_BATCH_CONTEXT = flags.DEFINE_integer("batch_context", Options.batch_context, "Their context.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", Options.chunk, "Prompt tokens in one forward pass, a power of two.")
_STRIDE = flags.DEFINE_integer("stride", Options.stride, "Tokens decoded between two looks of the host.", lower_bound=1)
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, CACHE_DTYPES, "Of keys and values; default is the model's.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls of each function.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of inputs and parameters.", lower_bound=0)


def main() -> None:
  """Prints the tables that `--table` names. Raises UserError on bad flags."""
  unknown = [name for name in _TABLE.value if name not in TABLES]
  if unknown or not _TABLE.value:
    raise UserError(f"--table={','.join(_TABLE.value)}: must be among {', '.join(TABLES)}")
  try:
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in _SHAPES.value]
    lengths, contexts, batches = ([int(n) for n in flag.value] for flag in (_FORWARD_LENGTHS, _CONTEXTS, _BATCHES))
  except ValueError as error:
    raise UserError(f"--shapes, --forward_lengths, --contexts and --batches: {error}; write 8x2048,1x32768 and 65536,262144"
                    ) from error
  if min(contexts + batches, default=1) < 1:
    raise UserError("--contexts and --batches: must be at least 1")
  if not shapes or any(len(shape) != 2 or math.prod(shape) < 1 for shape in shapes):
    raise UserError(f"--shapes={','.join(_SHAPES.value)}: must be BxT pairs such as 8x2048,1x32768")
  if "tune" in _TABLE.value:
    tune(_CONFIG.value, shapes, _REPEATS.value, _SEED.value)
  if "ops" in _TABLE.value:
    ops_table(_CONFIG.value, shapes, _REPEATS.value, _SEED.value)
  if "step" in _TABLE.value:
    step_table(_CONFIG.value, _STEP_TOKENS.value, _REPEATS.value, _SEED.value)
  if "forward" in _TABLE.value:
    forward_table(_CONFIG.value, lengths, _SEED.value)
  if "generation" in _TABLE.value:
    options = Options(tuple(contexts), tuple(batches), batch_context=_BATCH_CONTEXT.value, chunk=_CHUNK.value,
                      stride=_STRIDE.value, cache_dtype=_CACHE_DTYPE.value)
    generation_table(_CONFIG.value, options, _SEED.value)


if __name__ == "__main__":
  cli.run(main)

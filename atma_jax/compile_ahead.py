"""Compiles the training or evaluation step of a recipe for a TPU pod that is not there, and prints what it would take.

    python -m atma_jax.compile_ahead --config=configs/atma_378m.py --topology=v5e:16x16 [--slices=2]
    python -m atma_jax.compile_ahead --config=configs/atma_378m.py --topology=v5e:8x8 --mode=evaluate --length=1048576

Prints the memory of a device, operations, collectives, and a roofline of the step time. A plan that does not fit ends in one line
with the numbers and exit code 2. Needs no TPU, only libtpu (extra ``[tpu]``).
"""

from __future__ import annotations

from absl import flags
import jax

from atma_jax import cli
from atma_jax.config import INT32, MOST_DEVICES
from atma_jax.errors import UserError
from atma_jax.planning.ahead import MODES, plan

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "Generation and shape, such as v5e:16x16, v5p:4x4x8 or v6e:8x8.")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices of that shape, joined along the data axis.", lower_bound=1,
                               upper_bound=MOST_DEVICES)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "The step to compile.")
_LENGTH = flags.DEFINE_integer("length", None, "Tokens of a sequence in mode evaluate.", lower_bound=1, upper_bound=INT32)
_BATCH = flags.DEFINE_integer("batch", None, "Sequences in mode evaluate.", lower_bound=1, upper_bound=INT32)


def main() -> None:
  """Prints the plan of one training or evaluation step. Raises UserError for bad flags and for a step that does not fit."""
  config = _CONFIG.value
  if not _TOPOLOGY.value:
    raise UserError("--topology=GENERATION:SHAPE is required, such as --topology=v5e:16x16")
  given = {f"--length={_LENGTH.value}": _LENGTH.present, f"--batch={_BATCH.value}": _BATCH.present}
  if _MODE.value == "train" and (unused := [flag for flag, present in given.items() if present]):
    raise UserError(f"{unused[0]}: is for --mode=evaluate; in mode train the recipe says it "
                    "(--config.data.sequence_length, --config.data.batch_size)")
  jax.config.update("jax_platforms", "cpu")  # the compiler needs no device, and should not wait for one
  result = plan(config, _TOPOLOGY.value, slices=_SLICES.value, mode=_MODE.value, length=_LENGTH.value, batch=_BATCH.value)
  print("\n".join(result.lines()))


if __name__ == "__main__":
  cli.run(main)

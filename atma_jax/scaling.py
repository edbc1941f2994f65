"""Measures one host's devices together against one of them.

    python -m atma_jax.scaling --devices=2 [--config=atma_378m] [--parts=recovery,training,agreement,sequence,decoding]

One table per part; every line names the mesh it ran on:

* ``recovery``: one training process per device, of which one is killed with SIGKILL: how long the others take to end, and
  whether the run resumes on half of the devices. It runs first, because its processes need the devices' memory.
* ``training``: the recipe's step at the same tokens per device on one device and on data=N, fsdp=N and tensor=2, and at
  --long_length tokens per sequence on context=2. "Of linear" is the speed per device over that of one device; exposed
  communication is the share of the step in which collectives run and nothing else does, from a profile of the device.
* ``agreement``: ten float32 steps on every mesh against one device, within a bound for what rounding can change.
* ``sequence``: the losses of one sequence of --sequence_length tokens split over all devices.
* ``decoding``: greedy tokens with tensor=2 against one device (in float32), and the time per token (in the recipe's dtype).
"""

from __future__ import annotations

from absl import flags
import jax

from atma_jax import cli
from atma_jax.benchmarks import multi_device
from atma_jax.benchmarks.multi_device import PARTS
from atma_jax.errors import UserError

_CONFIG = cli.define_config_flag("atma_378m")
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"Tables to print: {', '.join(PARTS)}.")
_DEVICES = flags.DEFINE_integer("devices", None, "Devices to use; default is all. Required by the part recovery.", lower_bound=2)
_STEP_TOKENS = flags.DEFINE_integer("step_tokens", 65_536, "Tokens per device and step.", lower_bound=1)
_LONG_LENGTH = flags.DEFINE_integer("long_length", 32_768, "Sequence length of the step with context=2.", lower_bound=1)
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 1_048_576, "Length of the sequence that is scored.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("decode_context", 2048, "Prompt length when decoding is timed.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of tokens and parameters.", lower_bound=0)


def main() -> None:
  """Prints the tables that `--parts` names. Raises UserError on bad flags."""
  parts, config, seed = _PARTS.value, _CONFIG.value, _SEED.value
  if not parts or not set(parts) <= set(PARTS):
    raise UserError(f"--parts={','.join(parts)}: must be among {', '.join(PARTS)}")
  if "recovery" in parts:
    if _DEVICES.value is None:
      raise UserError("--devices=N is required by --parts=recovery, which starts N processes before this one takes the devices")
    multi_device.recovery_table(_DEVICES.value)
  devices = _DEVICES.value or jax.device_count()
  if not 2 <= devices <= jax.device_count():
    raise UserError(f"--devices={devices}: must be at least 2 and at most the {jax.device_count()} of this machine")
  print(f"\n{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
  if "training" in parts:
    multi_device.training_table(config, devices, _STEP_TOKENS.value, _LONG_LENGTH.value, _REPEATS.value, seed)
  if "agreement" in parts:
    multi_device.agreement_table(multi_device.agreement_recipe(devices), devices, seed)
  if "sequence" in parts:
    multi_device.sequence_table(config, devices, _SEQUENCE_LENGTH.value, seed)
  if "decoding" in parts:
    multi_device.decoding_table(config, _CONTEXT.value, seed)


if __name__ == "__main__":
  cli.run(main)

"""Operations of a training step, for an honest MFU.

Counted, per token, forward; a multiply-add is two operations:
  * every kernel and the head: 2 x its size (embedding look-ups are none);
  * depthwise filters: 2 x taps x channels;
  * attention of a global layer: scores and values, 2 x 2 H D keys, with the mean number of visible keys: (T + 1) / 2, or
    the window's;
  * slots of a Raven layer: decay and write of keys and values, scores, read: 10 H D a slot;
  * memory: decay, erase, write and read of a D x D state, 8 H D^2 (the recurrence, whatever the chunk).
The backward pass costs twice the forward; rematerialisation is not counted as useful work.
"""

from __future__ import annotations

import math

import jax

from atma_jax.config import ModelConfig
from atma_jax.models.definition import ModelDefinition

# Dense bfloat16 TFLOP/s of one device, from the vendors' datasheets, by a part of `Device.device_kind`.
PEAK_TFLOPS = {
  "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5p": 459,
  "TPU v5": 459, "TPU v6": 918, "TPU7x": 2307,
}


def training_flops_per_token(definition: ModelDefinition, sequence_length: int) -> float:
  """Operations of forward and backward per target token."""
  config: ModelConfig = definition.config
  params = jax.eval_shape(definition.init, jax.random.key(0))
  forward = sum(2 * math.prod(params[name].shape) for name, group in definition.optimizer_groups.items()
                if group in ("muon", "muon_depthwise", "head"))
  window = sequence_length if config.window is None else min(config.window, sequence_length)
  visible = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
  pattern = config.block_pattern
  kinds = [pattern[i % len(pattern)] for i in range(config.num_layers)]
  layers, slots = kinds.count("global"), kinds.count("raven") * config.raven.slots
  forward += layers * 4 * config.num_heads * config.head_dim * visible
  forward += slots * 10 * config.num_heads * config.head_dim
  if config.memory.enabled:
    forward += (layers + kinds.count("raven")) * 8 * config.num_heads * config.head_dim**2
  return 3 * forward


def peak_flops(configured_tflops: float | None) -> float | None:
  """Operations a second of all devices together, or None where the device is unknown."""
  kind = jax.devices()[0].device_kind
  tflops = configured_tflops or next((value for name, value in PEAK_TFLOPS.items() if name in kind), None)
  return None if tflops is None else tflops * 1e12 * jax.device_count()

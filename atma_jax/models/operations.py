"""Operations of a training step, for an honest MFU.

Counted, per token, forward; a multiply-add is two operations:
  * every kernel and the head: 2 x its size (embedding look-ups are none);
  * depthwise filters: 2 x taps x channels;
  * what a mixer does besides: `Mixer.operations`, such as attention's scores and values over the mean number of visible keys.
The backward pass costs twice the forward; rematerialisation is not counted as useful work.
"""

from __future__ import annotations

import collections
import math

import jax

from atma_jax.models.definition import ModelDefinition
from atma_jax.models.mixers import mixer_class
from atma_jax.ops.core import devices

_COUNTED_GROUPS = ("muon", "muon_depthwise", "head")  # optimizer groups of the parameters that take part in products


def training_flops_per_token(definition: ModelDefinition, sequence_length: int) -> float:
  """Operations of forward and backward per target token."""
  params = jax.eval_shape(definition.init, jax.random.key(0))
  forward = sum(2 * math.prod(params[name].shape) for name, group in definition.optimizer_groups.items()
                if group in _COUNTED_GROUPS)
  for kind, layers in collections.Counter(definition.config.layer_kinds).items():
    forward += layers * mixer_class(kind).operations(definition.config, sequence_length)
  return 3 * forward


def peak_flops(configured_tflops: float | None) -> float | None:
  """Operations a second of all devices together, or None where the device is unknown."""
  device = devices.of_kind(jax.devices()[0].device_kind)
  tflops = configured_tflops or (device.tflops if device else None)
  return None if tflops is None else tflops * 1e12 * jax.device_count()

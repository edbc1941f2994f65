"""Suite ``diagnostics``: what happens inside, layer by layer, as the context grows past the training length.

All are means over the second half of the context, tokens L/2 to L of held-out documents, so that every length looks at tokens
of its own; the reference 1x is the second half of the training length. One record a layer; `bins` hold the heads.

* ``residual_mean_shift``: distance of a block's mean output from that at 1x, over the square root of the width and the
  standard deviation at 1x; ``residual_std_ratio`` and ``residual_rms_ratio``: of the output, over those at 1x. The standard
  deviation is over tokens, a channel at a time, the root of the mean variance of the channels.
* Polar attention: ``n_eff``, ``w_null``, ``magnitude`` and ``magnitude_saturation``, the share of magnitudes above 0.99.
* Memory: ``memory_norm``, the Frobenius norm of a head's state after the last token, and ``readout_rms``, before its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atma_jax.evaluation.cells import Cell, Inputs, Progress, fingerprint
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.statistics import mean_and_error
from atma_jax.evaluation.tapping import document_rows, tapped
from atma_jax.models.block import Block, Tap, Trace
from atma_jax.ops import polar_statistics

SATURATED = 0.99
RESIDUAL = ("residual_mean_shift", "residual_std_ratio", "residual_rms_ratio")
POLAR = ("n_eff", "w_null", "magnitude", "magnitude_saturation")
MEMORY = ("memory_norm", "readout_rms")

Layers = list[dict[str, np.ndarray]]


def diagnostics_cells(inputs: Inputs) -> list[Cell]:
  """One cell a length."""
  rows, training = document_rows(inputs, "diagnostics"), inputs.config.data.sequence_length
  if training > rows.shape[1]:
    rows = document_rows(dataclasses.replace(inputs, lengths=(*inputs.lengths, training)), "diagnostics")
  reference = functools.cache(lambda: observe(inputs, rows[:, :training]))

  def cell(length: int) -> Cell:
    def run(progress: Progress) -> list[Measurement]:
      layers = reference() if length == training else observe(inputs, rows[:, :length])
      progress(len(rows) * length)
      return layer_measurements(length, layers, reference())

    model = inputs.config.model
    expected = []
    for layer in range(model.num_layers):
      is_global = model.block_pattern[layer % len(model.block_pattern)] == "global"
      names = (*RESIDUAL, *(POLAR if is_global and model.attention == "polar" else ()),
               *(MEMORY if is_global and model.memory.enabled else ()))
      expected += [(name, length, layer, None) for name in names]
    settings = {"documents": len(rows), "training_length": training, "text": fingerprint(rows)}
    return Cell(f"diagnostics at {length}", tuple(expected), settings, len(rows) * length, run)

  return [cell(length) for length in inputs.lengths]


def observe(inputs: Inputs, rows: np.ndarray) -> Layers:
  """What every layer does over the second half of rows (N, L): statistics of `make_tap`, a row at a time."""
  return tapped(inputs, rows, make_tap(rows.shape[1] // 2))


@functools.cache  # equal taps share a compiled program
def make_tap(start: int) -> Tap:
  """A tap for tokens from `start` on.

  Results: ``mean`` and ``variance`` of the output (B, C); of a global mixer (B, H) each, as far as it has them: `POLAR`,
  ``memory_norm`` and ``readout_square``.
  """

  def tap(block: Block, trace: Trace, layer: jax.Array) -> dict[str, jax.Array]:
    del layer
    output = _wide(trace["output"][:, start:])
    mean = output.mean(1)
    result = {"mean": mean, "variance": jnp.square(output - mean[:, None]).mean(1)}
    if "magnitude" in trace:
      statistics = polar_statistics(trace["q"][:, start:], trace["k"], trace["v"], **block.mixer.core.parameters())
      magnitude = trace["magnitude"][:, start:]
      result |= {name: value.mean(1) for name, value in statistics.items()}
      result |= {"magnitude": magnitude.mean(1), "magnitude_saturation": _wide(magnitude > SATURATED).mean(1)}
    if "memory" in trace:
      result |= {"memory_norm": jnp.sqrt(jnp.square(_wide(trace["memory"])).sum((2, 3))),
                 "readout_square": jnp.square(_wide(trace["readout"][:, start:])).mean((1, 3))}
    return result

  return tap


def layer_measurements(length: int, layers: Layers, reference: Layers) -> list[Measurement]:
  """The measurements of every layer, against those of the training length."""
  measurements = []
  for index, (layer, base) in enumerate(zip(layers, reference, strict=True)):
    count = len(layer["mean"])
    (mean, std, rms), (base_mean, base_std, base_rms) = _moments(layer), _moments(base)
    shift = float(np.sqrt(np.mean(np.square(mean - base_mean)))) / base_std
    for name, value in zip(RESIDUAL, (shift, std / base_std, rms / base_rms)):
      measurements.append(Measurement(name, length, value, count, layer=index))
    for name in (*POLAR, *MEMORY):
      values = np.sqrt(layer["readout_square"]) if name == "readout_rms" and "readout_square" in layer else layer.get(name)
      if values is not None:
        value, error = mean_and_error(values.mean(1, dtype=np.float64))
        heads = [{"head": head, "value": float(v)} for head, v in enumerate(values.mean(0, dtype=np.float64))]
        measurements.append(Measurement(name, length, value, count, error, bins=heads, layer=index))
  return measurements


def _moments(layer: dict[str, np.ndarray]) -> tuple[np.ndarray, float, float]:
  """Mean (C,), standard deviation and root mean square of the tokens of all rows, which have equally many."""
  means, variances = (np.asarray(layer[name], np.float64) for name in ("mean", "variance"))
  mean = means.mean(0)
  variance = variances.mean(0) + np.square(means - mean).mean(0)
  return mean, float(np.sqrt(variance.mean())), float(np.sqrt((variance + np.square(mean)).mean()))


def diagnostics_table(records: Sequence[dict[str, Any]]) -> str:
  """A block a measure: one line a layer, one column a length."""
  lines = []
  for name in (*RESIDUAL, *POLAR, *MEMORY):
    found = {(r["layer"], r["length"]): r["value"] for r in records if r["measure"] == name}
    if found:
      lengths = sorted({length for _, length in found})
      lines.append("  ".join([f"{name:>22}", *(f"{length:>10}" for length in lengths)]))
      for layer in sorted({layer for layer, _ in found}):
        values = [found.get((layer, length)) for length in lengths]
        lines.append("  ".join([f"{f'layer {layer}':>22}", *(f"{'' if v is None else format(v, '.4g'):>10}" for v in values)]))
  return "\n".join(lines)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))

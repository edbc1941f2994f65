"""Suite ``diagnostics``: what happens inside the model, layer by layer, as the context grows past the training length.

All numbers are means over the second half of the context, tokens L/2 to L of held-out documents, so every length looks at
other tokens. They are compared with the second half of the training length, the reference. There is one record per layer;
`bins` hold the heads.

* ``residual_mean_shift``: distance between the mean output of a block and that of the reference, divided by the square root of
  the width and by the reference's standard deviation. ``residual_std_ratio`` and ``residual_rms_ratio``: standard deviation and
  root mean square of the output, divided by those of the reference. The standard deviation is taken over tokens: the root of
  the channels' mean variance.
* Polar attention: ``n_eff``, ``w_null``, ``magnitude`` and ``magnitude_saturation``, the share of magnitudes above 0.99.
* Memory: ``memory_norm``, the Frobenius norm of a head's state after the last token, and ``readout_rms``, before its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import html

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import figures, markup
from atma_jax.evaluation.report.runs import Run
from atma_jax.evaluation.statistics import mean_and_error
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint
from atma_jax.evaluation.tapping import document_rows, tap_layers
from atma_jax.models.block import Block, Tap, Trace
from atma_jax.models.mixers.attention import AttentionMixer
from atma_jax.ops.polar_attention.api import attention_statistics

SATURATED = 0.99
RESIDUAL = ("residual_mean_shift", "residual_std_ratio", "residual_rms_ratio")
POLAR = ("n_eff", "w_null", "magnitude", "magnitude_saturation")
MEMORY = ("memory_norm", "readout_rms")

LayerStatistics = dict[str, np.ndarray]  # the results of `make_tap` for one layer


def diagnostics_cells(inputs: Inputs, options: CheckedOptions) -> list[Cell]:
  """One cell per length."""
  del options
  rows, training = document_rows(inputs, "diagnostics"), inputs.config.data.sequence_length
  if training > rows.shape[1]:
    rows = document_rows(dataclasses.replace(inputs, lengths=(*inputs.lengths, training)), "diagnostics")
  reference = functools.cache(lambda: observe(inputs, rows[:, :training]))
  results = jax.eval_shape(lambda tokens: inputs.model.tapped(tokens, make_tap(0))[1], jax.ShapeDtypeStruct((1, 1), jnp.int32))
  measures = [(*RESIDUAL, *(name for name in POLAR if name in layer), *(MEMORY if "memory_norm" in layer else ()))
              for layer in results]

  def cell(length: int) -> Cell:
    def run(progress: Progress) -> list[Measurement]:
      layers = reference() if length == training else observe(inputs, rows[:, :length])
      progress(len(rows) * length)
      return layer_measurements(length, layers, reference())

    expected = [(name, length, layer, None) for layer, names in enumerate(measures) for name in names]
    settings = {"documents": len(rows), "training_length": training, "text": fingerprint(rows)}
    return Cell(f"diagnostics at {length}", tuple(expected), settings, len(rows) * length, run)

  return [cell(length) for length in inputs.lengths]


def observe(inputs: Inputs, rows: Int[np.ndarray, "N T"]) -> list[LayerStatistics]:
  """The statistics of every layer over the second half of each row."""
  return tap_layers(inputs, rows, make_tap(rows.shape[1] // 2))


@functools.cache  # taps that are equal share a compiled program
def make_tap(start: int) -> Tap:
  """A tap that takes statistics of each row over the tokens from `start` on.

  Its results are ``mean`` and ``variance`` of the block's output, (B, C), and, for a global mixer, as far as it has them,
  those of `POLAR`, ``memory_norm`` and ``readout_square``, (B, H) each.
  """

  def tap(block: Block, trace: Trace, layer: jax.Array) -> dict[str, jax.Array]:
    del layer
    output = _as_float32(trace["output"][:, start:])
    mean = output.mean(1)
    result = {"mean": mean, "variance": jnp.square(output - mean[:, None]).mean(1)}
    if "magnitude" in trace:
      assert isinstance(block.mixer, AttentionMixer)  # only polar attention has magnitudes
      core = block.mixer.core
      statistics = attention_statistics(trace["q"][:, start:], trace["k"], trace["v"], core.params, core.spec)
      magnitude = trace["magnitude"][:, start:]
      result |= {name: value.mean(1) for name, value in statistics.items()}
      result |= {"magnitude": magnitude.mean(1), "magnitude_saturation": _as_float32(magnitude > SATURATED).mean(1)}
    if "memory" in trace:
      result |= {"memory_norm": jnp.sqrt(jnp.square(_as_float32(trace["memory"])).sum((2, 3))),
                 "readout_square": jnp.square(_as_float32(trace["readout"][:, start:])).mean((1, 3))}
    return result

  return tap


def layer_measurements(length: int, layers: list[LayerStatistics], reference: list[LayerStatistics]) -> list[Measurement]:
  """The measurements of every layer at one length, compared with the reference."""
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


def _moments(layer: LayerStatistics) -> tuple[Float[np.ndarray, " C"], float, float]:
  """Mean, standard deviation and root mean square over the tokens of all rows, of which each has equally many."""
  means, variances = (np.asarray(layer[name], np.float64) for name in ("mean", "variance"))
  mean = means.mean(0)
  variance = variances.mean(0) + np.square(means - mean).mean(0)
  return mean, float(np.sqrt(variance.mean())), float(np.sqrt((variance + np.square(mean)).mean()))


def _as_float32(x: jax.Array) -> jax.Array:
  """`x` in float32, or in its own type if that is wider."""
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


# --- Table and report -------------------------------------------------------------------------------------------------


def diagnostics_table(records: Sequence[Record]) -> str:
  """For each measure, one line per layer and one column per length."""
  lines = []
  for name in (*RESIDUAL, *POLAR, *MEMORY):
    values = {(r["layer"], r["length"]): r["value"] for r in records if r["measure"] == name}
    if values:
      lengths = sorted({length for _, length in values})
      lines.append("  ".join([f"{name:>22}", *(f"{length:>10}" for length in lengths)]))
      for layer in sorted({layer for layer, _ in values}):
        row = [values.get((layer, length)) for length in lengths]
        lines.append("  ".join([f"{f'layer {layer}':>22}", *(f"{'' if v is None else format(v, '.4g'):>10}" for v in row)]))
  return "\n".join(lines)


def diagnostics_section(runs: Sequence[Run]) -> str:
  """A figure per measure, in the order in which the measures appear in the records."""
  parts = []
  for measure in dict.fromkeys(r["measure"] for run in runs for r in run.records if r["suite"] == "diagnostics"):
    panels: dict[str, dict[int, list[Record]]] = {}
    for run in runs:
      for record in run.select(measure):
        panels.setdefault(run.label, {}).setdefault(record["layer"], []).append(record)
    name = measure.replace("_", " ")
    parts.append(f"<h3>{html.escape(name)}</h3>" + markup.image(figures.layer_panels(panels, name), name))
  return "".join(parts)


SUITE = Suite(
  help="residual stream, polar attention and memory of every layer as the context grows",
  cells=diagnostics_cells,
  table=diagnostics_table,
  sections={"Diagnostics": diagnostics_section},
  order=70,
  schema={"layer": int},
)

"""Suite ``loss``: loss in nats per token against context length, on whole documents and on the validation stream.

* ``document_loss``: mean loss over the first L tokens of held-out documents. Only documents that are as long as the longest
  length are read, so all lengths see the same documents. The model is causal, so one pass over the longest length gives the
  loss of every prefix.
* ``position_loss``: loss by position in the same pass, in logarithmic bins.
* ``stream_loss``: the concatenated validation documents, cut into windows of L tokens. Every length scores the same tokens,
  up to a remainder if it does not divide the longest length, and sees nothing before its own window. Its ``bins`` hold the loss
  by position in the window, L(t), between powers of two, with standard errors over windows. Every bin holds other text, so two
  bins of one model also differ by how hard their text is; two models, or one model under a control such as ``--memory_off``,
  can be compared bin by bin. The suite ``gain`` reads the same tokens under every context instead.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from atma_jax.config import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, option
from atma_jax.errors import UserError
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import figures, markup, plots
from atma_jax.evaluation.report.drawing import BLUE, ORANGE, draw_position_curve, short_tokens
from atma_jax.evaluation.report.runs import Run, series_by_heading
from atma_jax.evaluation.statistics import log_spaced_edges, mean_and_error
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

_HEADINGS = {"document_loss": "documents, nested prefixes", "stream_loss": "validation stream"}


@dataclasses.dataclass(frozen=True)
class LossOptions(CheckedOptions):
  """Options of the suite."""

  stream_windows: int = option(8, "Windows of the longest length to read from the validation stream.", POSITIVE)


def loss_cells(inputs: Inputs, options: LossOptions) -> list[Cell]:
  """One cell for all prefixes of the documents, and one per length for the stream."""
  return [_document_cell(inputs), *(_stream_cell(inputs, options, length) for length in inputs.lengths)]


def prefix_measurements(losses: Float[np.ndarray, "N T"], lengths: tuple[int, ...]) -> list[Measurement]:
  """The document loss at each length, and the loss by position.

  Args:
    losses: of each token of each document, in nats.
    lengths: each at most T.
  """
  losses = np.asarray(losses, np.float64)
  count, longest = losses.shape
  measurements = []
  for length in lengths:
    value, error = mean_and_error(losses[:, :length].mean(axis=1))
    measurements.append(Measurement("document_loss", length, value, count, error))
  value, error = mean_and_error(losses.mean(axis=1))
  edges = log_spaced_edges(longest)
  bins = _bins(np.add.reduceat(losses, edges[:-1], axis=1), edges)
  return [*measurements, Measurement("position_loss", longest, value, count, error, bins=bins)]


def _bins(sums: Float[np.ndarray, "N bins"], edges: Int[np.ndarray, " edges"]) -> list[dict[str, Any]]:
  """Mean losses between consecutive edges, with standard errors over rows, from the sum of each row's losses there."""
  bins = []
  for (start, stop), column in zip(itertools.pairwise(edges), sums.T, strict=True):
    value, error = mean_and_error(column / (stop - start))
    bins.append({"start": int(start), "stop": int(stop), "value": value, "standard_error": error})
  return bins


def _document_cell(inputs: Inputs) -> Cell:
  longest = inputs.lengths[-1]
  documents = [d[:longest] for d in inputs.documents if len(d) >= longest]
  if len(documents) < inputs.min_documents:
    lengths = sorted(map(len, inputs.documents), reverse=True)
    fits = lengths[inputs.min_documents - 1] if len(lengths) >= inputs.min_documents else 0
    raise UserError(f"--min_documents={inputs.min_documents}: only {len(documents)} of {len(lengths)} held-out documents "
                    f"have the longest length of {longest} tokens; {inputs.min_documents} have {fits}: shorten --multiples, "
                    "or lower --min_documents (at least 1)")
  rows = np.concatenate([np.full((len(documents), 1), inputs.tokenizer.eot_id), np.stack(documents)], axis=1)

  def run(progress: Progress) -> list[Measurement]:
    batches = []
    for losses in inputs.scorer.losses(rows):
      batches.append(losses)
      progress(losses.size)
    return prefix_measurements(np.concatenate(batches), inputs.lengths)

  expected = (*(("document_loss", length) for length in inputs.lengths), ("position_loss", longest))
  settings = {"longest": longest, "documents": len(documents), "text": fingerprint(rows)}
  return Cell(f"document loss to {longest}", expected, settings, rows.shape[0] * longest, run)


def _stream_cell(inputs: Inputs, options: LossOptions, length: int) -> Cell:
  longest = inputs.lengths[-1]
  windows = min(options.stream_windows, (len(inputs.stream) - 1) // longest)
  if windows < 1:
    raise UserError(f"the validation stream has {len(inputs.stream)} tokens, fewer than the longest length of {longest} and "
                    "one: shorten --multiples, or prepare more config.data.validation_documents")
  count = windows * longest // length
  text = np.asarray(inputs.stream[:count * length + 1], np.int32)
  rows = np.lib.stride_tricks.sliding_window_view(text, length + 1)[::length]

  def run(progress: Progress) -> list[Measurement]:
    edges, parts = log_spaced_edges(length, per_octave=1), []
    for losses in inputs.scorer.losses(rows):
      parts.append(np.add.reduceat(losses, edges[:-1], axis=1, dtype=np.float64))
      progress(losses.size)
    sums = np.concatenate(parts)
    value, error = mean_and_error(sums.sum(axis=1) / length)
    return [Measurement("stream_loss", length, value, count, error, bins=_bins(sums, edges))]

  settings = {"windows": count, "text": fingerprint(text)}
  return Cell(f"stream loss at {length}", (("stream_loss", length),), settings, count * length, run)


# --- Plots and report -------------------------------------------------------------------------------------------------


def loss_plots(records: Sequence[Record], title: str, training_length: int) -> dict[str, bytes]:
  """Both losses against length with their standard errors, and the loss by position."""
  document, stream, position = ([r for r in records if r["measure"] == measure]
                                for measure in ("document_loss", "stream_loss", "position_loss"))
  if not document:
    return {}
  figure, axes = plots.new_plot(title, "Loss against context length")
  plots.draw_series(axes, document, f"documents, nested prefixes ({document[0]['n']} documents)", BLUE, "o")
  if stream:
    plots.draw_series(axes, stream, "validation stream", ORANGE, "s")
  lengths = [r["length"] for r in [*document, *stream]]
  plots.set_length_axis(axes, min(lengths), max(lengths), training_length, "context length (tokens, multiples of training)")
  axes.set_ylabel("loss (nats per token, ± standard error)")
  by_length = plots.png(figure, axes)

  curve = position[-1]
  figure, axes = plots.new_plot(title, f"Loss by position ({curve['n']} documents of {short_tokens(curve['length'])} tokens)")
  draw_position_curve(axes, curve, color=BLUE, alpha=0.18, linewidth=1.8, label="mean over documents ± standard error")
  if windows := max((r for r in stream if r.get("bins")), key=lambda r: r["length"], default=None):
    draw_position_curve(axes, windows, color=ORANGE, alpha=0.18, linewidth=1.8,
                        label=f"mean over {windows['n']} windows of the stream ± standard error")
  plots.set_length_axis(axes, 1, curve["length"], training_length, "position (tokens, multiples of training)")
  axes.set_ylabel("loss at this position (nats per token)")
  return {"loss_vs_length.png": by_length, "loss_by_position.png": plots.png(figure, axes)}


def length_section(runs: Sequence[Run]) -> str:
  """The losses against length: a figure and a table."""
  panels = series_by_heading(runs, _HEADINGS)
  if not panels:
    return ""
  return markup.image(figures.loss_panels(panels), "loss against length") + markup.value_table(runs, _HEADINGS, 3)


def position_section(runs: Sequence[Run]) -> str:
  """The loss by position of each run at the longest length it was measured at, in documents and in windows of the stream."""
  body = ""
  for measure, heading in (("position_loss", "documents"), ("stream_loss", "validation stream")):
    curves = {}
    for run in runs:
      longest = max(run.select(measure), key=lambda r: r["length"] if r.get("bins") else -1, default=None)
      if longest is not None and longest.get("bins"):
        curves[run.label] = longest
    if curves:
      body += f"<h3>{heading}</h3>" + markup.image(figures.position_curves(curves), f"loss by position, {heading}")
  return body


SUITE = Suite(
  help="loss of whole documents and of the validation stream against context length, and by position",
  cells=loss_cells,
  options=LossOptions,
  columns=("document_loss", "stream_loss"),
  plots=loss_plots,
  sections={"Loss against context length": length_section, "Loss by position, L(t)": position_section},
  order=10,
  schema={"bins?": ([{"start": NOT_NEGATIVE, "stop": AT_LEAST_1, "value": float | None, "standard_error": float | None}], None)},
)

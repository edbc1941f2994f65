"""Suite ``loss``: loss against context length, on whole documents and on the validation stream. Nats per token.

* ``document_loss``: mean loss over the first L tokens of held-out documents. Only documents at least as long as the
  longest length are read, so that the prefixes are nested and every length sees the same documents. The model is
  causal: one pass at the longest length yields the loss of every prefix.
* ``position_loss``: L(t) of the same pass, in logarithmic bins.
* ``stream_loss``: the concatenated validation documents cut into windows of L tokens; every length scores the same
  tokens (up to a remainder where a length does not divide the longest), each given only its own window.
"""

from __future__ import annotations

import itertools

import numpy as np

from atma_jax.errors import UserError
from atma_jax.evaluation.cells import Cell, Inputs, Progress, fingerprint
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.statistics import log_spaced_edges, mean_and_error


def loss_cells(inputs: Inputs) -> list[Cell]:
  """One cell for all prefixes of the documents, and one a length for the stream."""
  return [_document_cell(inputs), *(_stream_cell(inputs, length) for length in inputs.lengths)]


def prefix_measurements(losses: np.ndarray, lengths: tuple[int, ...]) -> list[Measurement]:
  """Document loss at each length and the curve over positions; losses (documents, T), each length at most T."""
  losses = np.asarray(losses, np.float64)
  count, longest = losses.shape
  measurements = []
  for length in lengths:
    value, error = mean_and_error(losses[:, :length].mean(axis=1))
    measurements.append(Measurement("document_loss", length, value, count, error))
  edges = log_spaced_edges(longest)
  bins = []
  for start, stop in itertools.pairwise(edges):
    value, error = mean_and_error(losses[:, start:stop].mean(axis=1))
    bins.append({"start": int(start), "stop": int(stop), "value": value, "standard_error": error})
  value, error = mean_and_error(losses.mean(axis=1))
  return [*measurements, Measurement("position_loss", longest, value, count, error, bins=bins)]


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


def _stream_cell(inputs: Inputs, length: int) -> Cell:
  longest = inputs.lengths[-1]
  windows = min(inputs.stream_windows, (len(inputs.stream) - 1) // longest)
  if windows < 1:
    raise UserError(f"the validation stream has {len(inputs.stream)} tokens, fewer than the longest length of {longest} and "
                    "one: shorten --multiples, or prepare more config.data.validation_documents")
  count = windows * longest // length
  text = np.asarray(inputs.stream[:count * length + 1], np.int32)
  rows = np.lib.stride_tricks.sliding_window_view(text, length + 1)[::length]

  def run(progress: Progress) -> list[Measurement]:
    means = []
    for losses in inputs.scorer.losses(rows):
      means.append(losses.mean(axis=1, dtype=np.float64))
      progress(losses.size)
    value, error = mean_and_error(np.concatenate(means))
    return [Measurement("stream_loss", length, value, count, error)]

  settings = {"windows": count, "text": fingerprint(text)}
  return Cell(f"stream loss at {length}", (("stream_loss", length),), settings, count * length, run)

"""Suite ``gain``: what more context does to the loss of the same tokens, in paired differences.

A target is a fixed span of a held-out document, 256 tokens by default. At a context length of L the model reads end-of-text and
the L tokens up to the target's end, the target included, so that every context ends at the same tokens. Targets lie at least
the longest context into documents that are long enough; a document gives several where there are fewer documents than
``--gain_spans``, spread evenly over it. The training length T is always among the contexts. Measures:

* ``target_loss``: mean loss of the target tokens in nats. Its ``bins`` hold every span by itself, in the same order at every
  length: the document, where the span starts and stops in it, its loss, and the share of shingles explained below.
* ``change_from_1x``, ``change_from_half``: the mean over spans of loss(L) - loss(T), or - loss(L / 2) where that length is read
  too. Negative means that the context helped. Differences are taken span by span, so what makes one text harder than another
  cancels.
* ``worse_than_1x``, ``worse_than_half``: the share of spans whose loss rose.

Standard errors are over spans, clustered by document, because spans of one document depend on each other; with one document
there is none. Held-out text that training saw elsewhere would be read from memory: spans are passed over if more than
``--gain_overlap`` of the 16-word shingles of their longest context occur in the training split of the prepared data.

What it can show: whether tokens further away than L / 2 help or harm the prediction of ordinary text. What it cannot: why, nor
whether a fact far away can be looked up (the suites ``needle`` and ``retrieval`` do that). Text in which nothing refers that far
back gives no gain to any model, so a difference near zero is not a failure; one above zero is. Targets are alike in being far
into long documents, so ``target_loss`` is not the loss of the whole corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any

from absl import logging
from jaxtyping import Float, Int
import numpy as np

from atma_jax.config import FRACTION, NOT_NEGATIVE, POSITIVE, option
from atma_jax.data.manifest import load_manifest
from atma_jax.data.shingles import DocumentShingles, training_texts
from atma_jax.errors import UserError
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record
from atma_jax.evaluation.report import figures, markup, plots
from atma_jax.evaluation.report.drawing import BLUE, ORANGE
from atma_jax.evaluation.report.runs import Run, series_by_heading
from atma_jax.evaluation.statistics import clustered_mean_and_error
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

_DEFAULT_SPAN = 256
_SPARE = 4  # candidates for every span wanted, so that others can take the place of those that training has seen
_CHANGES = {"change_from_1x": "change from the training length", "change_from_half": "change from half the context"}
_SHARES = {"worse_than_1x": "spans worse than at the training length", "worse_than_half": "spans worse than at half the context"}


@dataclasses.dataclass(frozen=True)
class GainOptions(CheckedOptions):
  """Options of the suite."""

  gain_spans: int = option(128, "Spans of target tokens that are read under every context.", POSITIVE)
  gain_span: int = option(0, "Tokens of a span; 0 is 256, or half the training length if that is less.", NOT_NEGATIVE)
  gain_overlap: float = option(0.01, "Largest share of the 16-word shingles of a span's longest context that may occur in the "
                               "training split; 1 does not look.", FRACTION)


@dataclasses.dataclass(frozen=True)
class Span:
  """A target: the tokens [stop - span, stop) of a document.

  Attributes:
    document: index among the documents.
    stop: of the target, and of every context.
    shared: share of the shingles of the longest context that occur in the training split; None if nobody looked.
  """

  document: int
  stop: int
  shared: float | None = None


def gain_cells(inputs: Inputs, options: GainOptions) -> list[Cell]:
  """One cell per context length, the training length included."""
  training_length = inputs.config.data.sequence_length
  lengths = tuple(sorted({training_length, *inputs.lengths}))
  span = options.gain_span or min(_DEFAULT_SPAN, training_length // 2)
  if not 1 <= span < lengths[0]:
    raise UserError(f"--gain_span={options.gain_span}: must be from 1 to {lengths[0] - 1}, the shortest context less one")
  documents = [document for document in inputs.documents if len(document) >= lengths[-1]]
  if len(documents) < inputs.min_documents:
    raise UserError(f"--min_documents={inputs.min_documents}: only {len(documents)} of {len(inputs.documents)} held-out "
                    f"documents have the longest length of {lengths[-1]} tokens: shorten --multiples, or prepare data whose "
                    "held-out documents are longer (the sources python-packages and folders:GLOB hold whole folders out)")
  room = sum((len(document) - lengths[-1]) // span + 1 for document in documents)
  if room < options.gain_spans:
    raise UserError(f"--gain_spans={options.gain_spans}: only {room} spans of {span} tokens lie {lengths[-1]} tokens or more "
                    f"into the {len(documents)} held-out documents that are as long: lower it, or shorten --multiples")

  settings = {"longest": lengths[-1], "spans": options.gain_spans, "span": span, "documents": len(documents),
              "overlap": options.gain_overlap, "text": fingerprint(np.concatenate(documents))}
  targets = _Targets(inputs, options, documents, lengths[-1], span)
  return [_cell(targets, length, training_length, lengths, settings) for length in lengths]


def candidate_spans(sizes: Sequence[int], longest: int, span: int, count: int) -> list[Span]:
  """About `count` targets that do not overlap, as many from every document as it has room for, spread evenly over it.

  They are ordered so that any number of the first ones is spread over the documents, too.

  Args:
    sizes: tokens of every document, each at least `longest`.
    longest: tokens before a target's end.
    span: tokens of a target.
    count: how many are wanted.
  """
  each = -(-count // len(sizes))
  found = []
  for document, size in enumerate(sizes):
    places = min(each, (size - longest) // span + 1)
    stops = np.linspace(longest, size, places).astype(int) if places > 1 else np.array([size])
    order = sorted(range(places), key=lambda i: (_reversed_bits(i, places), i))
    found.append([Span(document, int(stops[i])) for i in order])
  rounds = itertools.zip_longest(*found)
  return [candidate for round in rounds for candidate in round if candidate is not None]


def paired(losses: Float[np.ndarray, " n"], base: Float[np.ndarray, " n"],
           documents: Int[np.ndarray, " n"]) -> tuple[tuple[float, float | None], tuple[float, float | None]]:
  """The mean of losses - base, and the share of spans for which it is above zero, each with its clustered standard error."""
  change = np.asarray(losses, np.float64) - np.asarray(base, np.float64)
  return clustered_mean_and_error(change, documents), clustered_mean_and_error(change > 0, documents)


def _reversed_bits(index: int, count: int) -> int:
  """Sorts 0 to count - 1 so that the first few are spread over all of them."""
  width = max(1, (count - 1).bit_length())
  return int(f"{index:0{width}b}"[::-1], 2)


class _Targets:
  """The targets, which are chosen when they are first needed, and their losses under each context, which are kept.

  Args:
    inputs: of the suite.
    options: of the suite.
    documents: all at least `longest` tokens long.
    longest: the longest context.
    span: tokens of a target.
  """

  def __init__(self, inputs: Inputs, options: GainOptions, documents: Sequence[Int[np.ndarray, " n"]], longest: int, span: int):
    self.options, self.span = options, span
    self._inputs, self._documents, self._longest = inputs, documents, longest
    self._losses: dict[int, Float[np.ndarray, " spans"]] = {}

  @functools.cached_property
  def spans(self) -> list[Span]:
    """The first candidates whose longest context the training split hardly shares, ordered by document and place."""
    options, limit = self.options, self.options.gain_overlap
    sizes = [len(document) for document in self._documents]
    candidates = candidate_spans(sizes, self._longest, self.span, _SPARE * options.gain_spans)
    if limit < 1:
      candidates = [c for c in self._checked(candidates) if c.shared is not None and c.shared <= limit]
    if len(candidates) < options.gain_spans:
      logging.warning("gain: %d spans instead of %d; the training split shares more than %g of the others' contexts",
                      len(candidates), options.gain_spans, limit)
    return sorted(candidates[:options.gain_spans], key=lambda c: (c.document, c.stop))

  def _checked(self, candidates: Sequence[Span]) -> list[Span]:
    """The candidates with the share that the training split has of their contexts; `UserError` if it has too much of all."""
    inputs, limit = self._inputs, self.options.gain_overlap
    if inputs.directory is None:
      raise UserError("--gain_overlap: needs the training split of the prepared data; --gain_overlap=1 does not look")
    logging.info("gain: looking for the held-out documents in the training split")
    shingles = DocumentShingles(self._documents, inputs.tokenizer)
    shingles.look_in(training_texts(inputs.directory, inputs.tokenizer))
    shares = [shingles.share(c.document, c.stop - self._longest, c.stop) for c in candidates]
    if min(shares) > limit:
      raise UserError(f"--gain_overlap={limit:g}: of every one of {len(shares)} contexts the training split holds more 16-word "
                      f"shingles, at least {min(shares):.4f}: prepare other held-out documents, or allow more")
    return [dataclasses.replace(candidate, shared=share) for candidate, share in zip(candidates, shares)]

  def losses(self, length: int, progress: Progress) -> Float[np.ndarray, " spans"]:
    """The mean loss of each target at the end of `length` tokens."""
    if length not in self._losses:
      eot, found = self._inputs.tokenizer.eot_id, []
      rows = np.stack([np.concatenate([[eot], self._documents[s.document][s.stop - length:s.stop]]) for s in self.spans])
      positions = np.broadcast_to(np.arange(length + 1 - self.span, length + 1), (len(rows), self.span))
      for losses, _ in self._inputs.scorer.at_positions(rows.astype(np.int32), positions):
        found.append(losses.mean(axis=1, dtype=np.float64))
        progress(len(losses) * length)
      self._losses[length] = np.concatenate(found)
    return self._losses[length]

  def bins(self, losses: Float[np.ndarray, " spans"]) -> list[dict[str, Any]]:
    """Every span with its loss, as results keep it."""
    names = [str(index) for index in range(len(self._documents))]
    if self._inputs.directory is not None:  # the longest documents come first in both
      names = [document["name"] for document in load_manifest(self._inputs.directory).heldout["documents"]]
    return [{"document": names[s.document], "start": s.stop - self.span, "stop": s.stop, "value": float(loss), "shared": s.shared}
            for s, loss in zip(self.spans, losses, strict=True)]


def _cell(targets: _Targets, length: int, training_length: int, lengths: Sequence[int], settings: dict[str, Any]) -> Cell:
  bases = {"1x": training_length} if length != training_length else {}
  if length % 2 == 0 and length // 2 in lengths:
    bases["half"] = length // 2

  def run(progress: Progress) -> list[Measurement]:
    base_losses = {name: targets.losses(base, _ignore) for name, base in bases.items()}  # read again only in another process
    losses = targets.losses(length, progress)
    documents = np.array([s.document for s in targets.spans])
    value, error = clustered_mean_and_error(losses, documents)
    measured = [Measurement("target_loss", length, value, len(losses), error, bins=targets.bins(losses))]
    for name, base in base_losses.items():
      for measure, (value, error) in zip(("change_from", "worse_than"), paired(losses, base, documents)):
        measured.append(Measurement(f"{measure}_{name}", length, value, len(losses), error))
    return measured

  expected = (("target_loss", length), *((f"{measure}_{name}", length) for name in bases
                                         for measure in ("change_from", "worse_than")))
  return Cell(f"gain at {length}", expected, settings, targets.options.gain_spans * length, run)


def _ignore(tokens: int) -> None:
  del tokens


# --- Plots and report -------------------------------------------------------------------------------------------------


def gain_plots(records: Sequence[Record], title: str, training_length: int) -> dict[str, bytes]:
  """The paired changes against context length, with standard errors clustered by document."""
  changes = {measure: [r for r in records if r["measure"] == measure] for measure in _CHANGES}
  if not any(changes.values()):
    return {}
  figure, axes = plots.new_plot(title, "Loss of the same tokens under longer contexts")
  for (measure, heading), color, marker in zip(_CHANGES.items(), (BLUE, ORANGE), "os"):
    if changes[measure]:
      plots.draw_series(axes, changes[measure], heading, color, marker)
  axes.axhline(0, color="#6b7280", linewidth=1)
  lengths = [r["length"] for found in changes.values() for r in found]
  plots.set_length_axis(axes, min(lengths), max(lengths), training_length, "context length (tokens, multiples of training)")
  axes.set_ylabel("paired change of the loss (nats per token, ± standard error)")
  return {"gain.png": plots.png(figure, axes)}


def gain_section(runs: Sequence[Run]) -> str:
  """The losses of the targets and their paired changes: figures and a table."""
  losses = series_by_heading(runs, {"target_loss": "loss of the targets"})
  if not losses:
    return ""
  headings = {"target_loss": "loss of the targets", **_CHANGES, **_SHARES}
  note = ("<p>The same tokens at the end of every context. A change below zero means that the longer context helped; errors are "
          "clustered by document.</p>")
  changes = series_by_heading(runs, _CHANGES)
  pictures = markup.image(figures.loss_panels(losses), "loss of fixed targets against context length")
  if changes:
    pictures += markup.image(figures.loss_panels(changes, "change (nats per token)", zero=True), "paired change of the loss")
  return note + pictures + markup.value_table(runs, headings, 4)


SUITE = Suite(
  help="paired change of the loss of fixed target spans under growing contexts",
  cells=gain_cells,
  options=GainOptions,
  columns=("target_loss", "change_from_1x", "change_from_half", "worse_than_half"),
  plots=gain_plots,
  sections={"Gain from context: the same tokens under every length": gain_section},
  order=15,
)

"""Suite ``bpb``: bits per byte of one fixed span of text, given more and more of the text before it.

The span ends where the longest length ends in a held-out document. At a context length of L the model reads end-of-text and
the L tokens up to there, the span included. Bits per byte do not depend on the tokenizer: the bytes are those of the text
that the span's tokens decode to, and both ends of the span are moved to the left, by a few tokens at most, until they cut no
character. Only documents that are at least as long as the longest length are read.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math

from jaxtyping import Int
import numpy as np

from atma_jax.config import NOT_NEGATIVE, option
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.report import figures, markup
from atma_jax.evaluation.report.runs import Run, series
from atma_jax.evaluation.statistics import mean_and_error
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint

_DEFAULT_SPAN = 512
_SLACK = 8  # most tokens that an end of the span is moved by
_CONTEXT = 16  # tokens before a position that decide how the text before it is decoded
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class BitsPerByteOptions(CheckedOptions):
  """Options of the suite."""

  bpb_span: int = option(0, "Tokens whose bits per byte are measured; 0 is 512, or half the shortest length if that is less.",
                         NOT_NEGATIVE)


def bits_per_byte_cells(inputs: Inputs, options: BitsPerByteOptions) -> list[Cell]:
  """One cell per context length."""
  longest, shortest = inputs.lengths[-1], inputs.lengths[0]
  span = options.bpb_span or min(_DEFAULT_SPAN, shortest // 2)
  if not 1 <= span <= shortest - _SLACK:
    raise UserError(f"--bpb_span={options.bpb_span}: must be from 1 to {shortest - _SLACK}, the shortest length less {_SLACK}")
  documents = [document[:longest + _SLACK] for document in inputs.documents if len(document) >= longest + _SLACK]
  if len(documents) < inputs.min_documents:
    raise UserError(f"--min_documents={inputs.min_documents}: only {len(documents)} of {len(inputs.documents)} held-out "
                    f"documents have the longest length and {_SLACK}, {longest + _SLACK} tokens: shorten --multiples, or lower "
                    "--min_documents (at least 1)")
  spans = [whole_span(inputs.tokenizer, document, span) for document in documents]
  return [_cell(inputs, documents, spans, span, length) for length in inputs.lengths]


def whole_span(tokenizer: Tokenizer, tokens: Int[np.ndarray, " n"], span: int) -> tuple[int, int]:
  """Start and stop of about the last `span` tokens, neither inside a character; the result has `span` to `span` + 8 tokens."""
  stop = _character_boundary(tokenizer, tokens, len(tokens))
  return _character_boundary(tokenizer, tokens, stop - span), stop


def span_bytes(tokenizer: Tokenizer, tokens: Int[np.ndarray, " n"], start: int, stop: int) -> int:
  """Number of UTF-8 bytes of ``tokens[start:stop]``, decoded in its context."""
  first = max(0, start - _CONTEXT)
  return len(tokenizer.decode(tokens[first:stop]).encode()) - len(tokenizer.decode(tokens[first:start]).encode())


def _character_boundary(tokenizer: Tokenizer, tokens: Int[np.ndarray, " n"], position: int) -> int:
  """The last position up to `position` that is not inside a character.

  If there is none within 8 tokens, the text itself is broken there, and `position` is returned.
  """
  near = range(position, max(0, position - _SLACK) - 1, -1)
  return next((p for p in near if not tokenizer.decode(tokens[max(0, p - _CONTEXT):p]).endswith(_BROKEN)), position)


def _cell(inputs: Inputs, documents: list[np.ndarray], spans: list[tuple[int, int]], span: int, length: int) -> Cell:
  count, scored = len(documents), span + _SLACK
  rows = np.stack([np.concatenate([[inputs.tokenizer.eot_id], document[stop - length:stop]])
                   for document, (_, stop) in zip(documents, spans)]).astype(np.int32)
  positions = np.broadcast_to(np.arange(length + 1 - scored, length + 1), (count, scored))
  inside = np.stack([np.arange(stop - scored, stop) >= start for start, stop in spans])
  sizes = np.array([span_bytes(inputs.tokenizer, document, *ends) for document, ends in zip(documents, spans)])

  def run(progress: Progress) -> list[Measurement]:
    batches = []
    for losses, _ in inputs.scorer.at_positions(rows, positions):
      batches.append(losses)
      progress(len(losses) * length)
    nats = np.sum(np.concatenate(batches), axis=1, where=inside, dtype=np.float64)
    value, error = mean_and_error(nats / math.log(2) / sizes)
    return [Measurement("bits_per_byte", length, value, count, error)]

  settings = {"longest": inputs.lengths[-1], "span": span, "documents": count, "bytes": int(sizes.sum()),
              "text": fingerprint(np.concatenate(documents))}
  return Cell(f"bits per byte at {length}", (("bits_per_byte", length),), settings, count * length, run)


def bits_section(runs: Sequence[Run]) -> str:
  """Bits per byte against context length: a figure and a table."""
  found = series(runs, "bits_per_byte")
  if not found:
    return ""
  figure = figures.loss_panels({"the same span under every context": found}, "bits per byte")
  return markup.image(figure, "bits per byte") + markup.value_table(runs, {"bits_per_byte": "bits per byte"}, 4)


SUITE = Suite(
  help="bits per byte of a fixed span of text under growing contexts",
  cells=bits_per_byte_cells,
  options=BitsPerByteOptions,
  columns=("bits_per_byte",),
  sections={"Bits per byte of a fixed span": bits_section},
  order=20,
)

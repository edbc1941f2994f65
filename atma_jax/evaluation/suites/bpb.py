"""Suite ``bpb``: bits per byte of one and the same span of text, given ever more of what precedes it.

The span ends where the longest length ends in a held-out document. Under a context length of L the model sees end-of-text and
the L tokens up to there, the span included. Bits per byte do not depend on the tokenizer: bytes are those of the text
that the span's tokens decode to, and both ends of it are moved left, by a few tokens at most, to where no character is cut.
Only documents at least as long as the longest length are read.
"""

from __future__ import annotations

import math

import numpy as np

from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.cells import Cell, Inputs, Progress, fingerprint
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.statistics import mean_and_error

_DEFAULT_SPAN = 512
_SLACK = 8  # tokens that an end may move
_CONTEXT = 16  # tokens before it that settle how a token is written
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def bits_per_byte_cells(inputs: Inputs) -> list[Cell]:
  """One cell a context length."""
  longest, shortest = inputs.lengths[-1], inputs.lengths[0]
  span = inputs.bpb_span or min(_DEFAULT_SPAN, shortest // 2)
  if not 1 <= span <= shortest - _SLACK:
    raise UserError(f"--bpb_span={inputs.bpb_span}: must be from 1 to {shortest - _SLACK}, the shortest length less {_SLACK}")
  documents = [document[:longest + _SLACK] for document in inputs.documents if len(document) >= longest + _SLACK]
  if len(documents) < inputs.min_documents:
    raise UserError(f"--min_documents={inputs.min_documents}: only {len(documents)} of {len(inputs.documents)} held-out "
                    f"documents have the longest length and {_SLACK}, {longest + _SLACK} tokens: shorten --multiples, or lower "
                    "--min_documents (at least 1)")
  spans = [whole_span(inputs.tokenizer, document, span) for document in documents]
  return [_cell(inputs, documents, spans, span, length) for length in inputs.lengths]


def whole_span(tokenizer: Tokenizer, tokens: np.ndarray, span: int) -> tuple[int, int]:
  """Start and stop of about the last `span` tokens, neither inside a character: stop - start is `span` to `span` + 8."""
  stop = _uncut(tokenizer, tokens, len(tokens))
  return _uncut(tokenizer, tokens, stop - span), stop


def span_bytes(tokenizer: Tokenizer, tokens: np.ndarray, start: int, stop: int) -> int:
  """UTF-8 bytes of the text of ``tokens[start:stop]`` where it stands."""
  first = max(0, start - _CONTEXT)
  return len(tokenizer.decode(tokens[first:stop]).encode()) - len(tokenizer.decode(tokens[first:start]).encode())


def _uncut(tokenizer: Tokenizer, tokens: np.ndarray, position: int) -> int:
  """The last position up to `position` before which the text is whole; `position` where none is near: then the text has it so."""
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
    losses = []
    for found, _ in inputs.scorer.at_positions(rows, positions):
      losses.append(found)
      progress(len(found) * length)
    nats = np.sum(np.concatenate(losses), axis=1, where=inside, dtype=np.float64)
    value, error = mean_and_error(nats / math.log(2) / sizes)
    return [Measurement("bits_per_byte", length, value, count, error)]

  settings = {"longest": inputs.lengths[-1], "span": span, "documents": count, "bytes": int(sizes.sum()),
              "text": fingerprint(np.concatenate(documents))}
  return Cell(f"bits per byte at {length}", (("bits_per_byte", length),), settings, count * length, run)

"""How much of a document's text occurs in the training split: shares of its shingles, runs of 16 consecutive words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import os
import pathlib

from jaxtyping import Int, UInt64
import numpy as np

from atma_jax.data.manifest import load_manifest, open_stream
from atma_jax.data.tokenizers import Tokenizer

WORDS = 16  # of a shingle, separated by white space
_CHUNK = 1 << 20  # tokens of the training split that are decoded at a time
_MARGIN = 512  # tokens read once more with the next chunk or block, so that no shingle is cut
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def shingle_hashes(text: str) -> UInt64[np.ndarray, " n"]:
  """A hash of every run of `WORDS` words of a text, in order; comparable within one process only."""
  words = text.split()
  hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
  count = max(0, len(words) - WORDS + 1)
  combined = np.zeros(count, np.uint64)
  for offset in range(WORDS):
    combined = combined * _FACTOR + hashes[offset:offset + count]
  return combined


class DocumentShingles:
  """The shingles of some documents, block by block, and which of them occur elsewhere.

  Args:
    documents: tokens of each.
    tokenizer: decodes them.
    block: tokens of a block; the shares of a stretch are those of the blocks that it touches.
  """

  def __init__(self, documents: Sequence[Int[np.ndarray, " n"]], tokenizer: Tokenizer, block: int = 1024):
    self._block = block
    self._hashes = [[shingle_hashes(tokenizer.decode(tokens[start:start + block + _MARGIN]))
                     for start in range(0, len(tokens), block)] for tokens in documents]
    blocks = [hashes for document in self._hashes for hashes in document]
    self._distinct = np.unique(np.concatenate(blocks)) if blocks else np.zeros(0, np.uint64)
    self._found = np.zeros(len(self._distinct), bool)

  def look_in(self, texts: Iterable[str]) -> None:
    """Notes which of the shingles occur in some texts."""
    if not len(self._distinct):
      return
    for text in texts:
      hashes = shingle_hashes(text)
      places = np.minimum(np.searchsorted(self._distinct, hashes), len(self._distinct) - 1)
      self._found[places[self._distinct[places] == hashes]] = True

  def share(self, document: int, start: int, stop: int) -> float:
    """The share of the shingles in a stretch of tokens of a document that occurred in the texts looked at; 0 if it has none."""
    blocks = self._hashes[document][start // self._block:-(-stop // self._block)]
    hashes = np.concatenate(blocks)
    return float(self._found[np.searchsorted(self._distinct, hashes)].mean()) if len(hashes) else 0.0


def training_texts(directory: str | os.PathLike[str], tokenizer: Tokenizer) -> Iterator[str]:
  """Yields the training split of a prepared directory, decoded, in pieces that overlap.

  Raises:
    UserError: a shard is missing.
  """
  directory = pathlib.Path(directory)
  for record in load_manifest(directory).train:
    stream = open_stream(directory, record)
    for start in range(0, len(stream), _CHUNK):
      yield tokenizer.decode(stream.read(start, min(len(stream), start + _CHUNK + _MARGIN)))

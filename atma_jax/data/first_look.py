"""A first look at sources of training data: whether they are there and what their first document is, without reading them all."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
import math

import numpy as np
import pyarrow

from atma_jax.data.documents import SourceFile, open_parquet
from atma_jax.data.remote import file_name, is_remote_path, open_remote
from atma_jax.data.shards import HEADER_BYTES, Shard, open_shard, read_header
from atma_jax.data.source import Source, TextSource, TokenSource
from atma_jax.data.tokenizers import Tokenizer, check_tokens
from atma_jax.errors import UserError
from atma_jax.memory_needs import shown_bytes

_FILES, _ROWS = 4, 64  # files, and rows of each, in which a document with text is looked for
_MOST_BYTES = 64 << 20  # of a file that can only be read whole, and of a row group of a Parquet file
_TOKENS = 4096  # of a shard that are looked at


def look_at(source: Source, tokenizer: Tokenizer | None) -> str:
  """Looks at the files of a source and at its first document or tokens.

  Args:
    source: an entry of ``config.data.sources``.
    tokenizer: of the tokens of a `TokenSource`, if it is known.

  Returns:
    What was found, in a few words.

  Raises:
    UserError: nothing is there, or what is there cannot be used.
    RunError: a server does not answer.
  """
  if isinstance(source, TokenSource):
    return _look_at_tokens(source, tokenizer)
  assert isinstance(source, TextSource)
  files = source.base.files()
  first = source.base.choose(files[:_FILES], None)[:_FILES]
  sizes = [file.size for file in (files if any(map(_is_remote, files)) else first)]
  total = f", {shown_bytes(sum(sizes))}" if len(sizes) == len(files) and all(sizes) else ""
  return f"{len(files):,} file{'s' * (len(files) > 1)}{total}; {_first_document(source.base, first)}"


def _is_remote(file: SourceFile) -> bool:
  return is_remote_path(file.path)


def _first_document(source: TextSource, files: Sequence[SourceFile]) -> str:
  for file in files:
    if _too_large(file):
      return f"{file.name} is there, and too large to look into"
    for document in itertools.islice(source.read(file), _ROWS):
      if document.text is None and not source.skips_unreadable:
        raise UserError(f"{source.label}: {document.name}: {document.problem}; legal: {source.legal}")
      if document.text and not document.text.isspace():
        return f"the first document has {len(document.text):,} characters"
  return f"no text in the first {_ROWS} rows of the first {len(files)} files"


def _too_large(file: SourceFile) -> bool:
  """Whether even the first document takes more than `_MOST_BYTES`; a column that is missing is reported on the way."""
  name = file_name(file.path)
  if name.endswith(".parquet"):
    try:
      with open_parquet(file) as table:
        if file.column not in table.schema_arrow.names:
          raise UserError(f"{file.name} has no column {file.column!r}; its columns: {', '.join(table.schema_arrow.names)}")
        group = table.metadata.row_group(file.row_group or 0) if table.metadata.num_row_groups else None
        index = table.schema_arrow.names.index(file.column)
        return group is not None and index < group.num_columns and group.column(index).total_compressed_size > _MOST_BYTES
    except (OSError, pyarrow.ArrowException):
      return False  # reading it says what is wrong
  by_rows = file.row_group is not None or name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
  return not by_rows and file.size > _MOST_BYTES


def _look_at_tokens(source: TokenSource, tokenizer: Tokenizer | None) -> str:
  remote = source.remote_shards()
  if remote:
    file = remote[0]
    with open_remote(file.path, file.remote_size) as stream:
      tokens, dtype = read_header(stream.read(HEADER_BYTES), file.remote_size, file.path)
      content = np.frombuffer(stream.read(min(tokens, _TOKENS) * dtype.itemsize), dtype)
    sizes = [file.remote_size or math.nan for file in remote]
    found = f"{len(remote):,} shard{'s' * (len(remote) > 1)} to fetch, {shown_bytes(sum(sizes))}; the first has {tokens:,} tokens"
  else:
    shards = [open_shard(path) for path in source.shards()]
    content = Shard(shards[0].path, min(shards[0].tokens, _TOKENS), shards[0].dtype).open()
    found = f"{len(shards):,} shard{'s' * (len(shards) > 1)}, {sum(shard.tokens for shard in shards):,} tokens"
  if tokenizer is not None:
    check_tokens(content, tokenizer.vocab_size, source.entry)
  return found

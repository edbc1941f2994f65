"""The ``chat:GLOB`` source: conversations in JSON lines or Parquet, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Collection, Iterator
import dataclasses
import pathlib

from atma_jax.data.conversations import ConversationSource, parse_conversation
from atma_jax.data.documents import Document, SourceFile, read_documents
from atma_jax.data.remote import file_name
from atma_jax.data.sources.text import GlobSource
from atma_jax.errors import UserError


class ChatSource(ConversationSource, GlobSource):
  """The rows of the files that the pattern matches, each a conversation in the field ``messages``."""

  prefix = "chat"
  syntax = "chat:GLOB"
  help = 'conversations, .jsonl or .parquet rows of {"messages": [...]}; also gs://, s3:// and https://'

  def files(self) -> list[SourceFile]:
    files = super().files()
    for file in files:
      suffixes = [suffix for suffix in pathlib.PurePath(file_name(file.path)).suffixes if suffix not in (".gz", ".zst")]
      if not suffixes or suffixes[-1] not in (".jsonl", ".parquet"):
        raise UserError(f"config.data.sources: {self.entry!r} matches {file.name}; legal: {self.legal}")
    return [dataclasses.replace(file, column="messages") for file in files]

  def read(self, file: SourceFile, rows: Collection[int] | None = None) -> Iterator[Document]:
    return read_documents(file, rows, check=parse_conversation)


SOURCE = ChatSource

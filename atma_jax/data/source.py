"""What a source of training data offers; each file of `atma_jax.data.sources` defines one.

A source is one entry of ``config.data.sources``. A `TextSource` yields documents, which are split, filtered and tokenised; a
`TokenSource` names shards that hold tokens already. A source whose documents need nothing special defines only `files`:

    class NotesSource(TextSource):
      prefix, syntax, help = "notes", "notes:FOLDER", "the notes in FOLDER"

      def files(self):
        return [SourceFile(path, path) for path in sorted(glob.glob(f"{self.argument}/*.note"))]

Saved as ``data/sources/notes.py`` with ``SOURCE = NotesSource`` at its end, it is ``--config.data.sources=notes:FOLDER``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
import dataclasses
import glob
import os
from typing import ClassVar

from jaxtyping import Int
import numpy as np

from atma_jax.config import DataConfig
from atma_jax.data.documents import LEGAL_FILES, Document, Entry, SourceFile, read_documents
from atma_jax.data.entries import EachAlone, EntryTable
from atma_jax.data.remote import find_files, is_remote_path
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.json_input import check_regular


@dataclasses.dataclass(frozen=True)
class Source:
  """One entry of ``config.data.sources``, written PREFIX or PREFIX:ARGUMENT. Instances are pickled for worker processes.

  Attributes:
    argument: what follows the colon; "" for a source that takes none.
    prefix: what the entry begins with. The source's file is named after it, with ``_`` for ``-``.
    syntax: how the entry is written, PREFIX or PREFIX:ARGUMENT, as error messages show it.
    help: what the source holds, in a few words, for the same messages.
    settings: fields of `DataConfig` that decide what is prepared from this source, beyond those that matter to every source.
      A prepared directory records their values and is refused where they differ.
    masked: whether some of its tokens are read but not predicted, as in conversations.
  """

  argument: str = ""
  prefix: ClassVar[str]
  syntax: ClassVar[str]
  help: ClassVar[str]
  settings: ClassVar[tuple[str, ...]] = ()
  masked: ClassVar[bool] = False

  def __post_init__(self) -> None:
    """Checks the argument; raises a `ValueError` that says what is wrong with the entry, as in "must be ..."."""

  @property
  def entry(self) -> str:
    """The source as ``config.data.sources`` spells it."""
    return f"{self.prefix}:{self.argument}" if ":" in self.syntax else self.prefix

  @property
  def base(self) -> Source:
    """The source whose files this one reads: itself, unless its documents are made of another source's."""
    return self

  @property
  def label(self) -> str:
    """The source as error messages name it."""
    return f"config.data.sources: {self.entry!r}"

  @property
  def is_pattern(self) -> bool:
    """Whether the argument is a pattern of files on one machine, as for `glob`."""
    return ":" in self.syntax and not is_remote_path(self.argument)

  def find(self) -> list[SourceFile]:
    """Returns the files that the argument, an address such as ``gs://BUCKET/*.jsonl``, matches, sorted by name.

    Raises:
      UserError: nothing matches, or the extra that reads such addresses is not installed.
      RunError: the server does not answer.
    """
    return [SourceFile(found.path, found.path, found.size) for found in find_files(self.argument, self.label)]

  def glob(self) -> list[str]:
    """Returns the absolute paths on this machine that match the argument (``**`` and ``~`` work), sorted.

    Raises:
      UserError: nothing matches.
    """
    paths = sorted(os.path.abspath(path) for path in glob.glob(os.path.expanduser(self.argument), recursive=True))
    if not paths:
      raise UserError(f"config.data.sources: {self.entry!r} matches no file or folder (looked in {os.getcwd()})")
    for path in paths:
      if not os.path.isdir(path):
        check_regular(path, lambda problem: UserError(f"config.data.sources: {self.entry!r}: {problem}"))
    return paths


class TextSource(Source):
  """A source of documents.

  Attributes:
    skips_unreadable: whether documents that cannot be read are left out and counted; otherwise the first one is an error.
    needs_training_length: whether `group` and `compose` use `characters`, the text that the training length holds, which has
      to be measured first; they are given 0 otherwise.
    legal: what its files may hold, for error messages.
  """

  skips_unreadable: ClassVar[bool] = False
  needs_training_length: ClassVar[bool] = False
  legal: ClassVar[str] = LEGAL_FILES

  @property
  def base(self) -> TextSource:
    """See `Source.base`. Sources with the same base are scanned once, and share its evaluation documents."""
    return self

  def files(self) -> list[SourceFile]:
    """Returns the files of the source in a fixed order. Raises `UserError` if there are none."""
    raise NotImplementedError

  def choose(self, files: list[SourceFile], most_bytes: int | None) -> list[SourceFile]:
    """Decides what is scanned of `files`; here all of it.

    A source whose files are far away leaves out what it would take too long to read, or cuts large files into pieces that can be
    read apart.

    Args:
      files: what `files` returned.
      most_bytes: of text that will be trained on (``config.data.max_mib``); None is no limit.
    """
    del most_bytes
    return files

  def read(self, file: SourceFile, rows: Collection[int] | None = None) -> Iterator[Document]:
    """Reads the documents of a file, or only those at `rows`, in order. Runs in worker processes, and more than once."""
    return read_documents(file, rows)

  def folders(self, files: Sequence[SourceFile]) -> list[str] | None:
    """Names the folder of every file, for a source whose held-out documents are whole folders; None where they are documents.

    No text of a folder that is held out is trained on.
    """
    del files
    return None

  def join(self, texts: Sequence[str]) -> str:
    """Writes the held-out document of a folder with these documents."""
    return "\n".join(texts)

  def group(self, entries: EntryTable, config: DataConfig, characters: int) -> Sequence[Sequence[Entry]]:
    """Decides which scanned documents make up each training document; here one each.

    Args:
      entries: the documents to train on, in the source's order.
      config: the data options.
      characters: see `needs_training_length`.
    """
    del config, characters
    return EachAlone(entries)

  def compose(self, text: str, digest: bytes, characters: int) -> str:
    """Writes one training document; here the text itself. Runs in worker processes, and must be deterministic.

    Args:
      text: the documents of one group, joined by newlines, without near duplicates of evaluation documents.
      digest: of the group's first document, to seed what is random.
      characters: see `needs_training_length`.
    """
    del digest, characters
    return text

  def plain(self, text: str) -> str:
    """The text of a document on which a tokenizer is trained; here all of it."""
    return text

  def encode(self, text: str, tokenizer: Tokenizer) -> Int[np.ndarray, " T"]:
    """The tokens of a document, (T,), with end-of-text last; those of a `masked` source may have the bit `shards.MASKED`."""
    return np.append(tokenizer.encode(text), tokenizer.eot_id)


class TokenSource(Source):
  """A source of token shards that are used as they are, in the format of `atma_jax.data.shards`."""

  def shards(self) -> list[str]:
    """Returns the paths of the shards in order. Raises `UserError` if there are none."""
    raise NotImplementedError

  def remote_shards(self) -> list[SourceFile]:
    """Returns the shards, in order, that have to be fetched before they can be used, instead of `shards`; here none."""
    return []

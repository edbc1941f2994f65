"""Scanning the sources, and splitting them by document into training, validation and held-out data."""

from __future__ import annotations

import array
from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import itertools
import pathlib
import time
from typing import Any

from absl import logging
import numpy as np
from tqdm import tqdm

from atma_jax.config import DataConfig
from atma_jax.data.documents import Entry, SourceFile
from atma_jax.data.entries import EntryTable
from atma_jax.data.near_duplicates import EvaluationLines, text_digest
from atma_jax.data.process_pool import Pool
from atma_jax.data.remote import fetch_file, is_remote_path
from atma_jax.data.scan_log import ScanLog, ScanResult
from atma_jax.data.shards import file_digest, open_shard
from atma_jax.data.source import TextSource, TokenSource
from atma_jax.data.tokenizers import Tokenizer, check_tokens
from atma_jax.errors import UserError
from atma_jax.progress import progress_bar

_SCAN_BYTES = 1 << 20  # files handed to a worker at a time; a larger file goes by itself
_PROBLEMS_KEPT = 20
FOLDER_BYTES = 1 << 20  # of the folders that are held out first
_RESERVE = 8  # documents at the end of ready shards set aside for each evaluation document taken

Portion = tuple[TextSource, list[tuple[int, SourceFile]]]  # files of one source, with their indices


@dataclasses.dataclass
class EvaluationDocument:
  """A held-out or validation document: text, or its tokens if it comes from a ready shard.

  Attributes:
    source: the entry of ``config.data.sources`` that it comes from.
    name: of the document.
    text: the document, as its source reads it; None if it comes from a ready shard.
    tokens: (n,) without end-of-text; None until the text is encoded.
  """

  source: str
  name: str
  text: str | None = None
  tokens: np.ndarray | None = None


@dataclasses.dataclass
class Split:
  """The evaluation documents of all sources, and the lines by which their near duplicates are recognised."""

  heldout: list[EvaluationDocument] = dataclasses.field(default_factory=list)
  validation: list[EvaluationDocument] = dataclasses.field(default_factory=list)
  lines: EvaluationLines = dataclasses.field(default_factory=EvaluationLines)


class TextCorpus:
  """The distinct documents of a text source.

  Args:
    source: where the documents come from.
    most_bytes: of text that is trained on; None is no limit.
    folder: where the progress of scanning remote files is kept; None keeps none.

  Attributes:
    source: as given.
    files: the files of the source that are scanned.
    entries: the distinct documents in the source's order, filled by `scan`; `take_evaluation` leaves those to train on.
    report: what the scan found, as the manifest records it.
  """

  def __init__(self, source: TextSource, most_bytes: int | None = None, folder: pathlib.Path | None = None):
    self.source = source
    self._log = ScanLog(folder, (source.entry, most_bytes)) if folder is not None else None
    files = self._log.files() if self._log is not None else None
    self.files = source.choose(source.files(), most_bytes) if files is None else files
    if self._log is not None and files is None:
      if any(is_remote_path(file.path) for file in self.files):
        self._log.begin(self.files)
      else:
        self._log = None  # a scan of this disk is soon repeated, and sees what has changed
    self.entries = EntryTable.of(())
    self.report: dict[str, Any] = {"source": source.entry, "files": len(self.files), "documents": 0, "bytes": 0, "skipped": 0,
                                   "duplicates": 0, "unreadable": 0, "problems": []}

  def scan(self, pool: Pool, earlier: Sequence[EntryTable], progress: bool) -> None:
    """Hashes every document and keeps the first of equal ones.

    Args:
      pool: runs `scan_files`.
      earlier: the documents of the sources scanned before.
      progress: whether to show a progress bar.

    Raises:
      UserError: a document cannot be read and the source does not skip those, or there is no new text at all.
    """
    portions = portions_of(self.source, self.files)
    report, entry_name, began = self.report, self.source.entry, time.perf_counter()

    def tables(bar: tqdm) -> Iterator[EntryTable]:
      for (_, files), (entries, problems, skipped) in zip(portions, self._scanned(pool, portions)):
        if problems and not self.source.skips_unreadable:
          raise UserError(f"config.data.sources: {entry_name!r}: {problems[0]}; legal: {self.source.legal}")
        report["skipped"] += skipped
        report["unreadable"] += len(problems)
        report["problems"] += problems[:_PROBLEMS_KEPT - len(report["problems"])]
        bar.update(len(files))
        yield entries

    with progress_bar(len(self.files), " files", description=f"scan {entry_name}", scale=False, enabled=progress) as bar:
      self.entries = EntryTable.join(tables(bar))
    repeated = self.entries.repeated(earlier)
    if repeated.any():
      self.entries = self.entries.where(~repeated)
    report["duplicates"] = int(repeated.sum())
    seconds, size = time.perf_counter() - began, self.entries.total_size / 1e6
    logging.info("%s: %s documents, %s MB read and hashed in %.1f s, %.2f MB/s with %d processes", entry_name,
                 f"{len(self.entries):,}", f"{size:,.1f}", seconds, size / seconds, pool.workers)
    report["documents"] = len(self.entries)
    report["bytes"] = self.entries.total_size
    if not self.entries:
      raise UserError(f"config.data.sources: {entry_name!r} has no text in its {len(self.files)} files, or none "
                      f"that the sources before it lack; legal: {self.source.legal}")
    if report["problems"]:
      logging.info("%s: %d unreadable files left out, the first: %s", entry_name, report["unreadable"], report["problems"][0])

  def _scanned(self, pool: Pool, portions: Sequence[Portion]) -> Iterator[ScanResult]:
    """What was found in each portion: out of the log as far as it goes, then by a scan."""
    done = 0
    for result in self._log.results() if self._log is not None else ():
      done += 1
      yield result
    for result in pool.map(portions[done:]):
      if self._log is not None:
        self._log.add(result)
      yield result

  def finish(self) -> None:
    """Removes what was kept for a scan that is interrupted."""
    if self._log is not None:
      self._log.remove()

  def read(self, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of `entries`, which must be in the source's order."""
    table = entries if isinstance(entries, EntryTable) else EntryTable.of(entries)
    for file, wanted in table.by_file():
      rows = wanted.records["row"]
      documents = self.source.read(self.files[file], array.array("q", rows.astype(np.int64).tobytes()))
      for row, document in itertools.zip_longest(rows, documents):
        if row is None or document is None or document.text is None or document.row != row:
          raise UserError(f"{self.files[file].path} changed while it was being prepared: start again")
        yield document.name, document.text

  def read_in_any_order(self, entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Returns (name, text) of `entries`, in the order given."""
    ordered = sorted(entries)
    documents = dict(zip(ordered, self.read(ordered)))
    return [documents[entry] for entry in entries]

  def take_evaluation(self, split: Split, heldout: int, validation: int) -> None:
    """Moves documents to `split`: the `heldout` longest ones, then the `validation` ones with the smallest hashes.

    A document that nearly repeats another evaluation document is passed over. Of a source with `TextSource.folders`, whole
    folders are held out instead.
    """
    if heldout and (folders := self.source.folders(self.files)) is not None:
      self._take_folders(split, heldout, folders)
      heldout = 0
    for chosen, count, order in ((split.heldout, heldout, lambda: self.entries.largest_first()),
                                 (split.validation, validation, lambda: self.entries.by_digest())):
      ordered = order() if count else np.zeros(0, np.int64)
      taken: list[int] = []
      for first in range(0, len(ordered), 2 * count or 1):
        if len(taken) == count:
          break
        places = ordered[first:first + 2 * count]
        for place, (name, text) in zip(places, self.read_in_any_order(list(self.entries.where(places)))):
          if len(taken) < count and not split.lines.cover(text):
            split.lines.add(text)
            taken.append(int(place))
            chosen.append(EvaluationDocument(self.source.entry, name, text))
      self.entries = self.entries.where(np.isin(np.arange(len(self.entries)), taken, invert=True))
      if len(taken) < count or not self.entries:
        raise UserError(f"config.data.sources: {self.source.entry!r} has {self.report['documents']} documents, too few for "
                        f"its share of config.data.heldout_documents and validation_documents ({heldout} and "
                        f"{validation}, no two alike) and some to train on")

  def _take_folders(self, split: Split, count: int, folders: Sequence[str]) -> None:
    """Moves the documents of `count` folders to `split`, those of a folder joined to one.

    The smallest folders of at least 1 MiB come first, so that most text is left to train on, then the largest of the others.
    """
    entries: dict[str, list[Entry]] = {}
    for entry in self.entries:
      entries.setdefault(folders[entry.file], []).append(entry)
    sizes = {folder: sum(entry.size for entry in own) for folder, own in entries.items()}
    ordered = sorted(sizes, key=lambda folder: (sizes[folder] < FOLDER_BYTES, abs(sizes[folder] - FOLDER_BYTES), folder))
    if len(ordered) <= count:
      raise UserError(f"config.data.sources: {self.source.entry!r} has {len(ordered)} folders, too few to hold {count} out, its "
                      "share of config.data.heldout_documents, and to train on others")
    taken: set[str] = set()
    for folder in ordered[:-1]:
      texts = [text for _, text in self.read(entries[folder]) if not split.lines.cover(text)]
      joined = self.source.join(texts)
      if joined.strip():
        for text in texts:
          split.lines.add(text)
        split.heldout.append(EvaluationDocument(self.source.entry, folder, joined))
        taken.add(folder)
      if len(taken) == count:
        break
    left = np.array([folder not in taken for folder in folders])
    self.entries = self.entries.where(left[self.entries.records["file"]])

  def sample(self, size: float) -> EntryTable:
    """Returns an even sample of about `size` bytes (all text if there is less), those with the smallest hashes, in order."""
    ordered = self.entries.by_digest()
    within = int(np.searchsorted(np.cumsum(self.entries.sizes[ordered]), size, side="right"))
    return self.entries.where(np.sort(ordered[:max(1, within)]))

  def limit(self, size: float) -> None:
    """Keeps only a `sample` of about `size` bytes, in the source's order."""
    self.entries = self.sample(size)


def portions_of(source: TextSource, files: Sequence[SourceFile]) -> list[Portion]:
  """Cuts a source's files into portions of about a mebibyte, which `scan_files` reads at a time."""
  portions, filled = [], _SCAN_BYTES
  for index, file in enumerate(files):
    if filled >= _SCAN_BYTES:
      portions.append((source, []))
      filled = 0
    portions[-1][1].append((index, file))
    filled += file.size
  return portions


def scan_files(portion: Portion) -> ScanResult:
  """Reads a portion of a source's files. Runs in worker processes.

  Returns:
    The documents with text, the problems met, and the number of documents without text to use.
  """
  source, files = portion
  problems, skipped = [], 0

  def found() -> Iterator[Entry]:
    nonlocal skipped
    for index, file in files:
      for document in source.read(file):
        if document.text is None:
          problems.append(f"{document.name}: {document.problem}")
        elif not document.text or document.text.isspace():
          skipped += 1
        else:
          yield Entry(index, document.row, text_digest(document.text), len(document.text.encode()))

  return EntryTable.of(found()), problems, skipped


class ReadyTokens:
  """The shards of a token source, used as they are except for the last documents of the last one, kept for evaluation.

  The evaluation documents taken from here are looked for in all training data; those of text sources are not looked for here.

  Args:
    source: where the shards come from.
    folder: where remote shards are fetched to, in the prepared directory.
    progress: whether to show a progress bar meanwhile.

  Attributes:
    source: as given.
    shards: in order.
  """

  def __init__(self, source: TokenSource, folder: pathlib.Path, progress: bool):
    self.source = source
    self._folder = folder
    remote = source.remote_shards()
    self.shards = [open_shard(path) for path in (_fetched(source, remote, folder, progress) if remote else source.shards())]
    self._train_tokens = [shard.tokens for shard in self.shards]  # at the start of each shard

  def take_evaluation(self, split: Split, heldout: int, validation: int, tokenizer: Tokenizer) -> None:
    """Sets whole documents at the end of the last shard (at most half of it) aside and moves some of them to `split`.

    The `heldout` longest are held out, and the `validation` others with the smallest hashes are taken. A document that occurs
    again among the tokens to train on, or nearly repeats another evaluation document, is passed over.
    """
    wanted = heldout + validation
    if wanted == 0:
      return
    documents = self._set_aside(_RESERVE * wanted, tokenizer)
    repeated = self._digests_in_training({len(tokens) for tokens in documents.values()}, tokenizer.eot_id)
    by_size = sorted(documents, key=lambda name: (-len(documents[name]), _token_digest(documents[name])))
    fresh: list[tuple[bytes, EvaluationDocument]] = []
    for name in by_size:
      text, digest = tokenizer.decode(documents[name]), _token_digest(documents[name])
      if digest not in repeated and not split.lines.cover(text):
        split.lines.add(text)
        fresh.append((digest, EvaluationDocument(self.source.entry, name, tokens=documents[name])))
    if len(fresh) < wanted:
      raise UserError(f"config.data.sources: {self.source.entry!r} has {len(fresh)} documents to evaluate on at the end of "
                      "its last shard, too few for its share of config.data.heldout_documents and "
                      f"validation_documents ({heldout} and {validation}, no two alike)")
    split.heldout += [document for _, document in fresh[:heldout]]
    rest = sorted(fresh[heldout:], key=lambda item: item[0])
    split.validation += [document for _, document in rest[:validation]]

  def _set_aside(self, most: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Takes the last `most` documents off the tokens to train on; returns them by name, int32, without end-of-text."""
    last = self.shards[-1]
    tokens = last.open()
    half = last.tokens // 2
    ends = half + np.flatnonzero(tokens[half:-1] == tokenizer.eot_id)
    if not len(ends):
      raise UserError(f"{last.path} has no end-of-text token {tokenizer.eot_id} in its last half, so no documents to "
                      "evaluate on: check config.data.tokenizer, or set config.data.validation_documents and "
                      "config.data.heldout_documents to 0")
    starts = ends[-most:] + 1
    self._train_tokens[-1] = int(starts[0])
    content = np.asarray(tokens[starts[0]:], np.int32)
    check_tokens(content, tokenizer.vocab_size, self.source.entry)
    documents = np.split(content, starts[1:] - starts[0])
    return {f"{last.path}:{start}": document[document != tokenizer.eot_id]
            for start, document in zip(starts, documents) if (document != tokenizer.eot_id).any()}

  def _digests_in_training(self, lengths: set[int], eot_id: int) -> set[bytes]:
    """Digests of those documents to train on that have one of `lengths`."""
    found = set()
    for shard, count in zip(self.shards, self._train_tokens):
      tokens = shard.open()[:count]
      bounds = np.concatenate([[-1], np.flatnonzero(tokens == eot_id), [count]])
      for index in np.flatnonzero(np.isin(np.diff(bounds) - 1, list(lengths))):
        found.add(_token_digest(tokens[bounds[index] + 1:bounds[index + 1]]))
    return found

  def record(self) -> dict[str, Any]:
    """Returns the source's entry of the manifest."""
    pairs = [(shard.path, count) for shard, count in zip(self.shards, self._train_tokens) if count]
    root = self._folder.parent
    shards = [{"path": str(pathlib.Path(path).relative_to(root) if pathlib.Path(path).parent == self._folder else path),
               "tokens": count, "sha256": file_digest(path)} for path, count in pairs]
    return {"source": self.source.entry, "shards": shards,
            "tokens": sum(self._train_tokens), "documents": None, "near_duplicates": 0}


def _fetched(source: TokenSource, files: Sequence[SourceFile], folder: pathlib.Path, progress: bool) -> list[str]:
  """Fetches remote shards that are not there yet; returns their paths here."""
  total = sum(file.size for file in files)
  key = hashlib.sha256(source.entry.encode()).hexdigest()[:8]
  paths = []
  with progress_bar(total, "B", description=f"fetch {source.entry}", enabled=progress) as bar:
    for number, file in enumerate(files):
      path = folder / f"{key}-{number:05d}.bin"
      fetch_file(file.path, path, file.remote_size, bar.update)
      paths.append(str(path))
  return paths


def _token_digest(tokens: np.ndarray) -> bytes:
  return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()


def share(count: int, index: int, parts: int) -> int:
  """Returns how many of `count` things part `index` gets when they are dealt out evenly to `parts`."""
  return count // parts + (index < count % parts)


def split_corpora(config: DataConfig, text: Sequence[TextCorpus], ready: Sequence[ReadyTokens],
                  tokenizer: Tokenizer | None) -> Split:
  """Takes the evaluation documents out of every source, in equal numbers, and limits the remaining text to the cap.

  Args:
    config: the data options.
    text: the scanned text sources.
    ready: the token sources.
    tokenizer: of the ready tokens; may be None if there are none.

  Raises:
    UserError: a source has too few documents.
  """
  split = Split()
  parts = len(text) + len(ready)
  for index, corpus in enumerate([*text, *ready]):
    counts = (share(config.heldout_documents, index, parts), share(config.validation_documents, index, parts))
    if isinstance(corpus, ReadyTokens):
      if tokenizer is None:
        raise ValueError("split_corpora: ready tokens need their tokenizer")
      corpus.take_evaluation(split, *counts, tokenizer)
    else:
      corpus.take_evaluation(split, *counts)
      if config.max_mib is not None:
        corpus.limit(config.max_mib << 20)
  return split

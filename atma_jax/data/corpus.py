"""Scanning sources and splitting them by document: train, validation, held-out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import itertools
from typing import Any, NamedTuple

from absl import logging
import numpy as np
from tqdm import tqdm

from atma_jax.config import DataConfig, UserError
from atma_jax.data import sources
from atma_jax.data.near_duplicates import EvaluationLines
from atma_jax.data.parallel import Pool
from atma_jax.data.shards import open_shard

_FILES_PER_SCAN = 64
_PROBLEMS_KEPT = 20
_RESERVE = 8  # documents at the end of ready shards set aside for each evaluation document taken


class Entry(NamedTuple):
  """One distinct document of a scanned source; `digest` orders and identifies it."""

  file: int
  row: int
  digest: bytes
  size: int  # bytes of UTF-8


@dataclasses.dataclass
class EvaluationDocument:
  """A held-out or validation document: text, or tokens where it comes from a ready shard."""

  source: str
  name: str
  text: str | None = None
  tokens: np.ndarray | None = None


@dataclasses.dataclass
class Split:
  """The evaluation documents of all sources, and their lines."""

  heldout: list[EvaluationDocument] = dataclasses.field(default_factory=list)
  validation: list[EvaluationDocument] = dataclasses.field(default_factory=list)
  lines: EvaluationLines = dataclasses.field(default_factory=EvaluationLines)


class TextCorpus:
  """The distinct documents of a text source; `take_evaluation` leaves in `entries` those to train on."""

  def __init__(self, source: str, files: list[sources.SourceFile]):
    self.source = source
    self.files = files
    self.entries: list[Entry] = []
    self.report = {"source": source, "files": len(files), "documents": 0, "bytes": 0, "skipped": 0, "duplicates": 0,
                   "unreadable": 0, "problems": []}

  def scan(self, pool: Pool, seen: set[bytes], progress: bool) -> None:
    """Hashes every document. Of equal ones, over all sources scanned with the same `seen`, the first stays."""
    files = list(enumerate(self.files))
    chunks = [files[start:start + _FILES_PER_SCAN] for start in range(0, len(files), _FILES_PER_SCAN)]
    report = self.report
    with tqdm(total=len(files), desc=f"scan {self.source}", unit=" files", mininterval=0.5,
              disable=not progress) as bar:
      for chunk, (entries, problems, skipped) in zip(chunks, pool.map(chunks)):
        for entry in entries:
          if entry.digest not in seen:
            seen.add(entry.digest)
            self.entries.append(entry)
          else:
            report["duplicates"] += 1
        report["skipped"] += skipped
        report["unreadable"] += len(problems)
        report["problems"] += problems[:_PROBLEMS_KEPT - len(report["problems"])]
        bar.update(len(chunk))
    report["documents"] = len(self.entries)
    report["bytes"] = sum(entry.size for entry in self.entries)
    first = f"{report['unreadable']} unreadable, the first: {report['problems'][0]}" if report["problems"] else ""
    if not self.entries:
      raise UserError(f"config.data.sources: {self.source!r} has no text in its {len(files)} files {first}".strip())
    if first:
      logging.warning("%s: documents left out: %s", self.source, first)

  def read(self, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """(name, text) of `entries`, which must be in the source's order."""
    for file, group in itertools.groupby(entries, key=lambda entry: entry.file):
      wanted = list(group)
      documents = sources.read_documents(self.files[file], [entry.row for entry in wanted])
      for entry, document in itertools.zip_longest(wanted, documents):
        if entry is None or document is None or document.text is None or document.row != entry.row:
          raise UserError(f"{self.files[file].path} changed while it was being prepared: start again")
        yield document.name, document.text

  def read_in_any_order(self, entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """(name, text) of `entries`, in the order given."""
    ordered = sorted(entries)
    documents = dict(zip(ordered, self.read(ordered)))
    return [documents[entry] for entry in entries]

  def take_evaluation(self, split: Split, heldout: int, validation: int) -> None:
    """Moves the `heldout` longest documents and the `validation` ones of smallest hash to `split`.

    One that nearly repeats another evaluation document is passed over.
    """
    for chosen, count, order in ((split.heldout, heldout, lambda entry: (-entry.size, entry.digest)),
                                 (split.validation, validation, lambda entry: entry.digest)):
      candidates = sorted(self.entries, key=order)[:2 * count]
      taken = set()
      for entry, (name, text) in zip(candidates, self.read_in_any_order(candidates)):
        if len(taken) < count and not split.lines.cover(text):
          split.lines.add(text)
          taken.add(entry)
          chosen.append(EvaluationDocument(self.source, name, text))
      self.entries = [entry for entry in self.entries if entry not in taken]
    if not self.entries:
      raise UserError(f"config.data.sources: {self.source!r} has {self.report['documents']} documents, too few for its "
                      f"share of config.data.heldout_documents and validation_documents ({heldout} and {validation}) "
                      "and some to train on")

  def sample(self, size: float) -> list[Entry]:
    """Entries of about `size` bytes (of all text if there is less) of smallest hash: an even sample, in hash order."""
    taken, total = [], 0
    for entry in sorted(self.entries, key=lambda entry: entry.digest):
      if taken and total + entry.size > size:
        break
      taken.append(entry)
      total += entry.size
    return taken

  def limit(self, size: float) -> None:
    """Keeps a sample of about `size` bytes, in the source's order."""
    self.entries = sorted(self.sample(size))


def scan_files(files: Sequence[tuple[int, sources.SourceFile]]) -> tuple[list[Entry], list[str], int]:
  """Entries of some files, the problems met, and the number of documents without text to use."""
  entries, problems, skipped = [], [], 0
  for index, file in files:
    for document in sources.read_documents(file):
      if document.text is None:
        problems.append(f"{document.name}: {document.problem}")
        continue
      bare = "".join(document.text.split())
      if not bare:
        skipped += 1
        continue
      digest = hashlib.blake2b(bare.encode(), digest_size=16).digest()
      entries.append(Entry(index, document.row, digest, len(document.text.encode())))
  return entries, problems, skipped


class ReadyTokens:
  """A ``bin:`` source: shards used as they are, but for documents at the end of the last one, kept for evaluation.

  Equal documents elsewhere in ready shards are not looked for.
  """

  def __init__(self, source: str, pattern: str):
    self.source = source
    self.shards = [open_shard(path) for path in sources.glob_files(source, pattern)]
    self._train_tokens = [shard.tokens for shard in self.shards]

  def take_evaluation(self, split: Split, heldout: int, validation: int, eot_id: int) -> None:
    """Sets whole documents at the end of the last shard (at most half of it) aside and moves some to `split`.

    Of those set aside the `heldout` longest are held out, and the `validation` others of smallest hash taken.
    """
    if heldout + validation == 0:
      return
    last = self.shards[-1]
    tokens = last.open()
    half = last.tokens // 2
    ends = half + np.flatnonzero(tokens[half:-1] == eot_id)
    if not len(ends):
      raise UserError(f"{last.path} has no end-of-text token {eot_id} in its last half, so no documents to evaluate "
                      "on: check config.data.tokenizer, or set config.data.validation_documents and "
                      "config.data.heldout_documents to 0")
    starts = ends[-_RESERVE * (heldout + validation):] + 1
    self._train_tokens[-1] = int(starts[0])
    documents = []
    for start, stop in zip(starts, [*(starts[1:] - 1), last.tokens]):
      if stop > start:
        content = np.asarray(tokens[start:stop], np.int32)
        name = f"{last.path}:{start}"
        documents.append((hashlib.blake2b(content.tobytes()).digest(),
                          EvaluationDocument(self.source, name, tokens=content[content != eot_id])))
    documents.sort(key=lambda pair: (-len(pair[1].tokens), pair[0]))
    split.heldout += [document for _, document in documents[:heldout]]
    others = sorted(documents[heldout:], key=lambda pair: pair[0])
    split.validation += [document for _, document in others[:validation]]

  def record(self) -> dict[str, Any]:
    """Entry of the manifest."""
    pairs = [(shard.path, count) for shard, count in zip(self.shards, self._train_tokens) if count]
    return {"source": self.source, "shards": [{"path": path, "tokens": count} for path, count in pairs],
            "tokens": sum(self._train_tokens), "documents": None, "near_duplicates": 0}


def share(count: int, index: int, parts: int) -> int:
  """Part `index` of `count` things dealt to `parts`."""
  return count // parts + (index < count % parts)


def split_corpora(config: DataConfig, text: Sequence[TextCorpus], ready: Sequence[ReadyTokens],
                  eot_id: int | None) -> Split:
  """Takes the evaluation documents out of every source, in equal numbers, and limits what is left to the cap."""
  split = Split()
  parts = len(text) + len(ready)
  for index, corpus in enumerate([*text, *ready]):
    counts = (share(config.heldout_documents, index, parts), share(config.validation_documents, index, parts))
    if isinstance(corpus, ReadyTokens):
      corpus.take_evaluation(split, *counts, eot_id)
    else:
      corpus.take_evaluation(split, *counts)
      if config.max_mib is not None:
        corpus.limit(config.max_mib << 20)
  return split

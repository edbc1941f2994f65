"""From sources to token shards: scan, split by document, train the tokenizer, tokenise in parallel processes.

    DIR/manifest.json           written last: what the directory holds and the options that made it
    DIR/tokenizer.json          the tokenizer; `atma_jax.data.tokenizers.load_tokenizer` reads it
    DIR/train/I-SOURCE/*.bin    the documents of source I, each followed by end-of-text
    DIR/validation/*.bin, DIR/heldout/*.bin
    DIR/fetched/*.bin           shards that a source of tokens names by an address
    DIR/scans/*.scan            what was found in remote text so far, removed at the end

The result depends only on the text and the options, so a run that was killed and started again, with any number of workers, ends
with the same bytes as an undisturbed one. A shard is whole or absent; ``progress.json`` beside the shards says how many documents
they hold.

Training, validation and held-out documents are disjoint. A document is identified by a hash of its text without white space, and
only the first of equal ones is kept. The longest documents are held out, and those with the smallest hashes become validation
documents, in equal numbers from every source. The sources python-packages and folders:GLOB hold out whole folders, each as one
document. A training document that contains half of the lines of an evaluation document, or of a file of a folder held out (say,
another version of the same file), is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import hashlib
import os
import pathlib
import re
import time
from typing import Any

from absl import logging
import numpy as np
from tqdm import tqdm

from atma_jax.config import TOKENIZER_OF_INIT_FROM, DataConfig
from atma_jax.data import tokenizers
from atma_jax.data.chat_template import ChatTemplate
from atma_jax.data.corpus import EvaluationDocument, ReadyTokens, TextCorpus, scan_files, split_corpora
from atma_jax.data.entries import EntryTable, flattened, total_size
from atma_jax.data.files import exclusive, write_json
from atma_jax.data.manifest import (
  COUNT,
  MANIFEST,
  TOKENIZER,
  Manifest,
  check_settings,
  load_manifest,
  settings_of,
  write_manifest,
)
from atma_jax.data.near_duplicates import EvaluationLines
from atma_jax.data.process_pool import Pool
from atma_jax.data.shards import file_digest, token_dtype, write_shard
from atma_jax.data.source import TextSource, TokenSource
from atma_jax.data.sources import masks, parse_source
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.json_input import mismatch, read_json
from atma_jax.progress import progress_bar

_BEGUN = "begun.json"
_PROGRESS = "progress.json"
_BATCH_BYTES = 256 << 10  # text handed to a worker at a time
_LENGTH_SAMPLE_BYTES = 1 << 20  # text tokenised to measure the training length in characters

_Group = tuple[TextSource, list[str], bytes | None]  # source, texts of one document, digest of the first (None: evaluation)


def prepare(config: DataConfig, directory: str | os.PathLike, *, workers: int | None = None, progress: bool = True,
            tokenizer: Tokenizer | None = None) -> Manifest:
  """Prepares `directory` for training and evaluation, or returns at once if that is done.

  Args:
    config: the options; those that decide the result are recorded in the manifest.
    directory: created if missing. One begun with other options is refused.
    workers: processes that read and tokenise. None takes one per core, at most `MOST_WORKERS`; 1 works in this process.
    progress: whether to show progress bars.
    tokenizer: what ``config.tokenizer="init_from"`` stands for.

  Returns:
    The manifest of the directory.

  Raises:
    UserError: no or unreadable input, an empty corpus, a directory that holds something else, a full disk.
  """
  directory = pathlib.Path(directory)
  settings = settings_of(config)
  if not (directory / MANIFEST).exists():  # a finished directory may be read-only
    with exclusive(directory):
      if not (directory / MANIFEST).exists():  # nobody has finished it meanwhile
        _prepare(config, settings, directory, workers, progress, tokenizer)
  manifest = load_manifest(directory)
  check_settings(manifest.settings, settings, directory)
  return manifest


def _prepare(config: DataConfig, settings: dict[str, Any], directory: pathlib.Path, workers: int | None,
             progress: bool, given: Tokenizer | None) -> None:
  tokenizer = configured_tokenizer(config, directory / TOKENIZER, given)
  sources, text, ready = _open_sources(config, directory, progress)
  scanned: list[EntryTable] = []
  with Pool(workers if text else 1, scan_files) as pool:
    for corpus in text.values():
      corpus.scan(pool, scanned, progress)
      scanned.append(corpus.entries)
  scanned.clear()
  _begin(directory, settings, text.values())
  split = split_corpora(config, list(text.values()), list(ready.values()), tokenizer)
  tokenizer = _settle_tokenizer(tokenizer, config, text.values(), directory / TOKENIZER)

  characters = _training_characters(config, sources, text.values(), tokenizer)
  with Pool(workers, _Encoder(tokenizer, split.lines, characters)) as pool:
    train = []
    for index, source in enumerate(sources):
      if isinstance(source, TextSource):
        writer = _SourceWriter(config, directory, index, source, text[source.base], characters, tokenizer)
        train.append(writer.write(pool, progress))
      else:
        train.append(ready[source].record())
    heldout = _write_evaluation(directory, "heldout", split.heldout, pool, tokenizer)
    validation = _write_evaluation(directory, "validation", split.validation, pool, tokenizer)
  manifest = Manifest(
      settings=settings, scanned=[corpus.report for corpus in text.values()], train=train, validation=validation,
      heldout=heldout, tokenizer={"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                                  "eot_id": tokenizer.eot_id, "fingerprint": tokenizer.fingerprint})
  write_manifest(directory, manifest)
  for corpus in text.values():
    corpus.finish()


def _open_sources(config: DataConfig, directory: pathlib.Path, progress: bool) -> tuple[
    list[TextSource | TokenSource], dict[TextSource, TextCorpus], dict[TokenSource, ReadyTokens]]:
  """Opens every source.

  Returns:
    The sources in the order of the configuration, the corpora of text by base source, and the ready tokens by source.
  """
  sources, text, ready = parse_sources(config), {}, {}
  for source in sources:
    if isinstance(source, TokenSource):
      ready[source] = ReadyTokens(source, directory / "fetched", progress)
    elif source.base not in text:
      text[source.base] = TextCorpus(source.base, None if config.max_mib is None else config.max_mib << 20, directory / "scans")
  return sources, text, ready


def parse_sources(config: DataConfig) -> list[TextSource | TokenSource]:
  """Parses the sources, in the order of the configuration.

  Raises:
    UserError: one is not legal or listed twice, or one holds ready tokens and the tokenizer that made them is not named.
  """
  if len(set(config.sources)) < len(config.sources):
    raise UserError(f"config.data.sources={tuple(config.sources)!r}: each source may be listed once")
  sources = []
  for source in map(parse_source, config.sources):
    if not isinstance(source, (TextSource, TokenSource)):
      raise TypeError(f"{type(source).__name__} is neither a TextSource nor a TokenSource")
    if isinstance(source, TokenSource) and config.tokenizer == "sentencepiece":
      raise UserError(f"config.data.tokenizer='sentencepiece': {source.prefix}: sources hold ready tokens, so name the tokenizer "
                      "that made them: 'bytes', a .model file or a tokenizer.json")
    sources.append(source)
  return sources


def _begin(directory: pathlib.Path, settings: dict[str, Any], corpora: Iterable[TextCorpus]) -> None:
  """Records what is being prepared; refuses a directory begun with other options or other text."""
  digest = hashlib.sha256()
  for corpus in corpora:
    for piece in corpus.entries.fingerprint_pieces():
      digest.update(piece)
  begun = {"settings": settings, "corpus": digest.hexdigest()}
  path = directory / _BEGUN
  if not path.exists():
    write_json(path, begun)
    return
  stored = read_json(path)
  problem = mismatch(stored, {"settings": {}, "corpus": str})
  if problem:
    raise UserError(f"{path} is damaged, {problem}: remove {directory} to start again")
  check_settings(stored["settings"], settings, directory)
  if stored["corpus"] != begun["corpus"]:
    raise UserError(f"the text of the sources changed since {directory} was begun: remove it to start again")


# --- Tokenizer --------------------------------------------------------------------------------------------------------


def configured_tokenizer(config: DataConfig, path: pathlib.Path, given: Tokenizer | None = None) -> Tokenizer | None:
  """The tokenizer that the options name, None if one is to be trained.

  One that is named as on the hub is taken from `path` if an earlier run has put it there.
  """
  if config.tokenizer == "sentencepiece":
    return None
  if config.tokenizer == TOKENIZER_OF_INIT_FROM and given is not None:
    return given
  if path.exists() and tokenizers.is_hub_name(config.tokenizer):
    return tokenizers.load_tokenizer(str(path))
  return tokenizers.load_tokenizer(config.tokenizer)


def _settle_tokenizer(tokenizer: Tokenizer | None, config: DataConfig, corpora: Iterable[TextCorpus],
                      path: pathlib.Path) -> Tokenizer:
  """Returns the tokenizer stored at `path`, or stores the given one there, or one trained on the training text."""
  if path.exists():
    return tokenizers.load_tokenizer(str(path))
  if tokenizer is None:
    texts = _sample_texts(list(corpora), config.tokenizer_train_mib << 20)
    tokenizer = tokenizers.train_sentencepiece(texts, config.tokenizer_vocab_size)
  if masks(config.sources) and tokenizer.chat_template is None:
    tokenizer.chat_template = ChatTemplate()
  write_json(path, tokenizer.to_dict())
  return tokenizer


def _sample_texts(corpora: Sequence[TextCorpus], size: int) -> Iterator[str]:
  """Yields about `size` bytes of training text, the same amount from every source."""
  for corpus in corpora:
    for _, text in corpus.read(corpus.sample(size / len(corpora))):
      yield corpus.source.plain(text)


def _training_characters(config: DataConfig, sources: Sequence[TextSource | TokenSource], corpora: Iterable[TextCorpus],
                         tokenizer: Tokenizer) -> int:
  """Measures on a sample how many characters of text the training length holds; 0 if no source needs to know."""
  if not any(isinstance(source, TextSource) and source.needs_training_length for source in sources):
    return 0
  texts = list(_sample_texts(list(corpora), _LENGTH_SAMPLE_BYTES))
  return config.sequence_length * sum(map(len, texts)) // sum(len(tokenizer.encode(text)) for text in texts)


# --- Shards -----------------------------------------------------------------------------------------------------------


class _Encoder:
  """Turns groups of documents into tokens; lives in the worker processes.

  The result for a group is the tokens of the document composed from it, with end-of-text last, and the number of the group's
  documents that were dropped as near duplicates of evaluation documents.
  """

  def __init__(self, tokenizer: Tokenizer, lines: EvaluationLines, characters: int):
    self._tokenizer = tokenizer
    self._lines = lines
    self._characters = characters

  def __call__(self, batch: list[_Group]) -> list[tuple[np.ndarray, int]]:
    return [self._encode(*group) for group in batch]

  def _encode(self, source: TextSource, texts: list[str], digest: bytes | None) -> tuple[np.ndarray, int]:
    kept = texts if digest is None else [text for text in texts if not self._lines.cover(text)]
    text = "\n".join(kept)
    if digest is not None and kept:
      text = source.compose(text, digest, self._characters)
    tokens = source.encode(text, self._tokenizer) if kept else np.zeros(0)
    return tokens.astype(token_dtype(self._tokenizer.vocab_size, source.masked)), len(texts) - len(kept)


class _SourceWriter:
  """Writes the training shards of one text source."""

  def __init__(self, config: DataConfig, directory: pathlib.Path, index: int, source: TextSource, corpus: TextCorpus,
               characters: int, tokenizer: Tokenizer):
    self._directory, self._source, self._corpus = directory, source, corpus
    self._folder = directory / "train" / f"{index}-{re.sub('[^A-Za-z0-9]+', '-', source.entry).strip('-')[:48]}"
    self._groups = source.group(corpus.entries, config, characters)
    self._dtype, self._shard_tokens = token_dtype(tokenizer.vocab_size, source.masked), config.shard_tokens

  def write(self, pool: Pool, progress: bool) -> dict[str, Any]:
    """Tokenises the source, or what an interrupted run left of it; returns its entry of the manifest."""
    entry, began = self._source.entry, time.perf_counter()
    with progress_bar(total_size(self._groups), "B", description=f"tokenise {entry}", enabled=progress) as bar:
      first, shards = self._write_shards(pool, bar)
    size, seconds = total_size(self._groups[first:]) / 1e6, time.perf_counter() - began
    logging.info("%s: %s MB read again and tokenised in %.1f s, %.2f MB/s with %d processes", entry, f"{size:,.1f}", seconds,
                 size / seconds, pool.workers)
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "near_duplicates")}
    if not totals["tokens"]:
      raise UserError(f"config.data.sources: {entry!r} has nothing to train on beside evaluation documents and their "
                      "near duplicates")
    records = []
    for number, shard in enumerate(shards):
      path = self._folder / _shard_name(number)
      records.append({"path": str(path.relative_to(self._directory)), "tokens": shard["tokens"],
                      "sha256": shard.get("sha256") or file_digest(path)})  # a version without digests began the folder
    return {"source": entry, "shards": records, **totals}

  def _write_shards(self, pool: Pool, bar: tqdm) -> tuple[int, list[dict[str, Any]]]:
    """Writes shards of at least `shard_tokens` tokens (the last may be smaller), from where an interrupted run stopped.

    Returns:
      The group at which it began; and for every shard, its tokens, its documents, the near duplicates dropped and the
      digest of the file.
    """
    path = self._folder / _PROGRESS
    shards = read_json(path) if path.exists() else []
    problem = mismatch(shards, [dict.fromkeys(("tokens", "documents", "near_duplicates"), COUNT)], "the list")
    if problem or sum(shard["documents"] for shard in shards) > len(self._groups):
      raise UserError(f"{path} is damaged, {problem or 'it counts too many documents'}: remove {self._folder} to start again")
    done = begun = sum(shard["documents"] for shard in shards)
    bar.update(total_size(self._groups[:done]))
    documents, tokens, dropped, first = [], 0, 0, done
    for result in pool.map(self._batches(done)):
      for document, near_duplicates in result:
        documents.append(document)
        tokens += len(document)
        dropped += near_duplicates
        bar.update(total_size([self._groups[done]]))
        done += 1
        if tokens >= self._shard_tokens or done == len(self._groups):
          file = self._folder / _shard_name(len(shards))
          write_shard(file, documents, self._dtype)
          shards.append({"tokens": tokens, "documents": done - first, "near_duplicates": dropped, "sha256": file_digest(file)})
          write_json(path, shards)
          documents, tokens, dropped, first = [], 0, 0, done
    return begun, shards

  def _batches(self, start: int) -> Iterator[list[_Group]]:
    """Yields the groups from `start` on with their texts, in batches of about `_BATCH_BYTES`."""
    groups = self._groups[start:]
    texts = self._corpus.read(flattened(groups))
    batch, size = [], 0
    for group in groups:
      batch.append((self._source, [next(texts)[1] for _ in group], group[0].digest))
      size += total_size([group])
      if size >= _BATCH_BYTES:
        yield batch
        batch, size = [], 0
    if batch:
      yield batch


def _shard_name(index: int) -> str:
  return f"{index:05d}.bin"


def _write_evaluation(directory: pathlib.Path, name: str, documents: Sequence[EvaluationDocument], pool: Pool,
                      tokenizer: Tokenizer) -> dict[str, Any]:
  """Writes evaluation documents, longest first, to one shard; returns their record for the manifest."""
  texts = [document for document in documents if document.text is not None]
  encoded = pool.map([(parse_source(document.source), [document.text], None)] for document in texts)
  for document, [(tokens, _)] in zip(texts, encoded):
    document.tokens = tokens[:-1]
  ordered = sorted(((document, np.asarray(document.tokens)) for document in documents),
                   key=lambda pair: (-len(pair[1]), pair[0].name))
  end = np.array([tokenizer.eot_id])
  path = directory / name / _shard_name(0)
  dtype = token_dtype(tokenizer.vocab_size, any(parse_source(document.source).masked for document in documents))
  total = write_shard(path, [part for _, tokens in ordered for part in (tokens, end)], dtype)
  index, start = [], 0
  for document, tokens in ordered:
    index.append({"source": document.source, "name": document.name, "start": start, "tokens": len(tokens)})
    start += len(tokens) + 1
  shard = {"path": str(path.relative_to(directory)), "tokens": total, "sha256": file_digest(path)}
  return {"shards": [shard], "tokens": total, "documents": index}

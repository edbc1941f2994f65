"""From sources to token shards: scan, split by document, train the tokenizer, tokenise in parallel processes.

    DIR/manifest.json           written last: what is in the directory and the options that made it
    DIR/tokenizer.json          the tokenizer; `atma_jax.data.tokenizers.load_tokenizer` reads it
    DIR/train/I-SOURCE/*.bin    the documents of source I, each followed by end-of-text
    DIR/validation/*.bin, DIR/heldout/*.bin

Everything is decided by the text and the options, so a run that was killed and started again, with any number of
workers, ends with the same bytes as one that was not. A shard is whole or absent; ``progress.json`` beside the shards
says how many documents they hold.

Train, validation and held-out documents are disjoint. A document is known by a hash of its text without white space;
of equal ones the first is kept. The held-out documents are the longest, the validation documents those of smallest
hash, in equal numbers from every source. A training document that contains half of the lines of an evaluation document
(another version of the same file, say) is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import re
from typing import Any

import numpy as np
from tqdm import tqdm

from atma_jax.config import DataConfig
from atma_jax.data import needles, sources, tokenizers
from atma_jax.data.corpus import Entry, EvaluationDocument, ReadyTokens, TextCorpus, scan_files, split_corpora
from atma_jax.data.files import read_json, write_json
from atma_jax.data.manifest import MANIFEST, TOKENIZER, Manifest, check_settings, load_manifest, settings_of
from atma_jax.data.near_duplicates import EvaluationLines
from atma_jax.data.process_pool import Pool
from atma_jax.data.shards import token_dtype, write_shard
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.progress import progress_bar

_BEGUN = "begun.json"
_PROGRESS = "progress.json"
_Parts = tuple[str, list[str], bytes]  # kind of its source, or "evaluation"; its texts; its digest
_BATCH_BYTES = 256 << 10  # text handed to a worker at a time
_RECALL_LENGTHS = 8  # training lengths of real text in a recall document


def prepare(config: DataConfig, directory: str | os.PathLike, *, workers: int | None = None,
            progress: bool = True) -> Manifest:
  """Prepares `directory` for training and evaluation, or returns at once where that is done.

  Args:
    config: the options; those that decide the result are recorded in the manifest.
    directory: made where missing. One begun with other options is refused.
    workers: processes that read and tokenise; None takes one a core, at most `MOST_WORKERS`, 1 works in this process.
    progress: show progress bars.

  Raises:
    UserError: no or unreadable input, an empty corpus, a directory that holds something else, a full disk.
  """
  directory = pathlib.Path(directory)
  settings = settings_of(config)
  with _exclusive(directory):
    if not (directory / MANIFEST).exists():
      _prepare(config, settings, directory, workers, progress)
    manifest = load_manifest(directory)
    check_settings(manifest.settings, settings, directory)
    return manifest


def _prepare(config: DataConfig, settings: dict[str, Any], directory: pathlib.Path, workers: int | None,
             progress: bool) -> None:
  text, ready = _open_sources(config)
  tokenizer = None if config.tokenizer == "sentencepiece" else tokenizers.load_tokenizer(config.tokenizer)
  if ready and tokenizer is None:
    raise UserError("config.data.tokenizer='sentencepiece': bin: sources hold ready tokens, so name the tokenizer that "
                    "made them: 'bytes', a .model file or a tokenizer.json")
  seen: set[bytes] = set()
  with Pool(workers if text else 1, scan_files) as pool:
    for corpus in text.values():
      corpus.scan(pool, seen, progress)
  _begin(directory, settings, text.values())
  split = split_corpora(config, list(text.values()), list(ready.values()), tokenizer)
  tokenizer = _settle_tokenizer(tokenizer, config, text.values(), directory / TOKENIZER)

  reach = _recall_reach(config, text.values(), tokenizer)
  with Pool(workers, _Encoder(tokenizer, split.lines, reach)) as pool:
    train = [ready[source].record() if source in ready else
             _write_source(config, directory, index, text, reach, pool, tokenizer, progress)
             for index, source in enumerate(config.sources)]
    heldout = _write_evaluation(directory, "heldout", split.heldout, pool, tokenizer)
    validation = _write_evaluation(directory, "validation", split.validation, pool, tokenizer)
  manifest = Manifest(
      settings=settings, scanned=[corpus.report for corpus in text.values()], train=train, validation=validation,
      heldout=heldout, tokenizer={"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                                  "eot_id": tokenizer.eot_id, "fingerprint": tokenizer.fingerprint})
  write_json(directory / MANIFEST, dataclasses.asdict(manifest))


@contextlib.contextmanager
def _exclusive(directory: pathlib.Path) -> Iterator[None]:
  """Holds the directory's lock, which the system frees when the process ends, however it ends."""
  if (directory / MANIFEST).exists():  # finished: nothing will be written, and the directory may be read-only
    yield
    return
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)
  except OSError as error:
    raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
  try:
    _take(lock, directory)
    yield
  finally:
    os.close(lock)


def _take(lock: int, directory: pathlib.Path) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(f"{directory} is being prepared by another process: wait for it, or name another") from error


def _open_sources(config: DataConfig) -> tuple[dict[str, TextCorpus], dict[str, ReadyTokens]]:
  """Text sources (those behind ``recall:`` too) and ready token sources, each once, by name."""
  if len(set(config.sources)) < len(config.sources):
    raise UserError(f"config.data.sources={tuple(config.sources)!r}: each source may be listed once")
  text, ready = {}, {}
  for source in config.sources:
    kind, rest = sources.split_source(source)
    if kind == "bin":
      ready[source] = ReadyTokens(source, rest)
      continue
    base = rest if kind == "recall" else source
    if base not in text:
      text[base] = TextCorpus(base, sources.list_files(base))
  return text, ready


def _begin(directory: pathlib.Path, settings: dict[str, Any], corpora: Iterable[TextCorpus]) -> None:
  """Records what is being prepared; a directory begun with other options or other text is refused."""
  digest = hashlib.sha256()
  for corpus in corpora:
    for entry in corpus.entries:
      digest.update(entry.digest + entry.size.to_bytes(8, "little"))
  begun = {"settings": settings, "corpus": digest.hexdigest()}
  path = directory / _BEGUN
  if not path.exists():
    write_json(path, begun)
    return
  stored = read_json(path)
  check_settings(stored["settings"], settings, directory)
  if stored["corpus"] != begun["corpus"]:
    raise UserError(f"the text of the sources changed since {directory} was begun: remove it to start again")


# --- Tokenizer --------------------------------------------------------------------------------------------------------


def _settle_tokenizer(tokenizer: Tokenizer | None, config: DataConfig, corpora: Iterable[TextCorpus],
                      path: pathlib.Path) -> Tokenizer:
  """The given tokenizer or one trained on the training text, stored at `path`; one stored there already is taken."""
  if path.exists():
    return tokenizers.load_tokenizer(str(path))
  if tokenizer is None:
    texts = _sample_texts(list(corpora), config.tokenizer_train_mib << 20)
    tokenizer = tokenizers.train_sentencepiece(texts, config.tokenizer_vocab_size)
  write_json(path, tokenizer.to_dict())
  return tokenizer


def _sample_texts(corpora: Sequence[TextCorpus], size: int) -> Iterator[str]:
  """About `size` bytes of training text, evenly from every source."""
  for corpus in corpora:
    for _, text in corpus.read(sorted(corpus.sample(size / len(corpora)))):
      yield text


def _recall_reach(config: DataConfig, corpora: Iterable[TextCorpus], tokenizer: Tokenizer) -> int:
  """Characters of text that the training length holds, measured on a sample; 0 where no recall material is asked."""
  if not any(source.startswith("recall:") for source in config.sources):
    return 0
  texts = list(_sample_texts(list(corpora), 1 << 20))
  return config.sequence_length * sum(map(len, texts)) // sum(len(tokenizer.encode(text)) for text in texts)


# --- Shards -----------------------------------------------------------------------------------------------------------


class _Encoder:
  """Makes tokens of documents; lives in the worker processes.

  A document comes as its parts: one text, or the texts a recall document is made of. It goes as its tokens, end-of-text
  last, and the number of parts dropped as near duplicates of evaluation documents.
  """

  def __init__(self, tokenizer: Tokenizer, lines: EvaluationLines, reach: int):
    self._tokenizer = tokenizer
    self._lines = lines
    self._reach = reach
    self._dtype = token_dtype(tokenizer.vocab_size)

  def __call__(self, batch: list[_Parts]) -> list[tuple[np.ndarray, int]]:
    return [self._encode(*document) for document in batch]

  def _encode(self, kind: str, parts: list[str], digest: bytes) -> tuple[np.ndarray, int]:
    kept = parts if kind == "evaluation" else [part for part in parts if not self._lines.cover(part)]
    text = "\n".join(kept)
    if kind == "recall" and kept:
      text = needles.recall_document(text, reach=self._reach, rng=np.random.default_rng(list(digest)))
    tokens = np.append(self._tokenizer.encode(text), self._tokenizer.eot_id) if kept else np.zeros(0)
    return tokens.astype(self._dtype), len(parts) - len(kept)


def _recall_groups(entries: Sequence[Entry], size: int) -> list[list[Entry]]:
  """Consecutive documents in groups of at least `size` bytes; what is left over at the end makes a smaller group."""
  groups, filled = [], size
  for entry in entries:
    if filled >= size:
      groups.append([])
      filled = 0
    groups[-1].append(entry)
    filled += entry.size
  return groups


def _batches(corpus: TextCorpus, groups: Sequence[list[Entry]], kind: str) -> Iterator[list[_Parts]]:
  """Documents with their text, in batches of about `_BATCH_BYTES`."""
  texts = corpus.read([entry for group in groups for entry in group])
  batch, size = [], 0
  for group in groups:
    batch.append((kind, [next(texts)[1] for _ in group], group[0].digest))
    size += _size([group])
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _write_source(config: DataConfig, directory: pathlib.Path, index: int, text: dict[str, TextCorpus], reach: int,
                  pool: Pool, tokenizer: Tokenizer, progress: bool) -> dict[str, Any]:
  """Tokenises source `index`, or what a former run left of it; returns its entry of the manifest."""
  source = config.sources[index]
  kind, rest = sources.split_source(source)
  corpus = text[rest if kind == "recall" else source]
  groups = [[entry] for entry in corpus.entries]
  if kind == "recall":
    groups = _recall_groups(corpus.entries, _RECALL_LENGTHS * reach)
    groups = groups[::-(-_size(groups) // (config.recall_max_mib << 20))]  # spread evenly over the source
  folder = directory / "train" / f"{index}-{re.sub('[^A-Za-z0-9]+', '-', source).strip('-')[:48]}"
  with progress_bar(_size(groups), "B", description=f"tokenise {source}", enabled=progress) as bar:
    shards = _write_shards(folder, corpus, groups, kind, pool, token_dtype(tokenizer.vocab_size), config.shard_tokens,
                           bar)
  totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "near_duplicates")}
  if not totals["tokens"]:
    raise UserError(f"config.data.sources: {source!r} has nothing to train on beside evaluation documents and their "
                    "near duplicates")
  paths = [str((folder / _shard_name(number)).relative_to(directory)) for number in range(len(shards))]
  return {"source": source, "shards": [{"path": p, "tokens": s["tokens"]} for p, s in zip(paths, shards)], **totals}


def _write_shards(folder: pathlib.Path, corpus: TextCorpus, groups: Sequence[list[Entry]], kind: str, pool: Pool,
                  dtype: np.dtype, shard_tokens: int, bar: tqdm) -> list[dict[str, int]]:
  """Writes documents to shards of at least `shard_tokens` (the last may be smaller), from where a former run ended.

  Returns tokens, documents and near duplicates dropped, one a shard.
  """
  path = folder / _PROGRESS
  shards = read_json(path) if path.exists() else []
  done = sum(shard["documents"] for shard in shards)
  bar.update(_size(groups[:done]))
  parts, tokens, dropped, first = [], 0, 0, done
  for result in pool.map(_batches(corpus, groups[done:], kind)):
    for document, near_duplicates in result:
      parts.append(document)
      tokens += len(document)
      dropped += near_duplicates
      bar.update(_size([groups[done]]))
      done += 1
      if tokens >= shard_tokens or done == len(groups):
        write_shard(folder / _shard_name(len(shards)), parts, dtype)
        shards.append({"tokens": tokens, "documents": done - first, "near_duplicates": dropped})
        write_json(path, shards)
        parts, tokens, dropped, first = [], 0, 0, done
  return shards


def _size(groups: Iterable[Iterable[Entry]]) -> int:
  return sum(entry.size for group in groups for entry in group)


def _shard_name(index: int) -> str:
  return f"{index:05d}.bin"


def _write_evaluation(directory: pathlib.Path, name: str, documents: Sequence[EvaluationDocument], pool: Pool,
                      tokenizer: Tokenizer) -> dict[str, Any]:
  """Writes evaluation documents, longest first, to one shard; returns their entry of the manifest."""
  texts = [document for document in documents if document.text is not None]
  encoded = pool.map([("evaluation", [document.text], b"")] for document in texts)
  for document, [(tokens, _)] in zip(texts, encoded):
    document.tokens = tokens[:-1]
  ordered = sorted(documents, key=lambda document: (-len(document.tokens), document.name))
  end = np.array([tokenizer.eot_id])
  path = directory / name / _shard_name(0)
  total = write_shard(path, [part for document in ordered for part in (document.tokens, end)],
                      token_dtype(tokenizer.vocab_size))
  index, start = [], 0
  for document in ordered:
    index.append({"source": document.source, "name": document.name, "start": start, "tokens": len(document.tokens)})
    start += len(document.tokens) + 1
  return {"shards": [{"path": str(path.relative_to(directory)), "tokens": total}], "tokens": total, "documents": index}

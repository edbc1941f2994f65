"""The record of a prepared directory: what is in it, and the options that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from atma_jax.config import DataConfig
from atma_jax.data import sources
from atma_jax.data.files import read_json
from atma_jax.data.shards import Shard, TokenStream, open_shard
from atma_jax.data.tokenizers import Tokenizer, load_tokenizer
from atma_jax.errors import UserError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_VERSION = 1
_DECISIVE = ("sources", "tokenizer", "max_mib", "validation_documents", "heldout_documents", "shard_tokens")


@dataclasses.dataclass
class Manifest:
  """Contents of a prepared directory, JSON-ready.

  Attributes:
    settings: the options of `DataConfig` that decide the contents.
    tokenizer: kind, vocab_size, eot_id and fingerprint.
    scanned: one a text source: files, distinct documents, bytes, and what was left out (duplicates; unreadable, with
      the first problems; skipped: empty, or generated and data-like code).
    train: one a source, in the order of ``config.data.sources``: shards, tokens, documents, near_duplicates (dropped).
    validation, heldout: shards, tokens and documents (source, name, start, tokens).
  """

  settings: dict[str, Any]
  tokenizer: dict[str, Any]
  scanned: list[dict[str, Any]]
  train: list[dict[str, Any]]
  validation: dict[str, Any]
  heldout: dict[str, Any]
  version: int = _VERSION

  @property
  def fingerprint(self) -> str:
    """sha256 of the contents."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def settings_of(config: DataConfig) -> dict[str, Any]:
  """The options that decide what a prepared directory contains, as JSON gives them back."""
  names = _DECISIVE
  if config.tokenizer == "sentencepiece":
    names += ("tokenizer_vocab_size", "tokenizer_train_mib")
  if any(sources.split_source(source)[0] == "recall" for source in config.sources):
    names += ("recall_max_mib", "sequence_length")  # how much of it, and its longest gap
  return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def check_settings(stored: dict[str, Any], settings: dict[str, Any], directory: pathlib.Path) -> None:
  """Raises `UserError` naming the first option in which `stored` differs from `settings`."""
  for name in sorted(stored.keys() | settings.keys()):
    if name not in stored or name not in settings or stored[name] != settings[name]:
      was, now = (repr(values[name]) if name in values else "not used" for values in (stored, settings))
      raise UserError(f"{directory} was prepared with config.data.{name} {was}, now it is {now}: name another "
                      "directory or remove this one")


def load_manifest(directory: pathlib.Path) -> Manifest:
  """Reads the manifest; a directory without a finished one raises `UserError`."""
  path = pathlib.Path(directory) / MANIFEST
  if not path.exists():
    raise UserError(f"{directory} holds no prepared data ({MANIFEST} is missing): run python -m atma_jax.prepare_data "
                    f"--config=RECIPE --directory={directory}")
  values = read_json(path)
  fields = {field.name for field in dataclasses.fields(Manifest)}
  if not isinstance(values, dict) or values.keys() != fields or values["version"] != _VERSION:
    raise UserError(f"{path} is not a version {_VERSION} manifest: prepare the data again")
  return Manifest(**values)


def load_prepared_tokenizer(directory: pathlib.Path, manifest: Manifest) -> Tokenizer:
  """The tokenizer of a prepared directory; one that was exchanged since raises `UserError`."""
  path = pathlib.Path(directory) / TOKENIZER
  tokenizer = load_tokenizer(str(path))
  if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
    raise UserError(f"{path} is not the tokenizer that {MANIFEST} records: prepare the data again")
  return tokenizer


def open_stream(directory: pathlib.Path, record: dict[str, Any]) -> TokenStream:
  """Token stream of one record of the manifest. A missing or changed shard raises `UserError`."""
  opened = []
  for entry in record["shards"]:
    shard = open_shard(pathlib.Path(directory) / entry["path"])
    if shard.tokens < entry["tokens"]:
      raise UserError(f"{shard.path} holds {shard.tokens} tokens where {MANIFEST} records {entry['tokens']}")
    opened.append(Shard(shard.path, entry["tokens"], shard.dtype))
  return TokenStream(opened)

"""The record of a prepared directory: what is in it, and the options that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from atma_jax.config import DataConfig
from atma_jax.data.files import read_json
from atma_jax.data.shards import Shard, TokenStream, open_shard
from atma_jax.data.sources import parse_source
from atma_jax.data.tokenizers import Tokenizer, load_tokenizer
from atma_jax.errors import UserError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_VERSION = 1
_DECISIVE = ("sources", "tokenizer", "max_mib", "validation_documents", "heldout_documents", "shard_tokens")


@dataclasses.dataclass
class Manifest:
  """What a prepared directory holds, as JSON stores it.

  Attributes:
    settings: the options of `DataConfig` that decide the contents.
    tokenizer: kind, vocab_size, eot_id and fingerprint.
    scanned: for every text source its files, distinct documents and bytes, and what was left out: duplicates, unreadable
      documents (with the first problems), and skipped ones, which are empty or generated and data-like code.
    train: for every source, in the order of ``config.data.sources``, its shards, tokens, documents and dropped near_duplicates.
    validation: shards, tokens and documents (source, name, start, tokens).
    heldout: the same for the held-out documents.
    version: of this format.
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
    """sha256 of the manifest."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def settings_of(config: DataConfig) -> dict[str, Any]:
  """Returns the options that decide what a prepared directory contains, as JSON gives them back."""
  names = _DECISIVE
  if config.tokenizer == "sentencepiece":
    names += ("tokenizer_vocab_size", "tokenizer_train_mib")
  for source in map(parse_source, config.sources):
    names += source.settings + source.base.settings
  return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def check_settings(stored: dict[str, Any], settings: dict[str, Any], directory: pathlib.Path) -> None:
  """Raises a `UserError` that names the first option in which `stored` differs from `settings`."""
  for name in sorted(stored.keys() | settings.keys()):
    if name not in stored or name not in settings or stored[name] != settings[name]:
      was, now = (repr(values[name]) if name in values else "not used" for values in (stored, settings))
      raise UserError(f"{directory} was prepared with config.data.{name} {was}, now it is {now}: name another "
                      "directory or remove this one")


def load_manifest(directory: pathlib.Path) -> Manifest:
  """Reads the manifest. Raises `UserError` if the directory holds none, because it was never finished."""
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
  """Loads the tokenizer of a prepared directory. Raises `UserError` if it is not the one that the manifest records."""
  path = pathlib.Path(directory) / TOKENIZER
  tokenizer = load_tokenizer(str(path))
  if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
    raise UserError(f"{path} is not the tokenizer that {MANIFEST} records: prepare the data again")
  return tokenizer


def open_stream(directory: pathlib.Path, record: dict[str, Any]) -> TokenStream:
  """Opens the shards of one record of the manifest as a stream. Raises `UserError` for a missing or changed shard."""
  opened = []
  for entry in record["shards"]:
    shard = open_shard(pathlib.Path(directory) / entry["path"])
    if shard.tokens < entry["tokens"]:
      raise UserError(f"{shard.path} holds {shard.tokens} tokens where {MANIFEST} records {entry['tokens']}")
    opened.append(Shard(shard.path, entry["tokens"], shard.dtype))
  return TokenStream(opened)

"""The record of a prepared directory: what is in it, the options that made it, and digests of it all.

The manifest holds a digest of itself and of every token shard. The first version, which is still read, had none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging

from atma_jax.config import DataConfig, within
from atma_jax.data.files import write_json
from atma_jax.data.shards import Shard, TokenStream, open_shard
from atma_jax.data.sources import parse_source
from atma_jax.data.tokenizers import Tokenizer, load_tokenizer
from atma_jax.errors import UserError, described
from atma_jax.json_input import json_digest, mismatch, read_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_VERSION = 2
_DECISIVE = ("sources", "tokenizer", "max_mib", "validation_documents", "heldout_documents", "shard_tokens")


@dataclasses.dataclass
class Manifest:
  """What a prepared directory holds, as JSON stores it.

  Attributes:
    settings: the options of `DataConfig` that decide the contents.
    tokenizer: kind, vocab_size, eot_id and fingerprint.
    scanned: for every text source its files, distinct documents and bytes, and what was left out: duplicates, unreadable
      documents (with the first problems), and skipped ones, which are empty or generated and data-like code.
    train: for every source, in the order of ``config.data.sources``, its shards (path, tokens, sha256 of the file), tokens,
      documents and dropped near_duplicates.
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
    """sha256 of the manifest, and so of the tokens."""
    return json_digest(dataclasses.asdict(self))

  @property
  def fingerprints(self) -> set[str]:
    """`fingerprint`, and what the first version would have called it: that of the manifest without digests."""
    values: dict[str, Any] = dataclasses.asdict(self) | {"version": 1}
    for record in (*values["train"], values["validation"], values["heldout"]):
      for shard in record["shards"]:
        shard.pop("sha256", None)
    return {self.fingerprint, json_digest(values)}


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


def write_manifest(directory: pathlib.Path, manifest: Manifest) -> None:
  """Writes the manifest with a digest of itself, which completes a prepared directory."""
  values = dataclasses.asdict(manifest)
  write_json(pathlib.Path(directory) / MANIFEST, values | {"digest": json_digest(values)})


def load_manifest(directory: pathlib.Path) -> Manifest:
  """Reads the manifest.

  Raises:
    UserError: the directory holds none, because it was never finished; or it is damaged.
  """
  path = pathlib.Path(directory) / MANIFEST
  if not path.exists():
    raise UserError(f"{directory} holds no prepared data ({MANIFEST} is missing): run python -m atma_jax.prepare_data "
                    f"--config=RECIPE --directory={directory}")
  values = read_json(path)
  fields = {field.name for field in dataclasses.fields(Manifest)}
  digest = values.pop("digest", None) if isinstance(values, dict) else None
  if not isinstance(values, dict) or values.keys() != fields or values["version"] not in (1, _VERSION):
    raise UserError(f"{path} is not a manifest of version 1 or {_VERSION}: prepare the data again")
  if values["version"] == 1:
    _say_once(path)
  elif digest != json_digest(values):
    raise UserError(f"{path} is damaged, its digest differs: prepare the data again")
  problem = _problem(values)
  if problem:
    raise UserError(f"{path} is damaged, {problem}: prepare the data again")
  return Manifest(**values)


@functools.cache
def _say_once(path: pathlib.Path) -> None:
  logging.warning("%s is of the first version, without digests of the token shards: their content is not checked", path)


COUNT = within(0, 2**62)
_SHARDS = [{"path": str, "tokens": COUNT, "sha256?": str}]
_DOCUMENTS = [{"source": str, "name": str, "start": COUNT, "tokens": COUNT}]
_SCHEMA: dict[str, Any] = {
  "settings": {}, "tokenizer": {"kind": str, "vocab_size": COUNT, "eot_id": COUNT, "fingerprint": str},
  "scanned": [{"source": str, **dict.fromkeys(("documents", "bytes", "duplicates", "skipped", "unreadable"), COUNT)}],
  "train": [{"source": str, "shards": _SHARDS, "tokens": COUNT, "documents": (COUNT, None), "near_duplicates": COUNT}],
  "validation": {"shards": _SHARDS, "tokens": COUNT, "documents": _DOCUMENTS},
  "heldout": {"shards": _SHARDS, "tokens": COUNT, "documents": _DOCUMENTS}}


def _problem(values: Any) -> str:
  """What is wrong with the content of a manifest, or ""."""
  problem = mismatch(values, _SCHEMA)
  if problem:
    return problem
  if not values["train"]:
    return "it names no source"
  for name in ("validation", "heldout"):
    record = values[name]
    if any(document["start"] + document["tokens"] > record["tokens"] for document in record["documents"]):
      return f"{name} has documents past its {record['tokens']} tokens"
  for record in (*values["train"], values["validation"], values["heldout"]):
    if sum(shard["tokens"] for shard in record["shards"]) != record["tokens"]:
      return f"shards hold other numbers of tokens than the {record['tokens']} recorded"
  return ""


def load_prepared_tokenizer(directory: pathlib.Path, manifest: Manifest) -> Tokenizer:
  """Loads the tokenizer of a prepared directory. Raises `UserError` if it is not the one that the manifest records."""
  path = pathlib.Path(directory) / TOKENIZER
  try:
    tokenizer = load_tokenizer(str(path))
  except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:  # of a library, from a damaged file
    raise UserError(f"{path} is damaged: {described(error)}") from error
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
    opened.append(Shard(shard.path, entry["tokens"], shard.dtype, entry.get("sha256")))
  return TokenStream(opened)


def verify(directory: pathlib.Path, manifest: Manifest) -> tuple[int, int, int]:
  """Checks the tokenizer and every shard of a prepared directory against the manifest.

  Returns:
    The number of shards, of bytes read, and of shards without a digest, of which only the size is checked.

  Raises:
    UserError: something is missing or damaged; the message names all such shards.
  """
  load_prepared_tokenizer(directory, manifest)
  problems, shards, count, bare = [], 0, 0, 0
  for record in (*manifest.train, manifest.validation, manifest.heldout):
    for entry in record["shards"]:
      shards += 1
      bare += "sha256" not in entry
      try:
        for shard in open_stream(directory, {"shards": [entry]}).shards:
          count += shard.check()
      except UserError as error:
        problems.append(str(error))
  if problems:
    raise UserError(f"{len(problems)} of {shards} shards are damaged: {'; '.join(problems)}")
  return shards, count, bare

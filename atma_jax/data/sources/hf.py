"""The ``hf:DATASET[:CONFIG][:SPLIT]`` source: a dataset of the Hugging Face hub, read from there as it is needed.

    hf:HuggingFaceFW/fineweb-edu:sample-10BT        the split "train" of a configuration
    hf:OWNER/NAME@REVISION::validation              a split of the only or default configuration, at a revision
    hf:OWNER/NAME?column=content                    where the text is not in the column "text"

The hub says which files belong to a configuration: the dataset's card, or else the names of files and folders. Of Parquet files
only the column of the text is fetched, one row group at a time, by all worker processes. The revision is looked up once, so
that it does not matter if the dataset changes meanwhile. Private and gated datasets need a token (``hf auth login``, or
HF_TOKEN); HF_ENDPOINT names another hub.
"""

from __future__ import annotations

from collections.abc import Iterable
import concurrent.futures
import dataclasses
import re
from typing import Any
import urllib.parse

import fsspec.utils
import huggingface_hub
import pyarrow

from atma_jax.data.documents import SourceFile, parquet_metadata
from atma_jax.data.remote import FIRST_ATTEMPTS, hub_address, retried
from atma_jax.data.source import TextSource
from atma_jax.errors import UserError

_NAME = r"[A-Za-z0-9][\w.-]*"
_ARGUMENT = re.compile(rf"(?P<dataset>{_NAME}(/{_NAME})?)(@(?P<revision>[\w./-]+))?(:(?P<config>[^:?]*))?(:(?P<split>[^:?]*))?"
                       r"(\?(?P<options>.*))?")
_FORMATS = re.compile(r"\.(parquet|(jsonl|txt)(\.gz|\.zst)?)$")
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
           "test": ("test", "testing", "eval")}
_MARGIN = 1.25  # what is scanned where text is limited, for evaluation documents and repetitions
_CONNECTIONS = 16  # at which the descriptions of Parquet files are fetched


class HubSource(TextSource):
  """Documents of a dataset on the hub, in files of Parquet, JSON lines or text."""

  prefix = "hf"
  syntax = "hf:DATASET[:CONFIG][:SPLIT]"
  help = "a dataset of the Hugging Face hub; ?column=NAME if its text is not in the column text"

  def __post_init__(self) -> None:
    match = _ARGUMENT.fullmatch(self.argument)
    if match is None:
      raise ValueError(f"must be written {self.syntax}, such as hf:HuggingFaceFW/fineweb-edu:sample-10BT")
    options = urllib.parse.parse_qsl(match["options"] or "", keep_blank_values=True)
    if match["options"] is not None and [(name, bool(value)) for name, value in options] != [("column", True)]:
      raise ValueError(f"has the option ?{match['options']}; legal: ?column=NAME")

  @property
  def is_pattern(self) -> bool:
    return False

  def files(self) -> list[SourceFile]:
    match = _ARGUMENT.fullmatch(self.argument)
    assert match is not None  # checked when the source was made
    dataset, split = match["dataset"], match["split"] or "train"
    info = self._ask(dataset, match["revision"])
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    configs = _configurations(info.card_data)
    if configs:
      config = _default(configs) if not match["config"] else match["config"]
      if config not in configs:
        raise self._error(f"configuration {config!r}" if config else "a configuration", configs)
      splits = {name: [path for path in sizes if re.fullmatch(pattern, path)]
                for name, pattern in configs[config].items()}
    else:
      splits = _by_names(sizes, match["config"] or "")
    if not splits.get(split):
      raise self._error(f"files of split {split!r}", [name for name, paths in splits.items() if paths])
    paths = sorted(path for path in splits[split] if _FORMATS.search(path))
    if not paths:
      raise self._error("files that can be read", ["files of .parquet, .jsonl or .txt"], f"not {splits[split][0]}")
    column = dict(urllib.parse.parse_qsl(match["options"] or "")).get("column", "text")
    address = f"{hub_address()}/datasets/{dataset}/resolve/{info.sha}"
    name = f"{dataset}@{str(info.sha)[:12]}"
    return [SourceFile(f"{address}/{urllib.parse.quote(path)}", f"{name}/{path}", sizes[path], column=column) for path in paths]

  def choose(self, files: list[SourceFile], most_bytes: int | None) -> list[SourceFile]:
    """Cuts Parquet files into row groups, and stops when these hold the text asked for and something to choose from."""
    chosen, total = [], 0
    with concurrent.futures.ThreadPoolExecutor(_CONNECTIONS) as pool:
      for first in range(0, len(files), _CONNECTIONS):
        for part in (part for parts in pool.map(self._row_groups, files[first:first + _CONNECTIONS]) for part in parts):
          if most_bytes is not None and total >= _MARGIN * most_bytes:
            return chosen
          chosen.append(part)
          total += part.size
    return chosen

  def _row_groups(self, file: SourceFile) -> list[SourceFile]:
    """The row groups of a Parquet file, and any other file as it is."""
    if not file.path.endswith(".parquet"):
      return [file]
    try:
      metadata = parquet_metadata(file.path, file.remote_size)
    except pyarrow.ArrowException as error:
      raise UserError(f"{self.label}: {file.name} is no Parquet file: {' '.join(str(error).split())[:200]}") from error
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if file.column not in columns:
      raise UserError(f"{self.label}: {file.name} has no column {file.column!r} of text; its columns: {', '.join(columns)}")
    index = columns.index(file.column)
    return [dataclasses.replace(file, name=f"{file.name}#{group}", row_group=group,
                                group_size=metadata.row_group(group).column(index).total_uncompressed_size)
            for group in range(metadata.num_row_groups)]

  def _ask(self, dataset: str, revision: str | None) -> huggingface_hub.DatasetInfo:
    """What the hub says about the dataset: its card, its revision, its files and their sizes."""
    hub = huggingface_hub.HfApi(endpoint=hub_address())
    try:
      return retried(lambda: hub.dataset_info(dataset, revision=revision, files_metadata=True), self.label,
                     attempts=FIRST_ATTEMPTS)
    except FileNotFoundError as error:
      raise UserError(f"{self.label}: {hub_address()} has no dataset {dataset!r}" + (f" at {revision!r}" if revision else "")
                      + ", or it needs a token (hf auth login, or HF_TOKEN)") from error

  def _error(self, missing: str, legal: Iterable[str], but: str = "") -> UserError:
    found = ", ".join(sorted(legal))[:500]
    return UserError(f"{self.label}: the dataset has no {missing}{', ' + but if but else ''}; legal: {found}")


def _configurations(card: Any) -> dict[str, dict[str, str]]:
  """For every configuration that a dataset's card describes, a regular expression of the files of each split."""
  found: dict[str, dict[str, str]] = {}
  entries = (card or {}).get("configs") or []
  for entry in entries if isinstance(entries, list) else []:
    if not isinstance(entry, dict) or "data_files" not in entry:
      continue
    files = entry["data_files"]
    if isinstance(files, dict):
      files = [{"split": split, "path": path} for split, path in files.items()]
    elif isinstance(files, str) or not all(isinstance(item, dict) for item in files):
      files = [{"split": "train", "path": files}]
    folder = str(entry.get("data_dir") or "").strip("/")
    splits: dict[str, str] = {}
    for item in files:
      patterns = item.get("path") or []
      patterns = [patterns] if isinstance(patterns, str) else map(str, patterns)
      patterns = [f"{folder}/{pattern}" if folder else pattern.removeprefix("./") for pattern in patterns]
      splits[str(item.get("split", "train"))] = "|".join(map(fsspec.utils.glob_translate, patterns))
    found[str(entry.get("config_name", "default"))] = splits
    if entry.get("default") is True:
      found = {str(entry.get("config_name", "default")): splits, **found}
      found.setdefault("default", splits)
  return found


def _default(configs: dict[str, Any]) -> str:
  """The configuration taken where none is named: the default one or the only one; "" if there is no such."""
  return "default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else ""


def _by_names(paths: Iterable[str], config: str) -> dict[str, list[str]]:
  """Sorts the files of a dataset whose card says nothing into splits, by the words in their names and folders.

  Args:
    paths: of all files.
    config: a folder that the files are in; "" is any.
  """
  readable = [path for path in paths if _FORMATS.search(path) and (not config or config in path.split("/")[:-1])]
  formats = [path for path in readable if path.endswith(".parquet")] or readable
  found: dict[str, list[str]] = {}
  for path in formats:
    words = set(re.split(r"[^a-z]+", path.lower()))
    split = next((split for split, names in _SPLITS.items() if words.intersection(names)), "")
    found.setdefault(split, []).append(path)
  if list(found) == [""]:
    return {"train": found[""]}  # no name says anything
  return found


SOURCE = HubSource

"""Prepares training data: trains or loads the tokenizer, splits by document, writes token shards.

    python -m atma_jax.prepare_data --config=quickstart --directory=DIR

Works in parallel processes and shows progress bars. If it is killed at any moment and started again, it continues after the last
whole shard and ends with the same bytes. A finished directory is only described; ``--verify`` compares it with the digests in its
manifest.
"""

from __future__ import annotations

import pathlib
import time
from typing import TYPE_CHECKING

from absl import flags

from atma_jax import cli
from atma_jax.data.process_pool import MOST_WORKERS
from atma_jax.errors import UserError

if TYPE_CHECKING:
  from atma_jax.data.manifest import Manifest

_CONFIG = cli.define_config_flag()
_DIRECTORY = flags.DEFINE_string("directory", None, "Folder to write; default is config.data.directory.")
_WORKERS = flags.DEFINE_integer("workers", None, f"Processes; default is one per core, at most {MOST_WORKERS}.",
                                lower_bound=1)
_VERIFY = flags.DEFINE_bool("verify", False, "Only compare what the directory holds with the digests in its manifest.")


def main() -> None:
  """Writes the tokenizer and the shards, or continues where it was stopped. Raises `UserError` on bad flags and sources."""
  config = _CONFIG.value
  directory = _DIRECTORY.value or config.data.directory
  if not directory:
    raise UserError("--directory is missing (and config.data.directory is empty): name the folder to write")
  if _VERIFY.value:
    print(verification(pathlib.Path(directory)))
    return
  from atma_jax.data.prepare import prepare  # only now, because a mistyped flag should be answered at once
  print(describe(prepare(config.data, directory, workers=_WORKERS.value)))
  print(f"prepared: {directory}")


def verification(directory: pathlib.Path) -> str:
  """Verifies a prepared directory and says how much was read. Raises `UserError` for anything missing or damaged."""
  from atma_jax.data.manifest import load_manifest, verify
  began = time.perf_counter()
  shards, size, bare = verify(directory, load_manifest(directory))
  seconds = time.perf_counter() - began
  unchecked = f"; {bare} shards have no digest, because an older version wrote them: only their size was checked" if bare else ""
  speed = f"{size / 1e6:,.1f} MB in {seconds:.1f} s, {size / seconds / 1e6:,.0f} MB/s"
  return f"verified: {shards} shards in {directory} ({speed}){unchecked}"


def describe(manifest: Manifest) -> str:
  """Returns what a prepared directory holds, as lines of text."""
  tokenizer = manifest.tokenizer
  lines = [f"tokenizer   {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens"]
  for scan in manifest.scanned:
    left_out = ", ".join(f"{scan[name]:,} {name}" for name in ("duplicates", "skipped", "unreadable") if scan[name])
    lines.append(f"scanned     {scan['source']}: {scan['documents']:,} documents, {scan['bytes'] / 2**20:.1f} MiB"
                 + (f" (left out: {left_out})" if left_out else ""))
  for record in manifest.train:
    documents = "" if record["documents"] is None else f", {record['documents']:,} documents"
    dropped = f" ({record['near_duplicates']:,} near duplicates dropped)" if record["near_duplicates"] else ""
    lines.append(f"train       {record['source']}: {record['tokens']:,} tokens{documents}{dropped}")
  for name in ("validation", "heldout"):
    record = getattr(manifest, name)
    lines.append(f"{name:<11} {record['tokens']:,} tokens, {len(record['documents']):,} documents")
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run(main)

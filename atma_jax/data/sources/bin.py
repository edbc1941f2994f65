"""The ``bin:GLOB`` source: token shards that exist already."""

from __future__ import annotations

from atma_jax.data.documents import SourceFile
from atma_jax.data.remote import check_scheme, is_remote_path
from atma_jax.data.source import TokenSource


class ShardSource(TokenSource):
  """Token shards used as they are, such as those of the nanoGPT speed runs; those behind an address are fetched first."""

  prefix = "bin"
  syntax = "bin:GLOB"
  help = "token shards, used as they are; also gs://, s3:// and https://"

  def __post_init__(self) -> None:
    if is_remote_path(self.argument):
      check_scheme(self.argument)

  def shards(self) -> list[str]:
    return self.glob()

  def remote_shards(self) -> list[SourceFile]:
    return self.find() if is_remote_path(self.argument) else []


SOURCE = ShardSource

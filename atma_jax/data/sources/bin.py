"""The ``bin:GLOB`` source: token shards that exist already."""

from __future__ import annotations

from atma_jax.data.source import TokenSource


class ShardSource(TokenSource):
  """Token shards used as they are, such as those of the nanoGPT speed runs."""

  prefix = "bin"
  syntax = "bin:GLOB"
  help = "token shards, used as they are"

  def shards(self) -> list[str]:
    return self.glob()


SOURCE = ShardSource

"""Global batches, put together from the rows that each process reads for its own devices."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Int
import numpy as np

from atma_jax.config import Config, check_context_divides
from atma_jax.errors import UserError
from atma_jax.sharding import named_sharding


def check_divides(config: Config, mesh: Mapping[str, int]) -> None:
  """Checks that microbatches divide over the batch axes of the mesh, and sequences over its context axis.

  Args:
    config: a validated recipe.
    mesh: the size of every mesh axis.

  Raises:
    UserError: one of them does not; the message names the numbers.
  """
  rows = mesh["data"] * mesh["fsdp"]
  microbatch = config.data.batch_size // config.train.accumulation
  if microbatch % rows:
    raise UserError(f"config.data.batch_size={config.data.batch_size}: a microbatch of {microbatch} sequences must be a "
                    f"multiple of mesh data*fsdp={rows}")
  check_context_divides("config.data.sequence_length", config.data.sequence_length, mesh["context"])


class GlobalBatches:
  """Places the rows that this process reads in global arrays of (batch_size, sequence_length + 1) tokens.

  The batch axis is split into `part_count` parts of equal size; this process reads `parts`, those its devices hold.
  """

  def __init__(self, config: Config, mesh: jax.sharding.Mesh):
    self.sharding = named_sharding(mesh, ("batch", None))
    self.part_count = mesh.shape["data"] * mesh.shape["fsdp"]
    self.shape = (config.data.batch_size, config.data.sequence_length + 1)
    self._rows = config.data.batch_size // self.part_count
    indices = self.sharding.addressable_devices_indices_map(self.shape).values()
    self.parts = sorted({(index[0].start or 0) // self._rows for index in indices if index is not None})

  def place(self, tokens: Int[np.ndarray, "rows T+1"]) -> Int[Array, "B T+1"]:
    """The global array, of which `tokens` are the rows of `parts`, one part after the other."""
    def local(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None, "the sharding splits an array of two axes"
      start = self.parts.index((index[0].start or 0) // self._rows) * self._rows
      return tokens[start : start + self._rows]

    return jax.make_array_from_callback(self.shape, self.sharding, local)

"""The flags by which processes find each other; JAX is imported when they are acted on, so that bad flags are answered before."""

from __future__ import annotations

import os

from absl import flags

from atma_jax.config import HEARTBEAT_SECONDS, WAYS_TO_JOIN

flags.disclaim_key_flags()  # --help lists the flags under the main that defines them


class DistributedFlags:
  """The five flags; `initialize` acts on them and must be called before anything touches a device."""

  def __init__(self) -> None:
    self._mode = flags.DEFINE_enum(
      "distributed", "auto", WAYS_TO_JOIN, "How processes find each other: from flags or environment, from Cloud TPU VM "
      "metadata, or not at all.")
    self._address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same in all processes.")
    self._count = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
    self._id = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
    self._heartbeat = flags.DEFINE_integer(
      "heartbeat_seconds", HEARTBEAT_SECONDS, "Seconds without a heartbeat after which a process counts as dead.", lower_bound=1)

  def initialize(self) -> None:
    """Calls `atma_jax.distributed.initialize` with the values of the flags."""
    from atma_jax.distributed import initialize
    initialize(self._mode.value, self._address.value, self._count.value, self._id.value, self._heartbeat.value)

  @property
  def processes(self) -> int:
    """How many processes flags or environment ask for, as far as they say; asks nobody."""
    from atma_jax.distributed import from_environment
    if self._count.value is not None or self._mode.value == "off":
      return self._count.value or 1
    found = from_environment(os.environ)
    return 1 if found is None else found.get("num_processes", 2)

  @property
  def first(self) -> bool:
    """Whether this is the process that prints and writes results."""
    import jax
    return jax.process_index() == 0

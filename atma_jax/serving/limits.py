"""What a server accepts: connections, lengths of queues and bodies, and times. Every field is a flag of ``serve``."""

from __future__ import annotations

import dataclasses
from typing import Any

from atma_jax.errors import UserError

MOST = 2**31 - 1  # of anything that is counted in int32
_DAY = 86400.0


def _limit(default: Any, least: float, most: float, help: str) -> Any:
  return dataclasses.field(default=default, metadata={"least": least, "most": most, "help": help})


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits of a server.

  Raises:
    UserError: a value is not legal.
  """

  queue: int = _limit(64, 0, 2**20, "Sequences that may wait beside those that decode; more are refused with 429.")
  request_timeout_s: float = _limit(600.0, 1e-3, 30 * _DAY, "Time from a request's arrival to the end of its answer, then 504.")
  body_mib: float = _limit(8.0, 1e-3, 1024, "Size of a request's body; larger ones are refused with 413.")
  grace_s: float = _limit(30.0, 0, _DAY, "Time that running requests have to finish after SIGTERM.")
  bodies_mib: float = _limit(64.0, 0, 2**20, "Size of all bodies that are not read to the end, beyond 64 KiB of each; then 429.")
  header_timeout_s: float = _limit(10.0, 0.1, _DAY, "Time to send a request's header, then 408.")
  body_timeout_s: float = _limit(30.0, 0.1, _DAY, "Time to send a request's body, then 408.")
  idle_timeout_s: float = _limit(5.0, 0.1, _DAY, "Time that a connection may stay open after an answer, without a new request.")
  connections: int = _limit(512, 1, 2**20, "Open connections; beyond them, those that wait for their client make room.")
  connections_per_address: int = _limit(256, 1, 2**20, "The same for the connections of one address.")

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, least, most = getattr(self, field.name), field.metadata["least"], field.metadata["most"]
      if not least <= value <= most:
        raise UserError(f"{field.name}={value}: must be from {least:g} to {most:.10g}")

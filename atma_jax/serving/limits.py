"""What a server accepts: lengths of queues and bodies, and times. Every field is a flag of ``serve``."""

from __future__ import annotations

import dataclasses
from typing import Any

from atma_jax.errors import UserError


def _limit(default: Any, least: float, help: str) -> Any:
  return dataclasses.field(default=default, metadata={"least": least, "help": help})


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits of a server.

  Raises:
    UserError: a value is not legal.
  """

  queue: int = _limit(64, 0, "Sequences that may wait beside those that decode; more are refused with 429.")
  request_timeout_s: float = _limit(600.0, 1e-3, "Time from a request's arrival to the end of its answer, then 504.")
  body_mib: float = _limit(8.0, 1e-3, "Size of a request's body; larger ones are refused with 413.")
  grace_s: float = _limit(30.0, 0, "Time that running requests have to finish after SIGTERM.")

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), field.metadata["least"]
      if not least <= value < float("inf"):
        raise UserError(f"{field.name}={value}: must be finite and at least {least:g}")

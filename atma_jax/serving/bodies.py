"""Bodies of requests: how they are read within limits, and how much a body holds before anything is made of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib

import numpy as np
from starlette.requests import Request

from atma_jax.serving.limits import Limits
from atma_jax.serving.protocol import ProtocolError

SMALL_BODY = 64 * 1024  # bytes of every body that do not count towards the limit of all


class BodyRoom:
  """The memory that unfinished bodies share. A small body always has room.

  Args:
    limits: of the server.

  Attributes:
    held: bytes that are held now, beyond `SMALL_BODY` of each body.
  """

  def __init__(self, limits: Limits):
    self._largest, self._room = int(limits.body_mib * 2**20), int(limits.bodies_mib * 2**20)
    self._timeout_s = limits.body_timeout_s
    self.held = 0

  @contextlib.asynccontextmanager
  async def body(self, request: Request) -> AsyncIterator[bytes]:
    """Reads a body and holds its room until the context ends.

    Raises:
      ProtocolError: it is too large or too slow, or there is no room for it now.
    """
    parts, held = bytearray(), 0
    try:
      self._refuse_length(request.headers.get("content-length", "0"))
      try:
        async with asyncio.timeout(self._timeout_s):
          async for part in request.stream():
            parts += part
            self._refuse_size(len(parts))
            more = max(len(parts) - SMALL_BODY, 0) - held
            if self.held + more > self._room:
              raise ProtocolError(429, "the bodies being read leave no room for this one; try again later", code="bodies_full")
            self.held, held = self.held + more, held + more
      except TimeoutError as error:
        raise ProtocolError(408, f"the body did not come within {self._timeout_s:g} s", code="timeout") from error
      body = bytes(parts)
      parts.clear()  # one copy is enough
      yield body
    finally:
      self.held -= held

  def _refuse_length(self, length: str) -> None:
    if not length.isdecimal():
      raise ProtocolError(400, f"Content-Length {length[:60]!r} is no number")
    self._refuse_size(int(length[:20]))

  def _refuse_size(self, size: int) -> None:
    if size > self._largest:
      raise ProtocolError(413, f"the body is larger than {self._largest} bytes", code="body_too_large")


def count_values(body: bytes) -> int:
  """Returns how many values a JSON text holds, or more, without making any of them.

  Every value but the first follows a comma, a colon or an opening bracket outside of strings. What is not JSON is counted as far
  as a parser would read it.
  """
  characters = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
  inside = np.logical_xor.accumulate(characters == ord('"'))
  return 1 + sum(int(np.count_nonzero((characters == ord(mark)) & ~inside)) for mark in ",[{:")

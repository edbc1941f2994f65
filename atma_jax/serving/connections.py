"""Connections of a server: how many there may be, how long each may take, and what happens when a client stops sending.

uvicorn limits neither the time of a header nor the number of connections of an address, and takes a client that has only
closed its sending side for one that has left. `Connections` knows what every connection waits for. Where there are too many,
the one that has waited longest for its client makes room. If all of them are being served, a few more are let in to ask for
``/health`` and ``/metrics`` alone.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from typing import Any

from absl import logging
import h11
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from atma_jax.errors import UserError
from atma_jax.serving.limits import Limits
from atma_jax.serving.protocol import ProtocolError, dumps

BACKLOG = 16  # connections that are accepted at once
UNSEEN = 4 * BACKLOG  # connections that may have been accepted before the first of them is looked at, or closed and not yet gone
RESERVE = 16  # connections beyond the limit, which may ask how the server is
SPARE_FILES = 16  # descriptors for everything else
LEAST_CONNECTIONS = 8
LINGER_S = 2.0  # time that a client has to send the rest of a body that is not wanted, so that it reads the answer
FLUSH_S = 30.0  # time that a client has to read the rest of an answer
SWEEP_S = 0.25
SLOWEST_PROBE_S = 5.0
OPEN_PATHS = ("/health", "/metrics")

# What a connection waits for. Only in the last state does it wait for the server.
HEADER, IDLE, BODY, UNWANTED, CLOSING, SERVED = "header", "idle", "body", "unwanted", "closing", "served"


class Connections:
  """All connections of a server.

  Args:
    limits: of the server. As many connections are open as the process may have descriptors for, if these are fewer.

  Attributes:
    most: connections that may be open, without those that are let in to ask how the server is.
    open: all connections, in the order of their arrival.
    refused: connections closed or turned away since the start, by reason.

  Raises:
    UserError: the process may have too few descriptors.
  """

  def __init__(self, limits: Limits):
    self.limits = limits
    room = _free_descriptors() - UNSEEN - RESERVE - SPARE_FILES
    if room < LEAST_CONNECTIONS:
      raise UserError(f"ulimit -n: leaves {max(room, 0)} connections; {LEAST_CONNECTIONS - room} more open files must be allowed")
    self.most = min(limits.connections, room)
    if self.most < limits.connections:
      logging.warning("connections=%d: only %d, because a process may open no more files here (ulimit -n)", limits.connections,
                      self.most)
    self.open: dict[Connection, None] = {}
    self.refused: dict[str, int] = {}

  def protocol(self) -> type[H11Protocol]:
    """Returns the class of connections that uvicorn makes."""
    table = self

    class TableConnection(Connection):
      connections_table = table

    return TableConnection

  def admit(self, new: Connection) -> None:
    """Takes in a new connection, for which another one may have to make room."""
    self._make_room(new)
    self.open[new] = None

  def sweep(self) -> None:
    """Ends connections whose client has taken too long. To be called every `SWEEP_S` seconds."""
    now = time.monotonic()
    for connection in list(self.open):
      connection.look(now)

  def count(self, reason: str) -> None:
    """Counts a connection that was closed or turned away."""
    self.refused[reason] = self.refused.get(reason, 0) + 1

  def _make_room(self, new: Connection) -> None:
    same = [c for c in self.open if c.address == new.address]
    full = (same, "address") if len(same) >= self.limits.connections_per_address else (
      (list(self.open), "all") if len(self.open) >= self.most else None)
    if full is None:
      return
    waiting = sorted((c for c in full[0] if c.state not in (SERVED, CLOSING)), key=lambda c: c.since)
    if waiting:
      waiting[0].end("evicted")
      return
    self.count(f"full_{full[1]}")
    new.only_open_paths = True
    if sum(c.only_open_paths for c in self.open) >= RESERVE:
      new.end("full_reserve")


class Connection(H11Protocol):
  """A connection that is held to the limits of its table."""

  connections_table: Connections

  def __init__(self, *arguments: Any, **options: Any):
    super().__init__(*arguments, **options)
    self.address = ""
    self.state, self.since = HEADER, time.monotonic()
    self.only_open_paths = False
    self._half_closed = False
    self._probe_at, self._probe_delay = 0.0, SWEEP_S
    self._whole_app, self.app = self.app, self._dispatch

  # --- What asyncio calls ---------------------------------------------------------------------------------------------

  def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
    super().connection_made(transport)
    self.address = self.client[0] if self.client else ""
    self.connections_table.admit(self)

  def connection_lost(self, exc: Exception | None) -> None:
    self.connections_table.open.pop(self, None)
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._follow(time.monotonic())

  def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
    """Keeps the connection for an answer that is on its way; the client has perhaps closed its sending side only.

    A client of HTTP/1.0 counts as gone, because what would tell it from one that is not there in the meantime, an interim
    answer, is not part of that protocol.
    """
    self._follow(time.monotonic())
    if self.state != SERVED or self.scope["http_version"] != "1.1":
      return False
    self._half_closed, self.cycle.keep_alive = True, False
    self._probe(time.monotonic())
    return True

  # --- What uvicorn calls ---------------------------------------------------------------------------------------------

  def on_response_complete(self) -> None:
    super().on_response_complete()
    self._follow(time.monotonic())

  def send_400_response(self, msg: str) -> None:
    self.connections_table.count("malformed")
    self._answer(ProtocolError(400, msg))

  # --- What the table calls -------------------------------------------------------------------------------------------

  def end(self, reason: str, error: ProtocolError | None = None) -> None:
    """Closes the connection, after an error that tells why if the client has begun a request."""
    self.connections_table.count(reason)
    if error is not None:
      self._answer(error)
    self.transport.close()
    self._follow(time.monotonic())

  def look(self, now: float) -> None:
    """Ends the connection if its client has taken too long for what it waits for."""
    self._follow(now)
    limits = self.connections_table.limits
    waited = now - self.since
    if self.state == HEADER and waited > limits.header_timeout_s:
      late = ProtocolError(408, f"the header did not come within {limits.header_timeout_s:g} s", code="timeout")
      self.end("header_timeout", late if self._received else None)
    elif self.state == IDLE and waited > limits.idle_timeout_s:
      self.end("idle_timeout")
    elif self.state == UNWANTED and waited > LINGER_S:
      self.end("unwanted_body")
    elif self.state == CLOSING and waited > FLUSH_S:
      self.connections_table.count("unread_answer")
      self.transport.abort()
    elif self.state == SERVED and self._half_closed:
      self._probe(now)

  # --- Inside ---------------------------------------------------------------------------------------------------------

  @property
  def _received(self) -> bool:
    """Whether a part of a header has come."""
    return bool(self.conn.trailing_data[0])

  def _follow(self, now: float) -> None:
    """Finds out what the connection waits for. The time runs from the change, so a byte now and then does not prolong it."""
    if self.transport.is_closing():
      state = CLOSING
    elif self.conn.their_state is h11.IDLE:
      state = IDLE if self.state != HEADER and not self._received else HEADER
    elif self.cycle is None or not self.cycle.response_complete:
      state = BODY if self.conn.their_state is h11.SEND_BODY else SERVED
    else:
      state = UNWANTED if self.conn.their_state is h11.SEND_BODY else IDLE
    if state != self.state:
      self.state, self.since = state, now

  def _answer(self, error: ProtocolError) -> None:
    """Sends an error outside of any request, and closes the connection."""
    body = dumps(error.to_dict())
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
    try:
      for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
        self.transport.write(self.conn.send(event) or b"")
    except h11.LocalProtocolError:  # an answer is on its way already
      logging.debug("a connection was closed in the middle of an answer")
    self.transport.close()

  def _probe(self, now: float) -> None:
    """Finds out whether a client that sends no more is still there, which only sending something to it can tell.

    HTTP allows any number of interim answers before the answer, and clients skip them.
    """
    if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
      self.transport.abort()
    elif now >= self._probe_at and not self.cycle.response_started:
      self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b"")
      self._probe_at, self._probe_delay = now + self._probe_delay, min(2 * self._probe_delay, SLOWEST_PROBE_S)

  async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Passes a request on to the application, unless the connection was let in for `OPEN_PATHS` alone."""
    if not self.only_open_paths or scope["path"] in OPEN_PATHS:
      return await self._whole_app(scope, receive, send)
    error = ProtocolError(503, "too many connections; try again later", code="connections_full")
    headers = {"Retry-After": "1", "Connection": "close"}
    return await Response(dumps(error.to_dict()), 503, headers, media_type="application/json")(scope, receive, send)


def _free_descriptors() -> int:
  """The number of files that this process may open beside those that are open."""
  most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
  if most == resource.RLIM_INFINITY:
    return 2**20
  try:
    return most - len(os.listdir("/dev/fd"))
  except OSError:
    return most - 2 * SPARE_FILES

"""An engine in a thread of its own, fed from an asyncio event loop: requests go in, their pieces come out by queue."""

from __future__ import annotations

import asyncio
from collections import deque
import dataclasses
import threading

from absl import logging
import numpy as np

from atma_jax.inference.engine import Engine, Piece
from atma_jax.inference.sampling import Sampling


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request that the engine has been given; its pieces come by `queue` as (index, pieces), None if the engine failed."""

  index: int
  queue: asyncio.Queue
  prompt: np.ndarray
  sampling: Sampling
  scored: bool
  name: int | None = None  # of the engine, and its thread's alone


class Worker:
  """Runs `Engine.step` for as long as there is something to do. All methods but `_run` belong to the event loop's thread.

  Attributes:
    outstanding: tickets whose last piece has not come.
    failure: what the engine raised, after which it serves no more.
  """

  def __init__(self, engine: Engine):
    self.engine = engine
    self.outstanding: set[Ticket] = set()
    self.failure: Exception | None = None
    self._inbox: deque[tuple[str, Ticket]] = deque()
    self._wake, self._closing = threading.Condition(), False
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    """Starts the thread; pieces will be delivered in the running event loop."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  def submit(self, index: int, queue: asyncio.Queue, prompt: np.ndarray, sampling: Sampling, scored: bool) -> Ticket:
    """Hands over a request that `Engine.check` accepts."""
    ticket = Ticket(index, queue, prompt, sampling, scored)
    self.outstanding.add(ticket)
    self._send("submit", ticket)
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Ends a request and frees its row at the next step; a ticket that has ended is left alone."""
    if ticket in self.outstanding:
      self._send("cancel", ticket)

  def close(self) -> None:
    """Ends the thread once its step is over; requests that run are dropped."""
    with self._wake:
      self._closing = True
      self._wake.notify()
    self._thread.join()

  def _send(self, what: str, ticket: Ticket) -> None:
    with self._wake:
      self._inbox.append((what, ticket))
      self._wake.notify()

  def _run(self) -> None:
    tickets: dict[int, Ticket] = {}
    try:
      while self._take_in(tickets):
        self._give_out(tickets, self.engine.step())
    except Exception as error:  # told to every client and by /health, and ends the server
      logging.exception("the engine failed")
      self._post(self._fail, error)

  def _take_in(self, tickets: dict[int, Ticket]) -> bool:
    """Waits for something to do and passes on what has come in; False once the worker is closed."""
    with self._wake:
      self._wake.wait_for(lambda: self._closing or self._inbox or self.engine.busy)
      if self._closing:
        return False
      arrived = list(self._inbox)
      self._inbox.clear()
    pieces = []
    for what, ticket in arrived:
      if what == "submit":
        ticket.name = self.engine.submit(ticket.prompt, ticket.sampling, scored=ticket.scored)
        tickets[ticket.name] = ticket
      elif (piece := self.engine.cancel(ticket.name)) is not None:
        pieces.append(piece)
    self._give_out(tickets, pieces)
    return True

  def _give_out(self, tickets: dict[int, Ticket], pieces: list[Piece]) -> None:
    news: dict[Ticket, list[Piece]] = {}
    for piece in pieces:
      news.setdefault(tickets[piece.request], []).append(piece)
      if piece.finish_reason is not None:
        del tickets[piece.request]
    if news:
      self._post(self._deliver, news)

  def _post(self, function, *arguments) -> None:
    try:
      self._loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop has closed, so nobody waits for this
      logging.info("pieces after the event loop closed were dropped")

  def _deliver(self, news: dict[Ticket, list[Piece]]) -> None:
    for ticket, pieces in news.items():
      if pieces[-1].finish_reason is not None:
        self.outstanding.discard(ticket)
      ticket.queue.put_nowait((ticket.index, pieces))

  def _fail(self, error: Exception) -> None:
    self.failure = error
    for ticket in self.outstanding:
      ticket.queue.put_nowait((ticket.index, None))
    self.outstanding.clear()

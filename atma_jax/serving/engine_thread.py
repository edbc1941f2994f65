"""An engine in a thread of its own, fed from an asyncio event loop: requests go in, their outputs come back through queues."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
import dataclasses
import threading
from typing import Any

from absl import logging
from jaxtyping import Int
import numpy as np

from atma_jax.inference.engine import Engine
from atma_jax.inference.requests import TokenOutput
from atma_jax.inference.sampling import Sampling

OutputQueue = asyncio.Queue[tuple[int, Sequence[TokenOutput] | Exception | None]]


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request that has been handed to the engine.

  Attributes:
    index: identifies the request in its queue.
    queue: receives (index, outputs), (index, error) if the engine refuses the request, or (index, None) if it fails.
    prompt: (T,) int32.
    sampling: its options.
    scored: whether log-probabilities of the prompt are wanted.
    name: of the request in the engine; belongs to the engine's thread.
  """

  index: int
  queue: OutputQueue
  prompt: Int[np.ndarray, " T"]
  sampling: Sampling
  scored: bool
  name: int | None = None


class EngineThread:
  """Calls `Engine.step` for as long as there is something to do. The public methods belong to the event loop's thread.

  Args:
    engine: used by nobody else from `start` to `close`.

  Attributes:
    engine: as given.
    outstanding: tickets whose last output has not arrived.
    failure: what the engine raised, after which it serves no more; None before. No request makes it fail.
  """

  def __init__(self, engine: Engine):
    self.engine = engine
    self.outstanding: set[Ticket] = set()
    self.failure: BaseException | None = None
    self._inbox: deque[tuple[str, Ticket]] = deque()
    self._wake, self._closing = threading.Condition(), False
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    """Starts the thread. Outputs are delivered in the event loop that is running now."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  def submit(self, index: int, queue: OutputQueue, prompt: Int[np.ndarray, " T"], sampling: Sampling, scored: bool) -> Ticket:
    """Hands over a request that `Engine.check` accepts; the arguments are the fields of `Ticket`."""
    ticket = Ticket(index, queue, prompt, sampling, scored)
    self.outstanding.add(ticket)
    self._send("submit", ticket)
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Ends a request and frees its row at the next step. Does nothing if the request has ended."""
    if ticket in self.outstanding:
      self._send("cancel", ticket)

  def close(self) -> None:
    """Ends the thread after its current step. Running requests are dropped."""
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
      while self._receive(tickets):
        self._deliver(tickets, self.engine.step())
    except BaseException as error:  # reported to every client and by /health, and ends the server
      logging.exception("the engine failed")
      self._call_in_loop(self._fail, error)

  def _receive(self, tickets: dict[int, Ticket]) -> bool:
    """Waits for something to do and passes what has arrived to the engine; False once the thread is closed."""
    with self._wake:
      self._wake.wait_for(lambda: self._closing or self._inbox or self.engine.busy)
      if self._closing:
        return False
      arrived = list(self._inbox)
      self._inbox.clear()
    outputs = []
    for what, ticket in arrived:
      if what == "submit":
        try:
          ticket.name = self.engine.submit(ticket.prompt, ticket.sampling, scored=ticket.scored)
        except Exception as error:  # the request's own fault, so it concerns nobody else
          logging.exception("the engine refused a request")
          self._call_in_loop(self._refuse, ticket, error)
          continue
        tickets[ticket.name] = ticket
      elif ticket.name is not None and (output := self.engine.cancel(ticket.name)) is not None:
        outputs.append(output)
    self._deliver(tickets, outputs)
    return True

  def _deliver(self, tickets: dict[int, Ticket], outputs: list[TokenOutput]) -> None:
    """Sorts outputs by ticket and sends them to the event loop."""
    news: dict[Ticket, list[TokenOutput]] = {}
    for output in outputs:
      news.setdefault(tickets[output.request], []).append(output)
      if output.finish_reason is not None:
        del tickets[output.request]
    if news:
      self._call_in_loop(self._put_into_queues, news)

  def _call_in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
    assert self._loop is not None  # set before the thread was started
    try:
      self._loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop has closed, so nobody is waiting
      logging.info("outputs that arrived after the event loop closed were dropped")

  def _put_into_queues(self, news: dict[Ticket, list[TokenOutput]]) -> None:
    for ticket, outputs in news.items():
      if outputs[-1].finish_reason is not None:
        self.outstanding.discard(ticket)
      ticket.queue.put_nowait((ticket.index, outputs))

  def _refuse(self, ticket: Ticket, error: Exception) -> None:
    self.outstanding.discard(ticket)
    ticket.queue.put_nowait((ticket.index, error))

  def _fail(self, error: BaseException) -> None:
    self.failure = error
    for ticket in self.outstanding:
      ticket.queue.put_nowait((ticket.index, None))
    self.outstanding.clear()

"""The answer to one request while the engine works on it: in one piece, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
import secrets
import time
from typing import Any

from absl import logging
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from atma_jax.serving.chat_protocol import ChatForm
from atma_jax.serving.engine_thread import EngineThread, OutputQueue, Ticket
from atma_jax.serving.prometheus import ServerMetrics
from atma_jax.serving.protocol import Call, Choice, ProtocolError, TextForm, dumps, usage

READ_GRACE_S = 30.0  # time that a client has to read a stream after its deadline
OUTCOME = "atma_jax.outcome"  # where a request's scope holds the status of a stream that did not end well


class Answer:
  """One call in the engine. Making it submits the call's requests.

  Args:
    call: what is wanted.
    model: the name that the model is served under.
    thread: runs the engine.
    metrics: of the server.
    arrival: when the request arrived, by `time.monotonic`.
    timeout_s: seconds from then until the answer is given up.
    on_close: called with the answer once it has ended.

  Attributes:
    call: as given.
    deadline: by `time.monotonic`.
    outcome: the status that a stream ended with, whose header said 200 long before; None until it ends.
  """

  def __init__(self, call: Call, *, model: str, thread: EngineThread, metrics: ServerMetrics, arrival: float, timeout_s: float,
               on_close: Callable[[Answer], None]):
    self.call, self.deadline = call, arrival + timeout_s
    self._thread, self._metrics, self._arrival, self._timeout_s = thread, metrics, arrival, timeout_s
    self._on_close, self._closed = on_close, False
    self._queue: OutputQueue = asyncio.Queue()
    self.outcome: int | None = None
    self._choices = [Choice(call, i, thread.engine.tokenizer) for i in range(len(call.samplings))]
    self._form = (ChatForm if call.chat else TextForm)(call)
    self._frame = {"id": f"{self._form.prefix}{secrets.token_hex(12)}", "object": self._form.whole_object,
                   "created": int(time.time()), "model": model}
    metrics.prompt_tokens.inc(sum(map(len, call.prompts)))
    self._tickets: list[Ticket] = [thread.submit(i, self._queue, call.prompts[i // call.n], sampling, call.scored)
                                   for i, sampling in enumerate(call.samplings)]

  async def whole(self, request: Request) -> dict[str, Any]:
    """Returns the answer in one piece.

    Raises:
      ClientDisconnect: the client has left.
      ProtocolError: the answer cannot be finished.
    """
    left = asyncio.create_task(_disconnected(request))
    work = asyncio.create_task(self._gather())
    try:
      await asyncio.wait({left, work}, return_when=asyncio.FIRST_COMPLETED)
      if not work.done():
        raise ClientDisconnect
      choices = work.result()
    finally:
      left.cancel()
      work.cancel()
    return self._frame | {"choices": [self._form.whole(choice) for choice in choices], "usage": usage(self.call, self._choices)}

  async def events(self) -> AsyncIterator[bytes]:
    """Yields the answer as server-sent events, among them the error object if it cannot be finished."""
    extra, frame = {"usage": None} if self.call.include_usage else {}, self._frame | {"object": self._form.part_object}
    try:
      async for _, choice in self._additions():
        for part in self._form.parts(choice):
          yield b"data: " + dumps(frame | {"choices": [part]} | extra) + b"\n\n"
      if self.call.include_usage:
        yield b"data: " + dumps(frame | {"choices": [], "usage": usage(self.call, self._choices)}) + b"\n\n"
      status = 200
    except ProtocolError as error:
      status = error.status
      yield b"data: " + dumps(error.to_dict()) + b"\n\n"
    except Exception:  # logged, and told to the client
      logging.exception("a stream failed")
      status = 500
      yield b"data: " + dumps(ProtocolError(500, "internal error").to_dict()) + b"\n\n"
    self.outcome = status
    yield b"data: [DONE]\n\n"

  def close(self) -> None:
    """Cancels requests that still run. Must be called however the answer ends."""
    if self._closed:
      return
    self._closed = True
    for ticket in self._tickets:
      self._thread.cancel(ticket)
    self._metrics.completion_tokens.inc(sum(choice.completion_tokens for choice in self._choices))
    self._metrics.whole_answer.observe(time.monotonic() - self._arrival)
    self._on_close(self)

  async def _gather(self) -> list[dict[str, Any]]:
    """Adds up all additions to the choices."""
    whole: dict[int, dict[str, Any]] = {}
    async for index, new in self._additions():
      old = whole.setdefault(index, new)
      if old is new:
        continue
      old["text"] += new["text"]
      old["finish_reason"] = new["finish_reason"]
      if new["logprobs"] is not None:
        for name, values in new["logprobs"].items():
          old["logprobs"][name] += values
    return [whole[index] for index in range(len(self._choices))]

  async def _additions(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Yields the index of a choice and what to add to it, until every choice has ended.

    Raises:
      ProtocolError: the time is up, the engine failed, or the grace period of a drain is over.
    """
    unfinished, first = len(self._choices), True
    while unfinished:
      try:
        async with asyncio.timeout(max(self.deadline - time.monotonic(), 0)):
          index, outputs = await self._queue.get()
      except TimeoutError as error:
        raise ProtocolError(504, f"not finished within {self._timeout_s:g} s", code="timeout") from error
      if outputs is None:
        raise ProtocolError(500, "the engine failed", code="engine_failed")
      if isinstance(outputs, Exception):
        raise ProtocolError(400, f"the engine refused the request: {outputs}") from outputs
      if first and any(output.token is not None for output in outputs):
        self._metrics.first_token.observe(time.monotonic() - self._arrival)
        first = False
      choice = self._choices[index].add(outputs)
      if choice["finish_reason"] == "cancelled":
        raise ProtocolError(503, "the server ended before the answer did", code="draining")
      unfinished -= choice["finish_reason"] is not None
      yield index, choice


class EventStream(StreamingResponse):
  """An answer as server-sent events, which closes the answer however the response ends."""

  def __init__(self, answer: Answer):
    super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    self._answer = answer

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      # A client that reads nothing would hold the response for ever.
      async with asyncio.timeout(max(self._answer.deadline + READ_GRACE_S - time.monotonic(), 0)):
        await super().__call__(scope, receive, send)
    except TimeoutError:
      logging.info("a client did not read its answer in time")
    finally:
      scope[OUTCOME] = 499 if self._answer.outcome is None else self._answer.outcome
      self._answer.close()


async def _disconnected(request: Request) -> None:
  """Returns once the client has left."""
  while (await request.receive())["type"] != "http.disconnect":
    pass

"""An HTTP server for an engine: the OpenAI completions protocol, health, and metrics for Prometheus.

    POST /v1/completions      GET /v1/models, /v1/models/NAME      GET /health      GET /metrics

Every request is answered once: with its text, or with the protocol's error object (400 malformed or too long, 404, 405, 408 body
too slow, 413 body too large, 429 queue full, 500 the engine failed, 503 draining, 504 out of time). A client that goes away
frees its rows. SIGTERM drains: what runs may finish, what comes is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
import contextlib
import secrets
import signal
import socket
import time
from typing import Any

from absl import logging
import jax
import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
import uvicorn

from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.serving.engine_thread import Ticket, Worker
from atma_jax.serving.protocol import Call, Choice, Limits, ProtocolError, dumps, parse_call, parse_json, usage

BODY_TIMEOUT_S = 30.0
CLIENT_CLOSED = 499  # the status counted for a client that went away
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

_compilations = 0


def _count_compilations(name: str, duration: float, **details: Any) -> None:
  del duration, details
  global _compilations
  _compilations += name == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


def compilations() -> int:
  """Programs that JAX has compiled in this process since this module was imported."""
  return _compilations


def listen(host: str, port: int) -> socket.socket:
  """A listening socket: the port is taken from now on, and who connects before the model is ready waits."""
  listener = socket.socket()
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
    listener.listen(1024)
  except OSError as error:
    raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from error
  return listener


class _Metrics:
  """Counters of one server, in a registry of their own."""

  def __init__(self, worker: Worker):
    self.registry = prometheus_client.CollectorRegistry()
    self._worker = worker
    own = {"namespace": "atma", "registry": self.registry}
    self.requests = prometheus_client.Counter("requests", "Completion requests answered, by status; 499 left.", ["status"], **own)
    self.prompt_tokens = prometheus_client.Counter("prompt_tokens", "Tokens of accepted prompts.", **own)
    self.completion_tokens = prometheus_client.Counter("completion_tokens", "Tokens of answers.", **own)
    self.first = prometheus_client.Histogram("time_to_first_token_seconds", "From a request's arrival.", buckets=SECONDS, **own)
    self.whole = prometheus_client.Histogram("request_seconds", "From arrival to the end of the answer.", buckets=SECONDS, **own)
    self.registry.register(self)

  def collect(self) -> Iterator[Metric]:
    """What the engine holds at this moment."""
    engine = self._worker.engine
    sequences = GaugeMetricFamily("atma_sequences", "Sequences in the engine, by what they do.", labels=["state"])
    for state, count in engine.counts.items():
      sequences.add_metric([state], count)
    yield sequences
    yield GaugeMetricFamily("atma_rows", "Sequences that can decode at once.", engine.rows)
    if engine.pages is not None:
      yield GaugeMetricFamily("atma_pages", "Pages of keys and values.", engine.pages.total)
      yield GaugeMetricFamily("atma_free_pages", "Pages that no request holds.", engine.pages.free)
    yield GaugeMetricFamily("atma_outstanding", "Sequences not answered yet.", len(self._worker.outstanding))
    yield CounterMetricFamily("atma_prefilled_tokens", "Prompt tokens computed, not taken from a kept prefix.", engine.prefilled)
    yield CounterMetricFamily("atma_compilations", "Programs compiled; serving compiles none.", compilations())


class CompletionServer:
  """The application and what it needs to start and to end.

  Args:
    engine: warmed up.
    model: the name that it is served by.
    limits: what is taken on.
  """

  def __init__(self, engine: Engine, model: str, limits: Limits | None = None):
    self.engine, self.model, self.limits = engine, model, limits or Limits()
    self.worker = Worker(engine)
    self.metrics = _Metrics(self.worker)
    self.draining = False
    self._running: set[object] = set()  # completion requests that are being answered
    self._created = int(time.time())
    self._server: uvicorn.Server | None = None
    self.app = Starlette(
      routes=[
        Route("/v1/completions", self._counted(self._completions), methods=["POST"]),
        Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._models),
        Route("/health", self._health), Route("/metrics", self._metrics),
      ],
      exception_handlers={HTTPException: _http_error, ProtocolError: _protocol_error, Exception: _internal_error},
      lifespan=self._lifespan)

  def run(self, listener: socket.socket) -> int:
    """Serves on a bound socket until SIGTERM or SIGINT; the exit code is 1 if the engine failed."""
    config = uvicorn.Config(self.app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="on",
                            ws="none", server_header=False)
    self._server = _Server(config)
    asyncio.run(self._server.serve(sockets=[listener]))
    return 1 if self.worker.failure else 0

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    del app
    self.worker.start()
    watch = asyncio.create_task(self._watch())
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ValueError, RuntimeError):  # outside the main thread there are no signals to handle
      for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, self._on_signal)
    yield
    watch.cancel()
    await asyncio.to_thread(self.worker.close)

  def _on_signal(self) -> None:
    if self.draining and self._server is not None:  # asked twice
      self._server.should_exit = True
    self.drain()

  def drain(self) -> None:
    """Refuses new requests and ends the server once those that run are answered, or the grace period is over."""
    logging.info("draining: %d requests run, at most %g s", len(self._running), self.limits.grace_s)
    self.draining = True

  async def _watch(self) -> None:
    """Ends the server after a drain or a failure of the engine."""
    while not self.draining and self.worker.failure is None:
      await asyncio.sleep(0.05)
    end = time.monotonic() + (self.limits.grace_s if self.worker.failure is None else 1.0)
    while self._running and time.monotonic() < end:
      await asyncio.sleep(0.02)
    self.draining = True
    for ticket in list(self.worker.outstanding):
      self.worker.cancel(ticket)
    end = time.monotonic() + 5.0
    while self._running and time.monotonic() < end:
      await asyncio.sleep(0.02)
    if self._server is not None:
      self._server.should_exit = True

  def _counted(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint with its refusals turned into answers and every answer counted."""
    async def call(request: Request) -> Response:
      try:
        response = await endpoint(request)
      except ProtocolError as error:
        response = _protocol_error(request, error)
      except ClientDisconnect:
        response = Response(status_code=CLIENT_CLOSED)
      self.metrics.requests.labels(response.status_code).inc()
      return response

    return call

  async def _completions(self, request: Request) -> Response:
    arrival = time.monotonic()
    self._refuse_if_closing()
    body = await _read_body(request, int(self.limits.body_mib * 2**20))
    most = self.engine.rows + self.limits.queue
    call = await asyncio.to_thread(self._parse, body, most)
    if call.scored and not self.engine.scores_prompts:
      raise ProtocolError(400, "echo with logprobs is not served: it needs --prompt_logprobs", param="echo")
    self._refuse_if_closing()
    if len(self.worker.outstanding) + len(call.samplings) > most:
      raise ProtocolError(429, f"{len(self.worker.outstanding)} sequences are being served and at most {most} can be; try again "
                          "later", code="queue_full")
    answer = _Answer(self, call, arrival)
    if call.stream:
      return _Stream(answer)
    try:
      return Response(dumps(await answer.whole(request)), media_type="application/json")
    finally:
      answer.close()

  def _parse(self, body: bytes, most_choices: int) -> Call:
    return parse_call(parse_json(body), self.engine, self.model, most_choices, self.engine.capacity)

  def _refuse_if_closing(self) -> None:
    if self.worker.failure is not None:
      raise ProtocolError(500, "the engine has failed and the server is ending", code="engine_failed")
    if self.draining:
      raise ProtocolError(503, "the server is ending and takes no new requests", code="draining")

  async def _models(self, request: Request) -> Response:
    entry = {"id": self.model, "object": "model", "created": self._created, "owned_by": "atma_jax"}
    name = request.path_params.get("name")
    if name is None:
      return Response(dumps({"object": "list", "data": [entry]}), media_type="application/json")
    if name != self.model:
      raise ProtocolError(404, f"model {name[:60]!r} does not exist; legal: {self.model!r}", code="model_not_found")
    return Response(dumps(entry), media_type="application/json")

  async def _health(self, request: Request) -> Response:
    del request
    status = "failed" if self.worker.failure is not None else "draining" if self.draining else "ok"
    return Response(dumps({"status": status}), 200 if status == "ok" else 503, media_type="application/json")

  async def _metrics(self, request: Request) -> Response:
    del request
    return Response(prometheus_client.generate_latest(self.metrics.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)


class _Server(uvicorn.Server):
  """Leaves signals to the application, which drains first."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


class _Answer:
  """One call while the engine serves it."""

  def __init__(self, server: CompletionServer, call: Call, arrival: float):
    self._server, self.call, self._arrival = server, call, arrival
    self.deadline = arrival + server.limits.request_timeout_s
    self._queue: asyncio.Queue = asyncio.Queue()
    self._choices = [Choice(call, i, server.engine.tokenizer) for i in range(len(call.samplings))]
    self._frame = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                   "model": server.model}
    server._running.add(self)
    server.metrics.prompt_tokens.inc(sum(map(len, call.prompts)))
    self._tickets: list[Ticket] = [
      server.worker.submit(i, self._queue, call.prompts[i // call.n], sampling, call.scored)
      for i, sampling in enumerate(call.samplings)]

  async def whole(self, request: Request) -> dict[str, Any]:
    """The answer in one piece; the client leaving raises `ClientDisconnect`."""
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
    return self._frame | {"choices": choices, "usage": usage(self.call, self._choices)}

  async def events(self) -> AsyncIterator[bytes]:
    """The answer as server-sent events, the error object among them if it cannot be finished."""
    extra = {"usage": None} if self.call.include_usage else {}
    try:
      async for _, choice in self._news():
        if choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"]):
          yield b"data: " + dumps(self._frame | {"choices": [choice]} | extra) + b"\n\n"
      if self.call.include_usage:
        yield b"data: " + dumps(self._frame | {"choices": [], "usage": usage(self.call, self._choices)}) + b"\n\n"
    except ProtocolError as error:
      yield b"data: " + dumps(error.to_dict()) + b"\n\n"
    yield b"data: [DONE]\n\n"

  def close(self) -> None:
    """Ends what still runs; to be called however the answer ends."""
    server = self._server
    if self in server._running:
      server._running.discard(self)
      for ticket in self._tickets:
        server.worker.cancel(ticket)
      server.metrics.completion_tokens.inc(sum(choice.completion_tokens for choice in self._choices))
      server.metrics.whole.observe(time.monotonic() - self._arrival)

  async def _gather(self) -> list[dict[str, Any]]:
    whole: list[dict[str, Any] | None] = [None] * len(self._choices)
    async for index, new in self._news():
      if (old := whole[index]) is None:
        whole[index] = new
        continue
      old["text"] += new["text"]
      old["finish_reason"] = new["finish_reason"]
      if new["logprobs"] is not None:
        for name, values in new["logprobs"].items():
          old["logprobs"][name] += values
    return whole

  async def _news(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Index and addition of a choice, until every choice has ended.

    Raises:
      ProtocolError: out of time, the engine failed, or the grace period of a drain is over.
    """
    unfinished, first = len(self._choices), True
    while unfinished:
      try:
        async with asyncio.timeout(max(self.deadline - time.monotonic(), 0)):
          index, pieces = await self._queue.get()
      except TimeoutError as error:
        raise ProtocolError(504, f"not finished within {self._server.limits.request_timeout_s:g} s", code="timeout") from error
      if pieces is None:
        raise ProtocolError(500, "the engine failed", code="engine_failed")
      if first and any(piece.token is not None for piece in pieces):
        self._server.metrics.first.observe(time.monotonic() - self._arrival)
        first = False
      choice = self._choices[index].take(pieces)
      if choice["finish_reason"] == "cancelled":
        raise ProtocolError(503, "the server ended before the answer did", code="draining")
      unfinished -= choice["finish_reason"] is not None
      yield index, choice


class _Stream(StreamingResponse):
  """Server-sent events whose rows are freed however the response ends."""

  def __init__(self, answer: _Answer):
    super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    self._answer = answer

  async def __call__(self, scope, receive, send) -> None:
    try:
      # A client that reads nothing would hold the response for ever.
      async with asyncio.timeout(max(self._answer.deadline + BODY_TIMEOUT_S - time.monotonic(), 0)):
        await super().__call__(scope, receive, send)
    except TimeoutError:
      logging.info("a client did not read its answer in time")
    finally:
      self._answer.close()


async def _read_body(request: Request, limit: int) -> bytes:
  length = request.headers.get("content-length", "0")
  if not length.isdecimal():
    raise ProtocolError(400, f"Content-Length {length[:60]!r} is no number")
  if int(length[:20]) > limit:
    raise ProtocolError(413, f"the body is larger than {limit} bytes", code="body_too_large")
  body = bytearray()
  try:
    async with asyncio.timeout(BODY_TIMEOUT_S):
      async for part in request.stream():
        body += part
        if len(body) > limit:
          raise ProtocolError(413, f"the body is larger than {limit} bytes", code="body_too_large")
  except TimeoutError as error:
    raise ProtocolError(408, f"the body did not come within {BODY_TIMEOUT_S:g} s", code="timeout") from error
  return bytes(body)


async def _disconnected(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _protocol_error(request: Request, error: ProtocolError) -> Response:
  del request
  headers = {"Retry-After": "1"} if error.status in (429, 503) else None
  return Response(dumps(error.to_dict()), error.status, headers, media_type="application/json")


def _http_error(request: Request, error: HTTPException) -> Response:
  path = request.url.path[:60]
  words = {404: f"no such path {path!r}; there are POST /v1/completions, GET /v1/models, /health, /metrics",
           405: f"{request.method} is not a method of {path!r}"}
  response = _protocol_error(request, ProtocolError(error.status_code, words.get(error.status_code, str(error.detail))))
  response.headers.update(error.headers or {})
  return response


def _internal_error(request: Request, error: Exception) -> Response:
  del error  # which uvicorn logs
  return _protocol_error(request, ProtocolError(500, "internal error"))

"""The HTTP application: the OpenAI completions protocol, health, and metrics for Prometheus.

    POST /v1/completions      GET /v1/models, /v1/models/NAME      GET /health      GET /metrics

Every request is answered once: with its text, or with the protocol's error object (400 malformed or too long, 404, 405, 408 body
too slow, 413 body too large, 429 queue full, 500 the engine failed, 503 draining, 504 out of time). A client that disconnects
frees its rows. SIGTERM drains: running requests may finish, new ones are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
import contextlib
import signal
import socket
import time

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
import uvicorn

from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.serving.answers import Answer, EventStream
from atma_jax.serving.engine_thread import EngineThread
from atma_jax.serving.limits import Limits
from atma_jax.serving.prometheus import CONTENT_TYPE, ServerMetrics
from atma_jax.serving.protocol import Call, ProtocolError, dumps, parse_call, parse_json

BODY_TIMEOUT_S = 30.0
CLIENT_CLOSED = 499  # the status counted for a client that disconnected


def listen(host: str, port: int) -> socket.socket:
  """Opens a listening socket. Its port is taken from now on, and clients that connect before the model is ready wait.

  Args:
    host: the address to listen on.
    port: the port; 0 takes a free one.

  Raises:
    UserError: the address cannot be used.
  """
  listener = socket.socket()
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
    listener.listen(1024)
  except OSError as error:
    raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from error
  return listener


class CompletionServer:
  """The application, and how it starts and ends.

  Args:
    engine: warmed up.
    model: the name that the model is served under.
    limits: what is accepted.

  Attributes:
    thread: runs the engine.
    metrics: of this server.
    draining: whether new requests are refused.
    running: the answers in progress.
    app: the ASGI application.
  """

  def __init__(self, engine: Engine, model: str, limits: Limits | None = None):
    self.engine, self.model, self.limits = engine, model, limits or Limits()
    self.thread = EngineThread(engine)
    self.metrics = ServerMetrics(self.thread)
    self.draining = False
    self.running: set[Answer] = set()
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
    """Serves on a listening socket until SIGTERM or SIGINT; returns the exit code, which is 1 if the engine failed."""
    config = uvicorn.Config(self.app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="on",
                            ws="none", server_header=False)
    self._server = _Server(config)
    asyncio.run(self._server.serve(sockets=[listener]))
    return 1 if self.thread.failure else 0

  def drain(self) -> None:
    """Refuses new requests, and ends the server once the running ones are answered or the grace period is over."""
    logging.info("draining: %d requests run, at most %g s", len(self.running), self.limits.grace_s)
    self.draining = True

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    del app
    self.thread.start()
    watch = asyncio.create_task(self._watch())
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ValueError, RuntimeError):  # outside the main thread there are no signals to handle
      for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, self._on_signal)
    yield
    watch.cancel()
    await asyncio.to_thread(self.thread.close)

  def _on_signal(self) -> None:
    if self.draining and self._server is not None:  # the second signal
      self._server.should_exit = True
    self.drain()

  async def _watch(self) -> None:
    """Ends the server after a drain or a failure of the engine."""
    while not self.draining and self.thread.failure is None:
      await asyncio.sleep(0.05)
    end = time.monotonic() + (self.limits.grace_s if self.thread.failure is None else 1.0)
    while self.running and time.monotonic() < end:
      await asyncio.sleep(0.02)
    self.draining = True
    for ticket in list(self.thread.outstanding):
      self.thread.cancel(ticket)
    end = time.monotonic() + 5.0
    while self.running and time.monotonic() < end:
      await asyncio.sleep(0.02)
    if self._server is not None:
      self._server.should_exit = True

  def _counted(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Wraps an endpoint: refusals become answers, and every answer is counted."""
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
    self._refuse_if_ending()
    body = await _read_body(request, int(self.limits.body_mib * 2**20))
    most = self.engine.rows + self.limits.queue
    call = await asyncio.to_thread(self._parse, body, most)
    if call.scored and not self.engine.scores_prompts:
      raise ProtocolError(400, "echo with logprobs is not served: it needs --prompt_logprobs", param="echo")
    self._refuse_if_ending()
    outstanding = len(self.thread.outstanding)
    if outstanding + len(call.samplings) > most:
      raise ProtocolError(429, f"{outstanding} sequences are being served and at most {most} can be; try again later",
                          code="queue_full")
    answer = Answer(call, model=self.model, thread=self.thread, metrics=self.metrics, arrival=arrival,
                    timeout_s=self.limits.request_timeout_s, on_close=self.running.discard)
    self.running.add(answer)
    if call.stream:
      return EventStream(answer)
    try:
      return Response(dumps(await answer.whole(request)), media_type="application/json")
    finally:
      answer.close()

  def _parse(self, body: bytes, most_choices: int) -> Call:
    return parse_call(parse_json(body), self.engine, self.model, most_choices, self.engine.capacity)

  def _refuse_if_ending(self) -> None:
    if self.thread.failure is not None:
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
    status = "failed" if self.thread.failure is not None else "draining" if self.draining else "ok"
    return Response(dumps({"status": status}), 200 if status == "ok" else 503, media_type="application/json")

  async def _metrics(self, request: Request) -> Response:
    del request
    return Response(self.metrics.exposition(), media_type=CONTENT_TYPE)


class _Server(uvicorn.Server):
  """A server that leaves signals to the application, which drains first."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


async def _read_body(request: Request, limit: int) -> bytes:
  """Reads a body of at most `limit` bytes. Raises `ProtocolError` if it is larger or too slow."""
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


def _protocol_error(request: Request, error: Exception) -> Response:
  del request
  assert isinstance(error, ProtocolError)
  headers = {"Retry-After": "1"} if error.status in (429, 503) else None
  return Response(dumps(error.to_dict()), error.status, headers, media_type="application/json")


def _http_error(request: Request, error: Exception) -> Response:
  """Answers what Starlette refuses by itself: unknown paths and methods."""
  assert isinstance(error, HTTPException)
  path = request.url.path[:60]
  messages = {404: f"no such path {path!r}; there are POST /v1/completions, GET /v1/models, /health, /metrics",
              405: f"{request.method} is not a method of {path!r}"}
  response = _protocol_error(request, ProtocolError(error.status_code, messages.get(error.status_code, str(error.detail))))
  response.headers.update(error.headers or {})
  return response


def _internal_error(request: Request, error: Exception) -> Response:
  del error  # uvicorn logs it
  return _protocol_error(request, ProtocolError(500, "internal error"))

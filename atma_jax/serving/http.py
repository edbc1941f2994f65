"""The HTTP application: the OpenAI completions and chat protocols, health, and metrics for Prometheus.

    POST /v1/completions, /v1/chat/completions      GET /v1/models, /v1/models/NAME      GET /health      GET /metrics

Every request is answered once: with its text, or with the protocol's error object (400 malformed or too long, 401 without a
key, 404, 405, 408 header or body too slow, 413 body too large, 429 queue or memory for bodies full, 500 the engine failed,
503 draining or too many connections, 504 out of time). A client that disconnects frees its rows. SIGTERM drains: running
requests may finish, new ones are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import signal
import socket
import time
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
import uvicorn

from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.serving.access import Access
from atma_jax.serving.answers import OUTCOME, Answer, EventStream
from atma_jax.serving.bodies import SMALL_BODY, BodyRoom, count_values
from atma_jax.serving.chat_protocol import parse_chat
from atma_jax.serving.connections import BACKLOG, SWEEP_S, Connections
from atma_jax.serving.engine_thread import EngineThread
from atma_jax.serving.limits import Limits
from atma_jax.serving.prometheus import CONTENT_TYPE, ServerMetrics
from atma_jax.serving.prompts import most_characters
from atma_jax.serving.protocol import Call, ProtocolError, dumps, parse_call, parse_json

CLIENT_CLOSED = 499  # the status counted for a client that disconnected
PARSERS = {"/v1/completions": parse_call, "/v1/chat/completions": parse_chat}  # what is generated, and how it is asked for
WAITING_CONNECTIONS = 1024  # that the kernel holds until they are accepted
FEW_VALUES = 10_000  # JSON values of a body that need not be token ids


def listen(host: str, port: int) -> socket.socket:
  """Opens a listening socket. Its port is taken from now on, and clients that connect before the model is ready wait.

  Args:
    host: the address to listen on.
    port: the port; 0 takes a free one.

  Raises:
    UserError: the address cannot be used, or there is none.
  """
  if not host.strip():
    raise UserError(f"--host={host}: must be an address such as 127.0.0.1; 0.0.0.0 is all of this machine")
  listener = socket.socket()
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
    listener.listen(WAITING_CONNECTIONS)
  except (OSError, ValueError, TypeError) as error:  # a name that cannot be encoded is one of the latter two
    listener.close()
    raise UserError(f"--host={host} --port={port}: {getattr(error, 'strerror', None) or error}") from error
  return listener


class CompletionServer:
  """The application, and how it starts and ends.

  Args:
    engine: warmed up.
    model: the name that the model is served under.
    limits: what is accepted.
    access: who may use it.

  Attributes:
    thread: runs the engine.
    connections: of its clients.
    bodies: the memory for those that are being read.
    metrics: of this server.
    draining: whether new requests are refused.
    running: the answers in progress.
    app: the ASGI application.

  Raises:
    UserError: the tokenizer is only a name, there are no keys in the file of keys, or the process may open too few files.
  """

  def __init__(self, engine: Engine, model: str, limits: Limits | None = None, access: Access | None = None):
    self.engine, self.model, self.limits, self.access = engine, model, limits or Limits(), access or Access()
    most_characters(engine.tokenizer, engine.capacity)  # takes a while, once
    self._keys = self.access.read_keys()
    self.thread = EngineThread(engine)
    self.connections = Connections(self.limits)
    self.bodies = BodyRoom(self.limits)
    # Large bodies have a thread of their own, so that small ones never wait behind them.
    self._small, self._large = (ThreadPoolExecutor(1, f"{size} bodies") for size in ("small", "large"))
    self.metrics = ServerMetrics(self.thread, self.connections)
    self.draining = False
    self.running: set[Answer] = set()
    self._created = int(time.time())
    self._server: uvicorn.Server | None = None
    self._routes = Starlette(
      routes=[
        *(Route(path, self._refusing(self._completions), methods=["POST"]) for path in PARSERS),
        Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._models),
        Route("/health", self._health), Route("/metrics", self._metrics),
      ],
      exception_handlers={HTTPException: _http_error, ProtocolError: _protocol_error, Exception: _internal_error},
      lifespan=self._lifespan)
    self._routes.router.redirect_slashes = False  # a redirect would lead to whatever Host the client has named
    self.app = self._gate

  def run(self, listener: socket.socket) -> int:
    """Serves on a listening socket until SIGTERM or SIGINT; returns the exit code, which is 1 if the engine failed."""
    config = uvicorn.Config(self.app, interface="asgi3", http=self.connections.protocol(), log_level="warning", access_log=False,
                            timeout_graceful_shutdown=5, lifespan="on", ws="none", server_header=False, proxy_headers=False,
                            backlog=BACKLOG)
    self._server = _Server(config)
    logging.info("serving %s at http://%s:%d/v1", self.model, *listener.getsockname()[:2])
    asyncio.run(self._server.serve(sockets=[listener]))
    return 1 if self.thread.failure else 0

  async def _gate(self, scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application: it refuses whom it must and counts how every completion request ended."""
    refusal = self.access.refusal(scope, self._keys) if scope["type"] == "http" else None
    app = self._routes if refusal is None else _error_response(refusal)
    if scope["type"] != "http" or scope["path"] not in PARSERS:
      return await app(scope, receive, send)
    status = CLIENT_CLOSED

    async def send_and_note(message: Any) -> None:
      nonlocal status
      status = message.get("status", status)
      await send(message)

    try:
      await app(scope, receive, send_and_note)
    finally:
      self.metrics.requests.labels(scope.get(OUTCOME, status)).inc()

  def drain(self) -> None:
    """Refuses new requests, and ends the server once the running ones are answered or the grace period is over."""
    logging.info("draining: %d requests run, at most %g s", len(self.running), self.limits.grace_s)
    self.draining = True

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    del app
    self.thread.start()
    watch, sweep = asyncio.create_task(self._watch()), asyncio.create_task(self._sweep())
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ValueError, RuntimeError):  # outside the main thread there are no signals to handle
      for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, self._on_signal)
    yield
    watch.cancel()
    sweep.cancel()
    for pool in (self._small, self._large):
      pool.shutdown(wait=False, cancel_futures=True)
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

  async def _sweep(self) -> None:
    """Looks for clients that take too long."""
    while True:
      await asyncio.sleep(SWEEP_S)
      self.connections.sweep()

  def _refusing(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Wraps an endpoint: refusals become answers, also of a client that has left."""
    async def call(request: Request) -> Response:
      try:
        return await endpoint(request)
      except ProtocolError as error:
        return _protocol_error(request, error)
      except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)

    return call

  async def _completions(self, request: Request) -> Response:
    arrival = time.monotonic()
    self._refuse_if_ending()
    async with self.bodies.body(request) as body:
      call = await self._parse(body, PARSERS[request.url.path])
    if call.scored and not self.engine.scores_prompts:
      raise ProtocolError(400, "echo with logprobs is not served: it needs --prompt_logprobs", param="echo")
    self._refuse_if_ending()
    self._refuse_if_full(len(call.samplings))
    answer = Answer(call, model=self.model, thread=self.thread, metrics=self.metrics, arrival=arrival,
                    timeout_s=self.limits.request_timeout_s, on_close=self.running.discard)
    self.running.add(answer)
    if call.stream:
      return EventStream(answer)
    try:
      return Response(dumps(await answer.whole(request)), media_type="application/json")
    finally:
      answer.close()

  @property
  def _most_sequences(self) -> int:
    return self.engine.rows + self.limits.queue

  async def _parse(self, body: bytes, parse: Callable[..., Call]) -> Call:
    """Reads a request in one of the two threads for it. Raises `ProtocolError`, also if its turn does not come in time."""
    pool, patience = self._small if len(body) <= SMALL_BODY else self._large, self.limits.body_timeout_s
    try:
      async with asyncio.timeout(patience):
        return await asyncio.get_running_loop().run_in_executor(pool, self._parse_now, body, parse)
    except TimeoutError as error:
      raise ProtocolError(503, f"requests before this one take more than {patience:g} s to read; try again later",
                          code="busy") from error

  def _parse_now(self, body: bytes, parse: Callable[..., Call]) -> Call:
    try:
      return self._parse_call(body, parse)
    except Exception:
      raise
    except BaseException as error:  # the panic of a library, which must not pass for the end of the server
      raise RuntimeError(f"a request could not be read: {error}") from error

  def _parse_call(self, body: bytes, parse: Callable[..., Call]) -> Call:
    most, longest = self._most_sequences, self.engine.capacity
    if len(body) > FEW_VALUES and (count := count_values(body)) > (most_values := most * longest + FEW_VALUES):
      raise ProtocolError(400, f"the body holds {count} values; at most {most_values}, for {most} prompts of {longest} tokens")
    return parse(parse_json(body), self.engine, self.model, most, longest, admit=self._refuse_if_full)

  def _refuse_if_full(self, sequences: int) -> None:
    outstanding, most = len(self.thread.outstanding), self._most_sequences
    if outstanding + sequences > most:
      raise ProtocolError(429, f"{outstanding} sequences are being served and at most {most} can be; try again later",
                          code="queue_full")

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

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    for listener in sockets or ():  # a short backlog is for accepting a few at a time, not for how many may wait
      listener.listen(WAITING_CONNECTIONS)

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


def _error_response(error: ProtocolError) -> Response:
  headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(error.status)
  return Response(dumps(error.to_dict()), error.status, headers, media_type="application/json")


def _protocol_error(request: Request, error: Exception) -> Response:
  del request
  assert isinstance(error, ProtocolError)
  return _error_response(error)


def _http_error(request: Request, error: Exception) -> Response:
  """Answers what Starlette refuses by itself: unknown paths and methods."""
  assert isinstance(error, HTTPException)
  path = request.url.path[:60]
  messages = {404: f"no such path {path!r}; there are POST {', '.join(PARSERS)}, GET /v1/models, /health, /metrics",
              405: f"{request.method} is not a method of {path!r}"}
  response = _protocol_error(request, ProtocolError(error.status_code, messages.get(error.status_code, str(error.detail))))
  response.headers.update(error.headers or {})
  return response


def _internal_error(request: Request, error: Exception) -> Response:
  del error  # uvicorn logs it
  return _protocol_error(request, ProtocolError(500, "internal error"))

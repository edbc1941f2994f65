"""One server, and clients that mean it harm or are merely odd: all are answered, nothing waits for ever, nothing ends it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import http.client
import json
import re
import socket
import threading
import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.data.tokenizers import train_sentencepiece
from atma_jax.inference.engine import Engine
from atma_jax.serving.access import Access
from atma_jax.serving.connections import LINGER_S, RESERVE
from atma_jax.serving.http import CompletionServer, listen
from atma_jax.serving.limits import Limits
from atma_jax.serving.protocol import Choice
from tests.completions import assert_well_formed
from tests.small_model import SMALL, lively_model

KEY = "a-key-of-the-tests-0123456789"
LIMITS = Limits(queue=6, request_timeout_s=60, body_mib=8, bodies_mib=0.5, header_timeout_s=1.0, body_timeout_s=4.0,
                idle_timeout_s=1.0, connections=40, connections_per_address=24)
MODEL = dataclasses.replace(SMALL, vocab_size=320)
GRACE_S = 15.0  # for a busy machine


class Client:
  """A server in a thread, and requests to it."""

  def __init__(self, server: CompletionServer):
    self.server = server
    self._listener = listen("127.0.0.1", 0)
    self.port = self._listener.getsockname()[1]
    self.thread = threading.Thread(target=lambda: server.run(self._listener))
    self.thread.start()

  def connect(self, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", self.port), GRACE_S, (source, 0))

  def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GRACE_S)
    with contextlib.closing(connection):
      connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", **headers})
      response = connection.getresponse()
      return response.status, response.read().decode()

  def post(self, **values: Any) -> tuple[int, str]:
    return self.request("POST", "/v1/completions", json.dumps(values).encode())

  def metric(self, pattern: str) -> float:
    """The sum of all samples of /metrics whose name and labels match."""
    text = self.request("GET", "/metrics")[1]
    return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE))

  def is_well(self) -> bool:
    return self.request("GET", "/health") == (200, '{"status":"ok"}') and self.server.thread.failure is None

  def until(self, condition: Any) -> bool:
    """Whether something becomes true before long."""
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end:
      if condition():
        return True
      time.sleep(0.02)
    return False


def head(length: int, *lines: str) -> bytes:
  text = "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: here", f"Authorization: Bearer {KEY}", f"Content-Length: {length}",
                      *lines, "", ""])
  return text.encode()


def read_all(connection: socket.socket) -> bytes:
  """Everything until the server closes; a reset is an end, too."""
  parts = []
  with contextlib.suppress(ConnectionResetError):
    while part := connection.recv(65536):
      parts.append(part)
  return b"".join(parts)


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
  """A server whose model has ids that its tokenizer does not have."""
  keys = tmp_path_factory.mktemp("keys") / "keys"
  keys.write_text(f"# keys\n\n{KEY}\nanother-key-of-the-tests\n")
  tokenizer = train_sentencepiece(["hello world, this is a small text. "] * 20, 290)
  assert tokenizer.vocab_size < MODEL.vocab_size
  engine = Engine(lively_model(MODEL), tokenizer, rows=2, capacity=64, chunk=16, decode_steps=4, alternatives=2,
                  prompt_logprobs=True)
  client = Client(CompletionServer(engine, "lively", LIMITS, Access(str(keys))))
  assert client.post(prompt="a", max_tokens=2, echo=True, logprobs=1)[0] == 200  # compiles
  yield client
  assert client.is_well()
  client.server.drain()
  client.thread.join(30)
  assert not client.thread.is_alive()


IDS = st.lists(st.integers(0, MODEL.vocab_size - 1) | st.sampled_from([MODEL.vocab_size - 1, MODEL.vocab_size - 5]), max_size=12)
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
BODIES = st.fixed_dictionaries({"prompt": IDS | st.lists(IDS, max_size=3) | st.text(max_size=20) | ODD}, optional={
  "max_tokens": st.integers(0, 9) | ODD, "echo": st.booleans(), "stream": st.booleans(), "logprobs": st.integers(0, 2) | ODD,
  "n": st.integers(1, 3) | ODD, "stop": st.lists(st.sampled_from(["a", "\ufffd", "\ud800", ""]), max_size=2), "seed": ODD,
  "temperature": ODD, "top_k": ODD, "top_p": ODD, "min_p": ODD, "repetition_penalty": ODD, "ignore_end": st.booleans(), "x": ODD})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=BODIES)
def test_every_request_is_answered_and_counted(client, values):
  """Legal ones are served, whatever ids of the model they hold; others are refused. Each adds one to the counter."""
  before = client.metric(r"atma_requests_total\{.*\}")
  status, text = client.post(**values)
  assert status == 200 or 400 <= status < 500, (status, text)
  assert_well_formed(status, text, values)
  assert client.is_well()
  assert client.metric(r"atma_requests_total\{.*\}") == before + 1


def test_ids_without_text_are_shown(client):
  """An id that only the model has is U+FFFD in a text, in one piece and as a stream, and is named by its id beside it."""
  last = MODEL.vocab_size - 1
  status, text = client.post(prompt=[last, last], max_tokens=1, echo=True, logprobs=1)
  choice = json.loads(text)["choices"][0]
  assert status == 200 and choice["text"].startswith("\ufffd\ufffd")
  assert choice["logprobs"]["tokens"][:2] == [f"token_id:{last}"] * 2 and choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
  status, text = client.post(prompt=[last], max_tokens=2, echo=True, stream=True)
  assert status == 200 and "\\ufffd" in text and text.endswith("data: [DONE]\n\n")


def test_a_stream_counts_by_its_end(client, monkeypatch):
  """Its header has said 200 long before its time is up, or it fails; the counter knows better, and so does the client."""
  body = json.dumps({"prompt": "a", "max_tokens": 60, "stream": True, "ignore_end": True}).encode()
  with monkeypatch.context() as patched:
    patched.setattr(client.server, "limits", dataclasses.replace(LIMITS, request_timeout_s=0.001))
    before = client.metric(r'atma_requests_total\{status="504"\}')
    status, text = client.request("POST", "/v1/completions", body)
  assert status == 200 and '"code":"timeout"' in text and text.endswith("data: [DONE]\n\n")
  assert client.metric(r'atma_requests_total\{status="504"\}') == before + 1
  with monkeypatch.context() as patched:
    patched.setattr(Choice, "add", lambda self, outputs: 1 // 0)
    before = client.metric(r'atma_requests_total\{status="500"\}')
    status, text = client.request("POST", "/v1/completions", body)
  assert status == 200 and "internal error" in text and text.endswith("data: [DONE]\n\n")
  assert client.metric(r'atma_requests_total\{status="500"\}') == before + 1


def test_an_engine_that_refuses_a_request_goes_on(client, monkeypatch):
  """What `Engine.submit` raises concerns that request alone; what nobody has foreseen is a counted answer."""
  def refuse(*arguments: Any, **options: Any) -> int:
    raise RuntimeError("not this one")

  with monkeypatch.context() as patched:
    patched.setattr(client.server.engine, "submit", refuse)
    status, text = client.post(prompt="a", n=2)
    assert (status, "not this one" in text) == (400, True)
  before = client.metric(r'atma_requests_total\{status="500"\}')
  with monkeypatch.context() as patched:
    patched.setattr(client.server.engine.tokenizer, "encode", refuse)
    assert client.post(prompt="a")[0] == 500
  assert client.metric(r'atma_requests_total\{status="500"\}') == before + 1
  assert client.post(prompt="a")[0] == 200


def test_large_bodies_do_not_hold_up_small_ones(client, monkeypatch):
  """Prompts are counted, and their characters too, before anything is tokenised, and a small request does not wait for it."""
  encoded = []
  encode = type(client.server.engine.tokenizer).encode
  monkeypatch.setattr(client.server.engine.tokenizer, "encode",
                      lambda text: (encoded.append(len(text)), encode(client.server.engine.tokenizer, text))[1])
  bodies = [b'{"prompt":[' + b",".join([b'""'] * 100_000) + b"]}", b'{"prompt":["' + b"x" * 300_000 + b'"]}',
            b'{"prompt":[' + b",".join([b"[]"] * 100_000) + b"]}", b'{"prompt":[' + b",".join([b"5"] * 150_000) + b"]}"]
  answers = []

  def send(body: bytes) -> None:
    for _ in range(3):
      answers.append(client.request("POST", "/v1/completions", body))

  threads = [threading.Thread(target=send, args=(body,)) for body in bodies]
  for thread in threads:
    thread.start()
  start = time.monotonic()
  assert client.post(prompt="a", max_tokens=4)[0] == 200
  waited = time.monotonic() - start
  for thread in threads:
    thread.join()
  assert len(answers) == 12 and {status for status, _ in answers} <= {400, 429}, answers
  assert max(encoded) <= 5 and waited < 5
  status, text = client.request("POST", "/v1/completions", bodies[1])
  assert status == 400 and "300000 characters; at most" in text


def test_a_client_that_only_stops_sending_gets_its_answer(client):
  """It has closed its sending side after the request, as HTTP allows."""
  for stream in (False, True):
    body = json.dumps({"prompt": "a", "max_tokens": 5, "stream": stream, "ignore_end": True}).encode()
    with client.connect() as connection:
      connection.sendall(head(len(body)) + body)
      connection.shutdown(socket.SHUT_WR)
      answer = read_all(connection)
    assert b"HTTP/1.1 200 OK" in answer and b'"finish_reason":"length"' in answer


def test_a_client_that_leaves_is_noticed(client):
  """A closed connection looks the same at first, and frees its rows all the same; also while the request still waits."""
  for stream in (False, True):
    body = json.dumps({"prompt": "a", "max_tokens": 60, "n": 6, "stream": stream, "ignore_end": True}).encode()
    with client.connect() as connection:
      connection.sendall(head(len(body)) + body)
      time.sleep(0.05)
    assert client.until(lambda: not client.server.thread.outstanding)
  assert client.metric(r'atma_requests_total\{status="499"\}') >= 1


def test_slow_clients_are_given_up(client):
  """A header or a body that comes a byte at a time, and a connection without a request, end in time, with an answer if begun."""
  begun = time.monotonic()
  silent, kept, header, body = (client.connect() for _ in range(4))
  kept.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
  body.sendall(head(1000))
  answers: dict[str, bytes] = {}

  def trickle(name: str, connection: socket.socket, text: bytes) -> None:
    with contextlib.suppress(OSError):
      for byte in text:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)
    answers[name] = read_all(connection)

  threads = [threading.Thread(target=trickle, args=case) for case in (
    ("silent", silent, b""), ("kept", kept, b""), ("header", header, b"GET /health HTTP/1.1\r\n" + b"X" * 60),
    ("body", body, b" " * 80))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(LIMITS.body_timeout_s + LINGER_S + GRACE_S)
    assert not thread.is_alive()
  for connection in (silent, kept, header, body):
    connection.close()
  assert answers["silent"] == b"" and answers["kept"].endswith(b'{"status":"ok"}')
  assert b"408" in answers["body"] and b"the body did not come within 4 s" in answers["body"]
  assert b"408" in answers["header"] or answers["header"] == b""  # a byte that crosses the answer resets the connection
  assert time.monotonic() - begun < LIMITS.body_timeout_s + LINGER_S + GRACE_S
  assert client.metric(r'atma_ended_connections_total\{reason="header_timeout"\}') >= 2
  assert client.metric(r'atma_ended_connections_total\{reason="idle_timeout"\}') >= 1


def test_idle_connections_make_room(client):
  """More idle connections than there may be keep nobody out, from one address or several, and never more are open."""
  with contextlib.ExitStack() as stack:
    crowd = [stack.enter_context(client.connect(f"127.0.0.{1 + i % 3}")) for i in range(90)]
    for connection in crowd[::2]:
      connection.sendall(b"POST /v1/comp")
    assert client.is_well() and client.post(prompt="a", max_tokens=1)[0] == 200
    assert len(client.server.connections.open) <= LIMITS.connections + RESERVE
  assert client.metric(r'atma_ended_connections_total\{reason="evicted"\}') >= 40


def test_connections_that_are_served_are_not_given_up(client, monkeypatch):
  """Where every connection is being served, new ones may only ask how the server is."""
  monkeypatch.setattr(client.server.connections, "most", 3)
  body = json.dumps({"prompt": "a", "max_tokens": 60, "n": 2, "ignore_end": True, "stream": True}).encode()
  with contextlib.ExitStack() as stack:
    busy = [stack.enter_context(client.connect()) for _ in range(3)]
    release = threading.Event()
    step = client.server.engine.step
    monkeypatch.setattr(client.server.engine, "step", lambda: (release.wait(GRACE_S), step())[1])
    for connection in busy:
      connection.sendall(head(len(body)) + body)
    assert client.until(lambda: len(client.server.running) == 3)
    try:
      assert client.is_well() and client.metric("atma_connections") == 4
      status, text = client.post(prompt="a")
      assert status == 503 and "connections_full" in text
    finally:
      release.set()
    for connection in busy:
      answer = b""
      while b"[DONE]" not in answer:
        answer += connection.recv(65536)
      assert b'"error"' not in answer


def test_bodies_share_a_room(client):
  """Bodies that never end hold no more than their room, and a small request is read all the same."""
  with contextlib.ExitStack() as stack:
    answers = []
    for _ in range(8):
      connection = stack.enter_context(client.connect())
      connection.sendall(head(2**20))
      with contextlib.suppress(OSError):
        connection.sendall(b" " * 300_000)
      answers.append(connection)
    assert client.server.bodies.held <= LIMITS.bodies_mib * 2**20
    assert client.post(prompt="a", max_tokens=1)[0] == 200
    answered = [connection.recv(65536) for connection in answers]
    assert sum(b"429" in answer and b"bodies_full" in answer for answer in answered) >= 5
    assert all(b"429" in answer or b"408" in answer for answer in answered)


LINES = st.lists(st.binary(max_size=20) | st.sampled_from([
  b"GET /health HTTP/1.1", b"POST /v1/completions HTTP/1.0", b"Host: a", b"Content-Length: 9" * 2, b"Transfer-Encoding: chunked",
  b"Content-Length: -1", b"Expect: 100-continue", b"5;x", b"{}", b"Connection: upgrade", b"Upgrade: websocket", b"X" * 70_000]),
  max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lines=LINES, end=st.sampled_from([b"\r\n\r\n", b"\r\n", b""]))
def test_what_is_no_request_ends_in_time(client, lines, end):
  """Bytes that are not HTTP, or not all of a request, are answered or not, and the connection is closed in either case."""
  with client.connect() as connection:
    with contextlib.suppress(OSError):
      connection.sendall(b"\r\n".join(lines) + end)
      connection.shutdown(socket.SHUT_WR)
    answer = read_all(connection)
  assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
  assert b" 500 " not in answer.partition(b"\r\n")[0]
  assert client.is_well()


def test_no_redirect(client):
  """A path that is nearly one of the server's leads nowhere, least of all to the name in the Host header."""
  status, text = client.request("GET", "/health/", Host="evil.example")
  assert status == 404 and "evil" not in text


@pytest.mark.parametrize(("authorization", "status"), [
  (f"Bearer {KEY}", 200), ("bearer another-key-of-the-tests", 200), ("", 401), (KEY, 401), (f"Basic {KEY}", 401),
  (f"Bearer {KEY}x", 401), (f"Bearer {KEY[:-1]}", 401), ("Bearer \xff", 401), ("Bearer # keys", 401)])
def test_keys(client, authorization, status):
  """A request needs one of the keys, except for how the server is."""
  assert client.request("GET", "/v1/models", Authorization=authorization)[0] == status
  got, text = client.request("POST", "/v1/completions", b'{"max_tokens": 1}', Authorization=authorization)
  assert got == status and (status == 200 or json.loads(text)["error"]["code"] == "invalid_api_key")
  assert client.request("GET", "/health", Authorization=authorization)[0] == 200


@pytest.mark.parametrize(("host", "status"), [
  ("a.org", 200), ("A.ORG:8000", 200), ("x.b.org", 200), ("b.org", 400), ("a.org.evil", 400), ("", 400), ("a.org@evil", 400),
  ("evil:80:80", 400), ("[::1]:8000", 200), ("127.0.0.1", 400)])
def test_names(client, monkeypatch, host, status):
  """A request must name one of the names of the server, except for how it is."""
  monkeypatch.setattr(client.server, "access", Access(allowed_hosts=("a.org", "*.b.org", "::1")))
  assert client.request("GET", "/v1/models", Host=host)[0] == status
  assert client.request("GET", "/health", Host=host)[0] == 200

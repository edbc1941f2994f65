"""The server through the official client and through raw sockets: right answers, proper refusals, nothing lost or left behind."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import openai
import pytest

from atma_jax.data.tokenizers import END_OF_TEXT, ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.serving.http import CompletionServer, listen
from atma_jax.serving.limits import Limits
from atma_jax.serving.prometheus import compilations
from tests.completions import assert_well_formed

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
CAPACITY = 192
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_end": True}}


class Serving:
  """A server in a thread, and plain HTTP to it."""

  def __init__(self, server: CompletionServer):
    self.server = server
    self._listener = listen("127.0.0.1", 0)
    self.port = self._listener.getsockname()[1]
    self.code: int | None = None
    self._thread = threading.Thread(target=self._run)
    self._thread.start()
    self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

  def _run(self) -> None:
    self.code = self.server.run(self._listener)

  def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
    with contextlib.closing(connection):
      connection.request(method, path, body, headers)
      response = connection.getresponse()
      return response.status, response.read().decode()

  def post(self, **values) -> tuple[int, dict]:
    status, body = self.request("POST", "/v1/completions", json.dumps(values).encode())
    return status, json.loads(body)

  def idle(self) -> bool:
    """Whether everything is free again, within a few seconds."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
      if not self.server.thread.outstanding and not self.server.running and not self.server.engine.busy:
        return True
      time.sleep(0.02)
    return False

  def metric(self, name: str) -> float:
    """A sample of /metrics by its name and labels."""
    text = self.request("GET", "/metrics")[1]
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE).group(1))

  def close(self) -> None:
    self.server.drain()
    self.join()

  def join(self) -> None:
    self._thread.join(timeout=60)
    assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def engine(lively):
  """A warm engine with four rows, and pages for two or three of the longest requests; nobody else uses it while it serves."""
  engine = Engine(lively(), ByteTokenizer(), rows=4, capacity=CAPACITY, chunk=16, decode_steps=4, alternatives=3, prefixes=2,
                  prompt_logprobs=True, pages=5 * CAPACITY // 32, page=16)
  engine.warm_up()
  return engine


@pytest.fixture(scope="module")
def alone(engine):
  """Prompts and what they get alone, generated before the server starts: (prompt, options, text, reason, count)."""
  rng = np.random.default_rng(0)
  cases = []
  for i in range(40):
    prompt = "".join(chr(c) for c in rng.integers(32, 127, rng.integers(0, 100)))
    options = {"max_tokens": int(rng.integers(1, 40)), "seed": i, "temperature": float(rng.choice([0, 0.7, 1.3])),
               "top_p": float(rng.choice([1.0, 0.8])), "top_k": int(rng.choice([0, 5]))}
    if i % 4 == 0:
      options["stop"] = ["e", "qu"]
    sampling = Sampling(**options | {"stop": tuple(options.get("stop", ()))})
    completion, = engine.generate([prompt], sampling)
    cases.append((prompt, options, completion.text, completion.finish_reason, len(completion.tokens)))
  return cases


@pytest.fixture(scope="module")
def serving(engine, alone):
  serving = Serving(CompletionServer(engine, "lively", Limits(queue=60, request_timeout_s=60, body_mib=0.125)))
  yield serving
  serving.close()
  assert serving.code == 0
  assert not serving.server.thread.outstanding and serving.server.thread.failure is None


def test_the_official_client(serving, alone):
  """Text, lists, token ids, n, stop, seeds and usage are answered as the engine generates them."""
  client = serving.client
  for prompt, options, text, reason, count in alone[:4]:
    own = {name: options[name] for name in options if name != "top_k"}
    answer = client.completions.create(model="lively", prompt=prompt, extra_body={"top_k": options["top_k"]}, **own)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, reason)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (max(len(prompt), 1), count)
  one = client.completions.create(model="lively", prompt="one", **GREEDY).choices[0].text
  many = client.completions.create(model="lively", prompt=["one", "two"], n=2, **GREEDY)
  assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
  assert many.choices[0].text == many.choices[1].text == one != many.choices[2].text
  assert many.usage.prompt_tokens == 6 and many.usage.completion_tokens == 48
  ids = client.completions.create(model="lively", prompt=[list(b"two"), list(b"one")], **GREEDY)
  assert [choice.text for choice in ids.choices] == [many.choices[2].text, one]
  drawn = client.completions.create(model="lively", prompt="one", n=3, seed=7, max_tokens=20)
  second = client.completions.create(model="lively", prompt="one", seed=8, max_tokens=20)
  assert drawn.choices[1].text == second.choices[0].text != drawn.choices[0].text
  assert client.completions.create(model="lively", prompt="one").usage.completion_tokens <= 16


def test_streaming(serving, alone):
  """The events of a stream add up to the whole answer, for several choices mixed, with usage at the end."""
  client = serving.client
  for prompt, options, text, reason, count in alone[4:8]:
    own = {name: options[name] for name in options if name != "top_k"}
    events = list(client.completions.create(model="lively", prompt=prompt, stream=True, stream_options={"include_usage": True},
                                            extra_body={"top_k": options["top_k"]}, **own))
    assert "".join(event.choices[0].text for event in events[:-1]) == text
    assert [event.choices[0].finish_reason for event in events[:-1]][-1] == reason
    assert all(event.usage is None for event in events[:-1])
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == count
  whole = client.completions.create(model="lively", prompt="one", n=3, seed=3, max_tokens=20, logprobs=2)
  texts, tokens = [""] * 3, [[], [], []]
  for event in client.completions.create(model="lively", prompt="one", n=3, seed=3, max_tokens=20, logprobs=2, stream=True):
    choice = event.choices[0]
    texts[choice.index] += choice.text
    tokens[choice.index] += choice.logprobs.tokens
  assert texts == [choice.text for choice in whole.choices]
  assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_log_probabilities(serving, engine):
  """A drawn token is among the alternatives shown, and an echoed prompt has the log-probabilities of the same tokens drawn."""
  client = serving.client
  answer = client.completions.create(model="lively", prompt="abc", logprobs=2, **GREEDY).choices[0]
  logprobs = answer.logprobs
  assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
  for token, own, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
    legal = [p for t, p in top.items() if not t.startswith("token_id:") or int(t[9:]) <= 256]  # the padded rest never comes
    assert top[token] == own == max(legal) and 2 <= len(top) <= 3
  ascii_text = client.completions.create(model="lively", prompt="abc", logprobs=1, seed=1, max_tokens=12, echo=True,
                                         extra_body={"ignore_end": True}).choices[0]
  offsets = ascii_text.logprobs.text_offset
  assert ascii_text.text.startswith("abc") and offsets[:4] == [0, 1, 2, 3] and offsets == sorted(offsets)
  # The same prompt with its own continuation, scored: a long one, so that several chunks are.
  prompt = list(range(40, 90))
  free = client.completions.create(model="lively", prompt=prompt, logprobs=0, temperature=0, max_tokens=20,
                                   extra_body={"ignore_end": True}).choices[0]
  drawn = [256 if t == END_OF_TEXT else int(t[9:]) if t.startswith("token_id:") else ord(t) for t in free.logprobs.tokens]
  scored = client.completions.create(model="lively", prompt=prompt + drawn, logprobs=1, echo=True, max_tokens=0).choices[0]
  assert scored.logprobs.token_logprobs[0] is None and scored.logprobs.top_logprobs[0] is None
  assert len(scored.logprobs.tokens) == 70 and scored.finish_reason == "length"
  np.testing.assert_allclose(scored.logprobs.token_logprobs[50:], free.logprobs.token_logprobs, atol=1e-4)
  assert scored.text == ByteTokenizer().decode(prompt + drawn)


def test_models_health_and_metrics(serving):
  assert [model.id for model in serving.client.models.list()] == ["lively"]
  assert serving.client.models.retrieve("lively").owned_by == "atma_jax"
  assert serving.request("GET", "/health") == (200, '{"status":"ok"}')
  before = serving.metric("atma_completion_tokens_total")
  answer = serving.client.completions.create(model="lively", prompt="one", **GREEDY)
  assert serving.metric("atma_completion_tokens_total") == before + answer.usage.completion_tokens
  assert serving.metric('atma_requests_total{status="200"}') >= 1
  assert serving.metric('atma_sequences{state="decoding"}') == 0
  assert serving.metric("atma_request_seconds_count") >= 1


@pytest.mark.parametrize(("values", "status", "words"), [
  ({"model": "other"}, 404, ["model", "other", "lively"]),
  ({"max_tokens": 500}, 400, ["max_tokens=500", "192"]), ({"max_tokens": -1}, 400, ["max_tokens=-1"]),
  ({"max_tokens": 10**30}, 400, ["max_tokens"]), ({"max_tokens": True}, 400, ["max_tokens=true"]),
  ({"prompt": "x" * 300}, 400, ["300 tokens", "192"]), ({"prompt": []}, 400, ["prompt"]), ({"prompt": [1, "a"]}, 400, ["prompt"]),
  ({"prompt": [272]}, 400, ["from 0 to 271"]), ({"prompt": [-1]}, 400, ["from 0 to 271"]), ({"prompt": {}}, 400, ["prompt"]),
  ({"prompt": "\ud800"}, 400, ["surrogate"]), ({"prompt": [[]] * 99}, 400, ["99 prompts"]), ({"n": 0}, 400, ["n=0"]),
  ({"temperature": -1}, 400, ["temperature=-1"]), ({"temperature": "hot"}, 400, ["temperature"]),
  ({"temperature": 10**400}, 400, ["temperature"]), ({"temperature": 1e-300}, 400, ["temperature"]),
  ({"top_p": 0}, 400, ["top_p=0"]), ({"top_p": 1.5}, 400, ["top_p=1.5"]), ({"top_k": 1.5}, 400, ["top_k=1.5"]),
  ({"min_p": 2}, 400, ["min_p=2"]), ({"repetition_penalty": 1e-300}, 400, ["repetition_penalty"]),
  ({"logprobs": 4}, 400, ["logprobs=4", "0 to 3"]), ({"stop": ["a"] * 17}, 400, ["stop"]), ({"stop": [""]}, 400, ["stop"]),
  ({"stop": 3}, 400, ["stop"]), ({"seed": 2**70}, 400, ["seed"]), ({"stream": "yes"}, 400, ["stream"]),
  ({"stream_options": {"include_usage": True}}, 400, ["stream_options"]), ({"suffix": "x"}, 400, ["suffix"]),
  ({"best_of": 3}, 400, ["best_of"]), ({"presence_penalty": 1}, 400, ["presence_penalty"]),
  ({"frequency_penalty": 0.5}, 400, ["repetition_penalty"]), ({"logit_bias": {"5": 1}}, 400, ["logit_bias"]),
  ({"temprature": 1}, 400, ["temprature", "did you mean", "temperature"]),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_refusals(serving, values, status, words):
  """Bad requests are answered with the protocol's error object, whose one line names the field and what is legal."""
  got, body = serving.post(**{"prompt": "a", "max_tokens": 4} | values)
  assert got == status and body["error"].keys() == {"message", "type", "param", "code"}
  assert [word for word in words if word not in body["error"]["message"]] == [], body


def test_refusals_of_the_client(serving):
  """The official client raises the right exception for each."""
  create = serving.client.completions.create
  with pytest.raises(openai.NotFoundError, match="model"):
    create(model="other", prompt="a")
  with pytest.raises(openai.BadRequestError) as error:
    create(model="lively", prompt="a", max_tokens=1000)
  assert (error.value.code, error.value.param) == ("context_length_exceeded", "max_tokens")


@pytest.mark.parametrize(("method", "path", "body", "status"), [
  ("POST", "/v1/completions", b"", 400), ("POST", "/v1/completions", b"{", 400), ("POST", "/v1/completions", b"[1]", 400),
  ("POST", "/v1/completions", b'{"temperature": NaN}', 400), ("POST", "/v1/completions", b"\xff\xfe", 400),
  ("POST", "/v1/completions", b"[" * 100_000, 400), ("POST", "/v1/completions", b'{"seed": ' + b"9" * 10_000 + b"}", 400),
  ("POST", "/v1/completions", b'"' + b"x" * 200_000 + b'"', 413), ("GET", "/v1/completions", None, 405),
  ("GET", "/v1/nothing", None, 404), ("GET", "/v1/models/other", None, 404), ("POST", "/health", b"", 405)])
def test_malformed(serving, method, path, body, status):
  got, text = serving.request(method, path, body)
  assert got == status and json.loads(text)["error"]["message"]


def test_a_body_of_unknown_length_is_limited(serving):
  """A chunked transfer, whose size no Content-Length tells beforehand, is limited too."""
  connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
  with contextlib.closing(connection):
    connection.request("POST", "/v1/completions", iter([b" " * 50_000] * 4), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 413


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                    max_leaves=6)
NUMBERS = st.none() | st.integers(-2, 30) | st.floats() | st.integers() | st.text(max_size=2)
BODIES = st.fixed_dictionaries({}, optional={
  "prompt": st.text(max_size=30) | st.lists(st.integers(-1, 300), max_size=20) | st.lists(st.text(max_size=4), max_size=3) | JSON,
  "max_tokens": st.integers(-1, 20) | JSON, "stream": st.booleans() | JSON, "stop": st.text(max_size=2) | JSON,
  "echo": st.booleans() | JSON, "logprobs": st.integers(-1, 4) | JSON, "n": st.integers(-1, 4) | JSON,
  "seed": NUMBERS, "temperature": NUMBERS, "top_p": NUMBERS, "top_k": NUMBERS, "min_p": NUMBERS, "repetition_penalty": NUMBERS,
  "stream_options": JSON, "model": st.just("lively") | JSON, "other": JSON, "user": JSON, "best_of": NUMBERS})


@settings(max_examples=int(os.environ.get("ATMA_FUZZ_EXAMPLES", "60")), deadline=None, derandomize=True)
@given(values=BODIES)
def test_fuzzed_requests(serving, values):
  """Every request is answered or refused, and the server is well afterwards."""
  status, body = serving.request("POST", "/v1/completions", json.dumps(values).encode())
  assert status in (200, 400, 404), (status, body, values)
  assert_well_formed(status, body, values)
  assert serving.request("GET", "/health")[0] == 200


@settings(max_examples=30, deadline=None, derandomize=True)
@given(body=st.binary(max_size=80) | st.text(max_size=40).map(lambda text: f'{{"prompt": "{text}"}}'.encode(errors="replace")))
def test_fuzzed_bytes(serving, body):
  """Bytes that are not JSON are refused, and those that happen to be are served."""
  status, text = serving.request("POST", "/v1/completions", body)
  assert status in (200, 400), (status, text, body)


def test_nothing_is_left_after_the_fuzzing(serving):
  assert serving.idle()


def test_a_client_that_leaves_frees_its_row(serving):
  """It may leave in the middle of a stream, while waiting for a whole answer, or before its body has arrived."""
  cancelled = serving.metric('atma_requests_total{status="200"}')
  for stream in (True, False):
    body = json.dumps({"prompt": "one", "max_tokens": 180, "stream": stream, "n": 4, "ignore_end": True}).encode()
    with socket.create_connection(("127.0.0.1", serving.port)) as connection:
      connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
      if stream:
        assert b"200 OK" in connection.recv(1000)
      else:
        time.sleep(0.05)
    assert serving.idle()
  with socket.create_connection(("127.0.0.1", serving.port)) as connection:
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
  assert serving.idle()
  assert serving.metric('atma_requests_total{status="200"}') >= cancelled


def test_a_full_queue_and_a_late_answer(serving, monkeypatch):
  """A request that does not fit gets 429, one that takes too long 504, and accepted ones are served."""
  monkeypatch.setattr(serving.server, "limits", Limits(queue=0))
  started = threading.Event()
  answers = []

  def occupy():
    for event in serving.client.completions.create(model="lively", prompt="a", max_tokens=150, n=4, stream=True,
                                                   extra_body={"ignore_end": True}):
      answers.append(event)
      started.set()

  thread = threading.Thread(target=occupy)
  thread.start()
  assert started.wait(60)
  with pytest.raises(openai.RateLimitError, match="try again"):
    serving.client.completions.create(model="lively", prompt="b", max_tokens=1)
  thread.join()
  assert sum(event.choices[0].finish_reason == "length" for event in answers) == 4
  monkeypatch.setattr(serving.server, "limits", Limits(request_timeout_s=0.001))
  late = {"prompt": "a", "max_tokens": 150, "ignore_end": True}
  assert serving.post(**late)[0] == 504
  status, body = serving.request("POST", "/v1/completions", json.dumps(late | {"stream": True}).encode())
  assert status == 200 and '"code":"timeout"' in body and body.endswith("data: [DONE]\n\n")
  assert serving.idle()


def soak(serving: Serving, cases: list, count: int, concurrency: int, seed: int) -> dict[str, int]:
  """Sends `count` requests, abandons about a fifth of them half way, checks each, and returns how many ended how."""
  rng, ends = random.Random(seed), {"whole": 0, "left": 0}
  client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{serving.port}/v1", api_key="none", max_retries=0, timeout=300)

  async def one(index: int, gate: asyncio.Semaphore) -> None:
    prompt, options, text, reason, _ = cases[rng.randrange(len(cases))]
    leave, stream = rng.random() < 0.2, rng.random() < 0.5
    own = {name: options[name] for name in options if name != "top_k"}
    call = {"model": "lively", "prompt": prompt, "extra_body": {"top_k": options["top_k"]}, **own}
    async with gate:
      if leave and not stream:
        with contextlib.suppress(TimeoutError):
          async with asyncio.timeout(rng.random() * 0.1):
            await client.completions.create(**call)
        ends["left"] += 1
      elif stream:
        got, end, stop = "", [], rng.randrange(3) if leave else 10**9
        async with await client.completions.create(stream=True, **call) as events:
          async for event in events:
            got += event.choices[0].text
            end += [event.choices[0].finish_reason] if event.choices[0].finish_reason else []
            if (stop := stop - 1) < 0:
              break
        assert (text.startswith(got) and leave) or (got, end) == (text, [reason])
        ends["left" if leave else "whole"] += 1
      else:
        answer = await client.completions.create(**call)
        assert [(c.text, c.finish_reason) for c in answer.choices] == [(text, reason)]
        ends["whole"] += 1

  async def all_of_them() -> None:
    gate = asyncio.Semaphore(concurrency)
    async with client:
      await asyncio.gather(*(one(i, gate) for i in range(count)))

  asyncio.run(all_of_them())
  return ends


@pytest.mark.slow
def test_soak(serving, alone):
  """Requests in any company get what they get alone, abandoned ones free their rows, and nothing is compiled."""
  count = int(os.environ.get("ATMA_SOAK_REQUESTS", "200"))
  programs, arrays = compilations(), len(jax.live_arrays())
  ends = soak(serving, alone, count, concurrency=48, seed=0)
  assert sum(ends.values()) == count and ends["left"] > count / 10
  assert serving.idle() and compilations() == programs
  assert serving.metric("atma_free_pages") == serving.metric("atma_pages") == serving.server.engine.pages.total > 0
  assert len(jax.live_arrays()) < arrays + 2 * len(jax.tree.leaves(serving.server.engine.state))  # kept prefixes
  assert serving.metric('atma_sequences{state="decoding"}') == serving.metric("atma_outstanding") == 0


class Failing:
  """An engine whose device is lost at the first step."""

  def __init__(self, engine: Engine):
    self._engine, self.busy = engine, False

  def __getattr__(self, name: str):
    return getattr(self._engine, name)

  def submit(self, *arguments, **options) -> int:
    self.busy = True
    return 1

  def step(self):
    raise RuntimeError("device lost")


def test_an_engine_that_fails_ends_the_server(engine):
  """Every client is told, and the exit code says so too."""
  serving = Serving(CompletionServer(Failing(engine), "lively"))
  status, body = serving.post(prompt="a", n=3)
  assert (status, body["error"]["code"], body["error"]["type"]) == (500, "engine_failed", "server_error")
  serving.join()
  assert serving.code == 1


def start(checkpoint: pathlib.Path, *flags: str) -> tuple[subprocess.Popen, int]:
  """Starts the real command and waits until it serves; returns the process and its port."""
  process = subprocess.Popen([sys.executable, "-m", "atma_jax.serve", f"--checkpoint={checkpoint}", "--port=0", *flags],
                             cwd=REPOSITORY, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  lines = []
  for line in process.stderr:
    lines.append(line)
    if found := re.search(r"serving lively at http://127\.0\.0\.1:(\d+)/v1", line):
      return process, int(found.group(1))
  raise AssertionError("".join(lines))


@pytest.mark.slow
def test_sigterm_drains(checkpoint):
  """Running requests are finished, new ones are refused with 503, and the exit code is 0."""
  process, port = start(checkpoint, "--capacity=256", "--chunk=16", "--rows=1", "--stride=1", "--noprompt_logprobs",
                        "--prefixes=0")
  client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
  events = client.completions.create(model="lively", prompt="a", max_tokens=250, stream=True, seed=1, n=8,
                                     extra_body={"ignore_end": True})
  next(iter(events))
  process.send_signal(signal.SIGTERM)
  end, refused = time.monotonic() + 20, None
  while refused is None and time.monotonic() < end:
    try:
      client.completions.create(model="lively", prompt="b", max_tokens=1)
    except openai.InternalServerError as error:
      refused = error
  assert refused.status_code == 503 and refused.code == "draining"
  assert sum(event.choices[0].finish_reason == "length" for event in events) == 8
  assert process.wait(timeout=30) == 0
  assert "Traceback" not in process.stderr.read()


def test_illegal_limits():
  with pytest.raises(UserError, match="queue=-1: must be"):
    Limits(queue=-1)

"""What a server refuses before it serves, and the parts that keep it alive: flags, keys, sizes, bodies, ids without text."""

from __future__ import annotations

import json
import logging
import resource
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.data.tokenizers import ByteTokenizer, NamedTokenizer, train_sentencepiece
from atma_jax.errors import UserError
from atma_jax.inference.api import engine_for, fitting_engine
from atma_jax.inference.footprint import check_memory, sizes_within
from atma_jax.inference.text_stream import TextStream, decode_ids
from atma_jax.serving.access import Access, warn_of_strangers
from atma_jax.serving.bodies import count_values
from atma_jax.serving.connections import Connections
from atma_jax.serving.http import listen
from atma_jax.serving.limits import Limits
from atma_jax.serving.prompts import most_characters
from tests.small_model import SMALL, lively_model

RUNS = settings(max_examples=100, deadline=None, derandomize=True)


def one_line(error: UserError) -> bool:
  return "\n" not in str(error) and 0 < len(str(error)) < 600


@pytest.mark.parametrize("host", ["", " ", "a" * 300, "no such host", "256.0.0.1", "\u0130" * 70])
def test_hosts(host):
  """An empty host would be every interface of the machine."""
  with pytest.raises(UserError, match="--host="):
    listen(host, 0)


def test_strangers_are_warned_of(caplog, monkeypatch, tmp_path):
  """A server that others reach and that needs no key says so."""
  (tmp_path / "keys").write_text("0123456789abcdef")
  monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
  with caplog.at_level(logging.WARNING):
    warn_of_strangers("127.0.0.1", Access())
    warn_of_strangers("0.0.0.0", Access(str(tmp_path / "keys")))
    assert not caplog.records
    warn_of_strangers("0.0.0.0", Access())
  assert "--api_key_file" in caplog.text


@RUNS
@given(name=st.sampled_from(["queue", "request_timeout_s", "body_mib", "grace_s", "bodies_mib", "header_timeout_s",
                             "body_timeout_s", "idle_timeout_s", "connections", "connections_per_address"]),
       value=st.integers() | st.floats())
def test_limits(name, value):
  """Each is finite and in its range, or refused."""
  try:
    assert abs(getattr(Limits(**{name: value}), name)) < 1e8
  except UserError as error:
    assert str(error).startswith(f"{name}=") and "must be from" in str(error) and one_line(error)


@RUNS
@given(content=st.binary(max_size=60) | st.lists(st.sampled_from(["#c", "", " ", "key", "a b", "\u00e9"]), max_size=4).map(
  lambda lines: "\n".join(lines).encode()))
def test_files_of_keys(tmp_path_factory, content):
  """A file holds keys, or is refused; it never opens the server to everybody."""
  path = tmp_path_factory.mktemp("keys") / "keys"
  path.write_bytes(content)
  try:
    access = Access(str(path))
  except UserError as error:
    assert "--api_key_file=" in str(error) and one_line(error)
    return
  assert access.read_keys() and access.refusal({"path": "/v1/models", "headers": []}, access.read_keys()) is not None


@pytest.mark.parametrize("host", ["", " ", "a b", "a:80", "http://a", "a/b", "*", "*.", "a@b", "*.*", "[::1]", "a,b"])
def test_names_that_are_none(host):
  with pytest.raises(UserError, match="allowed_hosts="):
    Access(allowed_hosts=(host,))


def test_too_few_descriptors():
  """As many connections as there are descriptors for, and a word if these are too few."""
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    assert 8 <= Connections(Limits()).most < 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    with pytest.raises(UserError, match="ulimit -n"):
      Connections(Limits())
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_tokenizer_that_is_only_a_name():
  """It is refused before anything is built, as is one that cannot decode its own tokens."""
  with pytest.raises(UserError, match="only names its tokenizer"):
    fitting_engine(lively_model(), NamedTokenizer("gpt2"))

  class Broken(ByteTokenizer):
    def decode(self, ids: Any) -> str:
      raise RuntimeError("no text")

  with pytest.raises(UserError, match="cannot decode its token 0: no text"):
    most_characters(Broken(), 10)


@RUNS
@given(value=st.floats(), page=st.none() | st.integers(-2, 300), rows=st.integers(1, 10**12))
def test_memory_for_caches(value, page, rows):
  """Any number of GiB gives sizes, or is refused by name."""
  try:
    sizes = sizes_within(SMALL, value, rows=rows, page=page, shards=1, capacity=64)
    assert sizes["rows"] >= 1
  except UserError as error:
    assert str(error).startswith(("cache_gib=", "page=")) and one_line(error)


SIZES = st.fixed_dictionaries({
  "rows": st.integers(1, 2**31 - 1), "capacity": st.integers(2, 2**31 - 1), "prefixes": st.integers(0, 2**31 - 1),
  "chunk": st.integers(4, 30).map(lambda i: 1 << i), "first_chunk": st.none() | st.integers(4, 30).map(lambda i: 1 << i),
  "decode_steps": st.integers(1, 2**31 - 1), "alternatives": st.integers(0, 272), "prompt_logprobs": st.booleans(),
  "cache_dtype": st.sampled_from([None, "int8", "bfloat16"]), "pages": st.none(), "page": st.just(256)})


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=SIZES, only=st.sampled_from(["rows", "capacity", "prefixes", "chunk", "decode_steps", None]))
def test_sizes_of_engines(sizes, only):
  """What does not fit is refused by the name of what takes most; nothing is built to find out."""
  small = {"rows": 1, "capacity": 64, "prefixes": 0, "chunk": 16, "first_chunk": None, "decode_steps": 1}
  if only is not None:
    sizes = sizes | small | {only: sizes[only]}
  try:
    check_memory(SMALL, sizes, given={})
  except UserError as error:
    assert one_line(error) and str(error).startswith(f"{only or ''}") and "GiB" in str(error), (sizes, str(error))


def test_too_large_engines():
  """By the flag that the user has set."""
  model = lively_model()
  with pytest.raises(UserError, match=r"max_tokens: 1000000003 tokens .* GiB .* tokens would fit"):
    engine_for(model, ByteTokenizer(), 10**9 + 3, 1, prefixes=1)
  with pytest.raises(UserError, match="max_logprobs=100000: must be from 0 to 272"):
    fitting_engine(model, ByteTokenizer(), {"alternatives": "max_logprobs=100000"}, alternatives=100_000)
  with pytest.raises(UserError, match=r"cache_gib=1e\+09: needs about"):
    fitting_engine(model, ByteTokenizer(), dict.fromkeys(("rows", "capacity"), "cache_gib=1e+09"), rows=10**12)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) |
                    st.sampled_from(['"', "\\", '\\"', ",[{:", "\\\\"]),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


def number_of(value: Any) -> int:
  if isinstance(value, dict):
    return 1 + sum(map(number_of, value.values()))
  return 1 + sum(map(number_of, value)) if isinstance(value, list) else 1


@RUNS
@given(value=JSON, ascii_only=st.booleans())
def test_values_are_counted_before_they_are_made(value, ascii_only):
  """Never fewer than there are, and at most twice as many and one more."""
  text = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
  assert number_of(value) <= count_values(text) <= 2 * number_of(value) + 1


TOKENIZERS = [ByteTokenizer(), train_sentencepiece(["hello world, this is a small text. "] * 20, 290)]


@RUNS
@given(tokenizer=st.sampled_from(TOKENIZERS), ids=st.lists(st.integers(0, 400), max_size=90),
       stop=st.lists(st.sampled_from(["a", "\ufffd", "ab"]), max_size=2))
def test_any_ids_have_a_text(tokenizer, ids, stop):
  """An id that the tokenizer does not have is one replacement character, and a stream of ids never fails."""
  text = decode_ids(tokenizer, ids)
  assert text.count("\ufffd") >= sum(i >= tokenizer.vocab_size for i in ids)
  stream = TextStream(tokenizer, stop)
  pieces = [stream.push(i) for i in ids]
  whole = "".join([*pieces, stream.finish()])
  assert stop or whole == text or "\ufffd" in text  # bytes of which no character is made are decoded a few at a time

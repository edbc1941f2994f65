"""JSON from strangers: whatever a file holds, reading it ends in a value or in one line, soon, and never waits."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.errors import UserError
from atma_jax.json_input import MOST_DEPTH, MalformedJSON, left_out, mismatch, parse_json, parse_lines, read_json

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
                                                              inner, max_size=4), max_leaves=12)
SCHEMA = {"step": int, "loss": float | None, "name?": str, "parts?": [{"value": float}]}


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_json_comes_back(value):
  """What the standard library writes is read as it was."""
  assert parse_json(json.dumps(value)) == value
  assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(VALUES, st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_json(value, data):
  """Changed, cut and repeated bytes give a value or `MalformedJSON` of one line."""
  content = bytearray(json.dumps(value).encode())
  for _ in range(data.draw(st.integers(1, 4))):
    place = data.draw(st.integers(0, max(len(content) - 1, 0)))
    content[place:place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3)) * data.draw(st.sampled_from([1, 400]))
  try:
    parse_json(bytes(content))
  except MalformedJSON as error:
    assert str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(("content", "reason"), [
  (b"[" * 100_000 + b"]" * 100_000, f"more than {MOST_DEPTH} deep"),
  (b'{"a":' * 100_000, f"more than {MOST_DEPTH} deep"),
  (b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), f"more than {MOST_DEPTH} deep"),
  (b"1" * 10_000, "10000 digits"),
  (b"[18446744073709551616]", "64 bits"),
  (b"1e400", "too large"),
  (b"[NaN]", "NaN is no number"),
  (b"-Infinity", "is no number"),
  ('"\N{LATIN SMALL LETTER E WITH ACUTE}"'.encode("latin-1"), "not UTF-8 at byte 1"),
  ("[1]".encode("utf-16"), "not UTF-8"),
  (b'"\\ud800"', "surrogate"),
  (b"[" + b"1," * 4_000_001 + b"1]", "values"),
  (b"", "Expecting value, character 1"),
], ids=lambda value: value[:12] if isinstance(value, str) else None)
def test_malformed(content, reason):
  """Each kind of malformed text is named."""
  with pytest.raises(MalformedJSON, match=reason):
    parse_json(content)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_schema(value):
  """A mismatch is named in one line, and no value makes the check itself fail."""
  for candidate in (value, {"step": value, "loss": value}, {"step": 1, "loss": None, "parts": value}):
    problem = mismatch(candidate, SCHEMA)
    assert problem is None or len(problem.splitlines()) == 1
  assert mismatch({"step": 1, "loss": 2, "parts": [{"value": 0.5}], "more": value}, SCHEMA) is None


@pytest.mark.parametrize(("value", "problem"), [
  ([], "the value must be an object, not a list"),
  ({"loss": 1.0}, "field 'step' is missing"),
  ({"step": True, "loss": 1.0}, "field 'step' must be a whole number, not True"),
  ({"step": 1, "loss": "x"}, "field 'loss' must be a finite number or null, not 'x'"),
  ({"step": 1, "loss": 1, "parts": [{"value": None}]}, "field 'parts'[0].value must be a finite number, not null"),
])
def test_schema_names_the_field(value, problem):
  """The message leads to the place."""
  assert mismatch(value, SCHEMA) == problem


def test_lines():
  """Malformed lines are left out and counted."""
  content = b'{"step": 1, "loss": 1}\n\n[1]\n{"step": 2, "loss": null}\n{"step": 3, "lo'
  values, notes = parse_lines(content, lambda value: mismatch(value, SCHEMA))
  assert [value["step"] for value in values] == [1, 2]
  assert left_out("metrics.jsonl", values, notes) == (
    "2 of 4 records in metrics.jsonl are malformed and left out: line 3: the value must be an object, not a list")


def special_files(folder: pathlib.Path) -> list[str]:
  """A FIFO, a directory, a socket and devices."""
  os.mkfifo(folder / "fifo")
  (folder / "directory").mkdir()
  with socket.socket(socket.AF_UNIX) as bound:
    bound.bind(str(folder / "socket"))
  return [str(folder / "fifo"), str(folder / "directory"), str(folder / "socket"), "/dev/zero", "/dev/null"]


def test_what_is_no_file(tmp_path):
  """Nothing waits for a writer or reads without end."""
  started = time.monotonic()
  for path in (*special_files(tmp_path), str(tmp_path / "missing")):
    with pytest.raises(UserError, match=path) as caught:
      read_json(path)
    assert len(str(caught.value).splitlines()) == 1
  assert time.monotonic() - started < 2


def test_a_file_that_is_too_large(tmp_path):
  """A sparse file of 1 TiB is refused by its size."""
  with open(tmp_path / "large.json", "wb") as file:
    file.truncate(1 << 40)
  with pytest.raises(UserError, match=r"large\.json: is larger than 64 MiB"):
    read_json(tmp_path / "large.json")

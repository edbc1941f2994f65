"""JSON from files that nobody vouches for: bounded in size, depth and numbers, UTF-8, and checked against a schema.

Layer 0: standard library only. Whatever the file holds, reading it ends in a value or in an error of one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import hashlib
import json
import math
import os
import stat
import types
import typing
from typing import Any

from atma_jax.errors import UserError

MOST_BYTES = 64 << 20  # of a file, unless the caller allows more
MOST_VALUES = 4_000_000  # objects, lists and their items together; each takes up to about 100 bytes as a Python object
MOST_DEPTH = 64  # of lists and objects inside each other
LEAST_INTEGER, MOST_INTEGER = -(1 << 63), (1 << 64) - 1

_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string", dict: "an object",
          list: "a list", types.NoneType: "null"}

# A type, a union of types; [schema]: a list of such values; {"name": schema}: an object with these fields, where a name that
# ends in "?" may be missing; (schema, ...): any of these, None being null; an `atma_jax.config.Range`: numbers in it, whole
# ones if its bounds are. `float` takes whole numbers too, `int` takes no booleans; fields without a schema are ignored.
Schema = Any


class MalformedJSON(ValueError):
  """The text is not valid JSON, or not within the bounds; the message is the reason, in one line."""


def check_regular(path: str | os.PathLike[str], problem: Callable[[str], Exception] = UserError) -> None:
  """Raises `problem` of a line about a path that is a directory, FIFO, socket or device; a missing file is left to `open`."""
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):
    return
  _check_mode(mode, path, problem)


def _check_mode(mode: int, path: str | os.PathLike[str], problem: Callable[[str], Exception]) -> None:
  for is_kind, kind in _KINDS:
    if is_kind(mode):
      raise problem(f"{os.fspath(path)}: is {kind}, must be a file")


def read_bytes(path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES) -> bytes:
  """The content of a file; never waits for a FIFO or a device.

  Args:
    path: of a file.
    most_bytes: that it may have.

  Raises:
    OSError: it cannot be read.
    UserError: it is no file, or too large.
  """
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  with os.fdopen(descriptor, "rb") as file:
    _check_mode(os.fstat(descriptor).st_mode, path, UserError)
    content = file.read(most_bytes + 1) if os.fstat(descriptor).st_size <= most_bytes else b""
    if len(content) > most_bytes or os.fstat(descriptor).st_size > most_bytes:
      raise UserError(f"{os.fspath(path)}: is larger than {most_bytes / 2**20:g} MiB, the most that such a file may have")
  return content


def parse_json(content: bytes | str, *, most_values: int = MOST_VALUES, most_depth: int = MOST_DEPTH) -> Any:
  """The value that a JSON text spells.

  Args:
    content: UTF-8.
    most_values: about how many objects, lists and items there may be, which bounds the memory.
    most_depth: lists and objects that may be inside each other.

  Raises:
    MalformedJSON: it is not UTF-8, not JSON, too deep or too much, or has a number that is not finite or needs more than 64 bits.
  """
  try:
    text = content if isinstance(content, str) else content.decode()
  except UnicodeDecodeError as error:
    raise MalformedJSON(f"not UTF-8 at byte {error.start}") from error
  if sum(map(text.count, ",[{:")) > most_values:
    raise MalformedJSON(f"has more than {most_values:,} values")
  try:
    value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_constant)
  except json.JSONDecodeError as error:
    raise MalformedJSON(f"{error.msg}, character {error.pos + 1}") from error
  except RecursionError as error:
    raise MalformedJSON(f"lists and objects are more than {most_depth} deep") from error
  _check_depth_and_text(value, most_depth)
  return value


def read_json(path: str | os.PathLike[str], schema: Schema = None, *, most_bytes: int = MOST_BYTES) -> Any:
  """The value in a JSON file.

  Args:
    path: of the file.
    schema: that the value must match (see `Schema`); None takes any value.
    most_bytes: that the file may have.

  Raises:
    UserError: the file cannot be read, or holds no such value; the message begins with the path.
  """
  try:
    value = parse_json(read_bytes(path, most_bytes=most_bytes))
  except OSError as error:
    raise UserError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
  except MalformedJSON as error:
    raise UserError(f"{os.fspath(path)} is not valid JSON: {error}") from error
  if schema is not None and (problem := mismatch(value, schema)):
    raise UserError(f"{os.fspath(path)}: {problem}")
  return value


def json_digest(value: Any) -> str:
  """The sha256, in hexadecimal, of a JSON value; the order of an object's fields makes no difference."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parse_lines(content: bytes, problem: Callable[[Any], str | None]) -> tuple[list[Any], list[str]]:
  """The values of JSON lines, without those that are malformed.

  Args:
    content: of the file; empty lines count as nothing.
    problem: what is wrong with a value, or None; such as ``lambda value: mismatch(value, schema)``.

  Returns:
    The good values in order, and one note for each of the others, such as "line 7: field 'step' is missing".
  """
  values, notes = [], []
  for number, line in enumerate(content.split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      value = parse_json(line)
      wrong = problem(value)
    except MalformedJSON as error:
      wrong = f"not valid JSON: {error}"
    if wrong is None:
      values.append(value)
    else:
      notes.append(f"line {number}: {wrong}")
  return values, notes


def left_out(path: str | os.PathLike[str], values: list[Any], notes: list[str]) -> str:
  """One line about the records of `parse_lines` that are left out; "" if there are none."""
  if not notes:
    return ""
  are = "is" if len(notes) == 1 else "are"
  return f"{len(notes)} of {len(values) + len(notes)} records in {os.fspath(path)} {are} malformed and left out: {notes[0]}"


def mismatch(value: Any, schema: Schema, name: str = "") -> str | None:
  """What keeps a JSON value from matching a schema, in a few words that begin with the field; None if it matches."""
  where = name or "the value"
  if isinstance(schema, Mapping):
    if not isinstance(value, dict):
      return f"{where} must be an object, not {_kind(value)}"
    for key, inner in schema.items():
      field = key.removesuffix("?")
      if field not in value:
        if key == field:
          return f"{_joined(name, field)} is missing"
        continue
      if found := mismatch(value[field], inner, _joined(name, field)):
        return found
    return None
  if isinstance(schema, list):
    if not isinstance(value, list):
      return f"{where} must be a list, not {_kind(value)}"
    return next((found for i, item in enumerate(value) if (found := mismatch(item, schema[0], f"{where}[{i}]"))), None)
  if isinstance(schema, tuple):
    found = [mismatch(value, choice, name) for choice in schema]
    return None if None in found else found[0]
  if hasattr(schema, "allows"):
    whole = isinstance(schema.low, int) and isinstance(schema.high, int)
    if not _is_a(value, int if whole else float) or not schema.allows(value):
      return f"{where} must be {'a whole number' if whole else 'a number'} {schema.legal}, not {_kind(value)}"
    return None
  if schema is None:
    schema = types.NoneType
  choices = typing.get_args(schema) if isinstance(schema, types.UnionType) else (schema,)
  if any(_is_a(value, choice) for choice in choices):
    return None
  return f"{where} must be {' or '.join(_WORDS[choice] for choice in choices)}, not {_kind(value)}"


def _is_a(value: Any, kind: Any) -> bool:
  if kind is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
  return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _kind(value: Any) -> str:
  return f"{_WORDS.get(type(value), type(value).__name__)}" if not isinstance(value, (str, int, float)) else repr(value)[:60]


def _joined(name: str, field: str) -> str:
  return f"{name}.{field}" if name else f"field {field!r}"


def _integer(text: str) -> int:
  value = int(text) if len(text) <= 20 else MOST_INTEGER + 1
  if not LEAST_INTEGER <= value <= MOST_INTEGER:
    raise MalformedJSON(f"a whole number of {len(text.lstrip('-'))} digits needs more than 64 bits")
  return value


def _number(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise MalformedJSON(f"the number {text[:20]} is too large")
  return value


def _constant(text: str) -> float:
  raise MalformedJSON(f"{text} is no number of JSON")


def _check_depth_and_text(value: Any, most_depth: int) -> None:
  """Walks a value level by level, without recursion."""
  level: Iterable[Any] = (value,)
  for depth in range(most_depth + 1):
    inside: list[Any] = []
    for item in level:
      if isinstance(item, (dict, list)):
        if depth == most_depth:
          raise MalformedJSON(f"lists and objects are more than {most_depth} deep")
        inside.extend(item)
        inside.extend(item.values() if isinstance(item, dict) else ())
      elif isinstance(item, str) and not item.isascii():
        try:
          item.encode()
        except UnicodeEncodeError as error:
          raise MalformedJSON("a string is not Unicode: it has a lone surrogate") from error
    level = inside

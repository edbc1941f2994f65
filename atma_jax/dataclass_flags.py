"""Command-line flags made from the fields of a dataclass: name, type and default are the field's, the help is in its metadata."""

from __future__ import annotations

import ast
from collections.abc import Collection
import dataclasses
import types
import typing
from typing import Any

from absl import flags

flags.disclaim_key_flags()  # --help lists the flags under the main that defines them


def parse_as(text: str, hint: Any) -> Any:
  """The value of a type that a text spells.

  Args:
    text: of ``int | None``, a number or ``None``; of a tuple, ``a,b`` or ``('a', 'b')``; of a boolean, ``true`` or ``false``.
    hint: the type, as `typing.get_type_hints` gives it.

  Raises:
    ValueError, SyntaxError: the text spells no such value.
  """
  if isinstance(hint, types.UnionType):
    inner = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    return None if text == "None" else parse_as(text, inner)
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if text.startswith("("):
      items = ast.literal_eval(text)
      return tuple(parse_as(str(i), item) for i in (items if isinstance(items, tuple) else (items,)))
    return tuple(parse_as(part, item) for part in text.split(",") if part)
  if hint is bool:
    if text.lower() not in ("true", "false"):
      raise ValueError(text)
    return text.lower() == "true"
  return hint(text)


class FieldParser(flags.ArgumentParser):
  """Parses the text of a flag as a value of a field's type."""

  def __init__(self, hint: Any):
    self._hint = hint

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):  # a default
      return argument
    try:
      return parse_as(argument, self._hint)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
      raise ValueError(f"must be {self.flag_type()}") from error

  def flag_type(self) -> str:
    if self._hint is bool:
      return "true or false"
    return f"of type {self._hint.__name__ if type(self._hint) is type else self._hint}"


class _Serializer(flags.ArgumentSerializer):
  """Writes values as `parse_as` reads them."""

  def serialize(self, value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def define_field(name: str, hint: Any, default: Any, help: str) -> flags.FlagHolder[Any]:
  """Defines a flag that takes any value of a type; see `parse_as` for how values are written."""
  return flags.DEFINE(FieldParser(hint), name, default, help, serializer=_Serializer())


class DataclassFlags:
  """One flag for every field of a dataclass whose metadata have an entry ``help``."""

  def __init__(self, kind: type, *, repeated: Collection[str] = ()):
    """Defines the flags.

    Args:
      kind: the dataclass. A boolean field becomes ``--name`` and ``--noname``, a tuple a comma-separated list.
      repeated: tuple fields whose flag is given once per element instead, because an element may hold a comma.
    """
    hints = typing.get_type_hints(kind)
    self._kind = kind
    self._flags: dict[str, flags.FlagHolder[Any]] = {}
    for field in dataclasses.fields(kind):
      default: Any = field.default
      if "help" not in field.metadata:
        continue
      if field.name in repeated:
        flag = flags.DEFINE_multi_string(field.name, list(default), field.metadata["help"])
      elif hints[field.name] is bool:
        flag = flags.DEFINE_boolean(field.name, default, field.metadata["help"])
      else:
        flag = define_field(field.name, hints[field.name], default, field.metadata["help"])
      self._flags[field.name] = flag

  def values(self) -> dict[str, Any]:
    """The values of the flags by name."""
    return {name: tuple(flag.value) if isinstance(flag.value, list) else flag.value for name, flag in self._flags.items()}

  @property
  def value(self) -> Any:
    """The dataclass that the flags spell; whatever its constructor raises for values that are not legal is raised."""
    return self._kind(**self.values())

"""Flags of a dataclass take every value of its fields, and refuse anything else with the type that is legal."""

from __future__ import annotations

import pytest

from atma_jax.config import Config, leaves
from atma_jax.dataclass_flags import FieldParser, parse_as


@pytest.mark.parametrize(("text", "hint", "value"), [
  ("7", int, 7), ("0.5", float, 0.5), ("a,b", str, "a,b"), ("True", bool, True), ("false", bool, False),
  ("None", int | None, None), ("3", int | None, 3), ("", tuple[int, ...], ()), ("1,2", tuple[int, ...], (1, 2)),
  ("('a', 'b')", tuple[str, ...], ("a", "b")), ("(1.5,)", tuple[float, ...], (1.5,)), ("a", tuple[str, ...], ("a",)),
])
def test_texts(text, hint, value):
  assert parse_as(text, hint) == value


@pytest.mark.parametrize(("text", "hint", "legal"), [
  ("2.5", int, "of type int"), ("yes", bool, "true or false"), ("many", int | None, "int | None"),
  ("1,x", tuple[int, ...], r"tuple\[int, ...\]"), ("(1,", tuple[int, ...], r"tuple\[int, ...\]"),
])
def test_texts_of_no_such_value(text, hint, legal):
  with pytest.raises(ValueError, match=f"must be .*{legal}"):
    FieldParser(hint).parse(text)


def test_every_option_has_a_help_and_its_default_is_written_as_it_is_read():
  for leaf in leaves(Config()):
    assert leaf.help[0].isupper() and leaf.help.endswith("."), leaf.name
    text = ",".join(map(str, leaf.value)) if isinstance(leaf.value, tuple) else str(leaf.value)
    assert FieldParser(leaf.hint).parse(text) == leaf.value, leaf.name

"""Recipes that raise, whatever they raise: one line with the file and the line in it."""

from __future__ import annotations

import os
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.cli import load_recipe, whole_numbers
from atma_jax.config import Config
from atma_jax.errors import UserError

RAISING = {
  "SystemExit: 3": "raise SystemExit(3)", "KeyError: 'size'": "{}['size']", "FileNotFoundError": "open('/no/such/file')",
  "RecursionError": "get_config()", "ValueError: no such size": "raise ValueError('no such size')",
  "ZeroDivisionError": "1 / 0", "NameError": "nonsense", "AttributeError": "Config().modle", "ImportError": "import nonsense",
  "AssertionError": "assert False", "StopIteration": "next(iter(()))", "GeneratorExit": "raise GeneratorExit",
  "ValueError: two lines": "raise ValueError('two\\nlines')", "Odd": "raise Odd", "TypeError": "Config(nonsense=1)",
  "MemoryError": "raise MemoryError", "BaseException: x": "raise BaseException('x')",
}


@pytest.mark.parametrize("inside", [True, False], ids=["get_config", "module"])
@pytest.mark.parametrize("reason", RAISING)
def test_recipes_that_raise(tmp_path, reason, inside):
  """The line is that of the recipe, also where a library raises."""
  code = RAISING[reason]
  if code == "get_config()" and not inside:
    code = "exec('def f(): f()\\nf()')"
  lines = ["from atma_jax.config import Config", "class Odd(Exception):", "  def __str__(self): 1 / 0", "def get_config():",
           f"  {code if inside else 'return Config()'}", code if not inside else ""]
  path = tmp_path / "recipe.py"
  path.write_text("\n".join(lines))
  with pytest.raises(UserError) as caught:
    load_recipe(str(path))
  message = str(caught.value)
  assert message.startswith(f"--config={path}: line {5 if inside else 6}: ") and len(message) < 600
  assert reason.partition(":")[0].replace("ImportError", "ModuleNotFoundError") in message and "\n" not in message


@pytest.mark.parametrize(("content", "words"), [
  (b"def get_config(:\n", ["line 1"]), (b"", ["get_config"]), (b"x = 1\n\x00", ["recipe.py"]), (b"\xff\xfe", ["recipe.py"]),
  (b"def get_config():\n  return 5\n", ["must return an atma_jax.config.Config"]), (b"get_config = 5\n", ["TypeError"]),
  (b"x = " + b"(" * 5000 + b"\n", ["recipe.py"]), (b"x = " + b"-" * 200_000 + b"1\n", ["recipe.py"]),
])
def test_files_that_are_no_recipes(tmp_path, content, words):
  (tmp_path / "recipe.py").write_bytes(content)
  with pytest.raises(UserError) as caught:
    load_recipe(str(tmp_path / "recipe.py"))
  assert all(word in str(caught.value) for word in words)


def test_special_files(tmp_path):
  """A FIFO is not waited for."""
  os.mkfifo(tmp_path / "recipe.py")
  started = time.monotonic()
  for path in (tmp_path / "recipe.py", tmp_path, "/dev/null"):
    with pytest.raises(UserError, match="must be a file"):
      load_recipe(str(path))
  assert time.monotonic() - started < 1


@pytest.mark.parametrize("value", ["None", "5", "'x'", "[1]", "{}"])
def test_groups_of_options_that_are_something_else(tmp_path, value):
  """A recipe may put anything anywhere."""
  for field in ("model", "model.memory", "data.sources", "train.steps", "name", "model.block_pattern", "train.foreign_keys"):
    (tmp_path / "recipe.py").write_text(
      f"from atma_jax.config import Config\ndef get_config():\n  c = Config()\n  c.{field} = {value}\n  return c\n")
    try:
      config = load_recipe(str(tmp_path / "recipe.py")).validate()
      assert isinstance(config, Config)
    except UserError as error:
      assert f"config.{field}" in str(error) and "must be" in str(error)


@given(st.lists(st.text(max_size=5) | st.integers().map(str), max_size=4))
@settings(max_examples=100, deadline=None)
def test_lists_of_numbers(texts):
  """What a list flag gives is one number or more, each of which can be a length."""
  try:
    numbers = whole_numbers("multiples", texts)
  except UserError as error:
    assert str(error).startswith("--multiples=")
  else:
    assert numbers and all(1 <= number < 2**31 for number in numbers)

"""Recipes by name, by path and as JSON: what is printed is taken back, and what is no recipe is one line."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import typing

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.config import Config, Leaf, Range, leaves
from atma_jax.errors import UserError
from atma_jax.recipe_files import load_recipe, recipe_folder, recipe_names, to_json

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def with_values(values: dict[str, object]) -> Config:
  """The default configuration with other values in some fields."""
  config = Config()
  for name, value in values.items():
    *path, field = name.split(".")[1:]
    setattr(functools.reduce(getattr, path, config), field, value)
  return config


def any_value(leaf: Leaf) -> st.SearchStrategy:
  """Values that the field's own rule and type allow."""
  choices = typing.get_args(leaf.hint) or (leaf.hint,)
  kind = next(kind for kind in (bool, int, float, str) if kind in choices)
  if isinstance(leaf.rule, Range):
    if kind is int:
      found = st.integers(int(leaf.rule.low) + leaf.rule.above_low, int(leaf.rule.high) - leaf.rule.below_high)
    else:
      found = st.floats(leaf.rule.low, leaf.rule.high, exclude_min=leaf.rule.above_low, exclude_max=leaf.rule.below_high)
  elif kind is bool:
    found = st.booleans()
  else:
    found = st.text(max_size=20) if leaf.rule is None else st.just(leaf.value)
  if typing.get_origin(leaf.hint) is tuple:
    return st.lists(found, min_size=1, max_size=3).map(tuple) if isinstance(leaf.rule, Range) else st.just(leaf.value)
  return found | st.none() if type(None) in choices else found


@given(st.lists(st.sampled_from(list(leaves(Config()))).flatmap(lambda leaf: st.tuples(st.just(leaf.name), any_value(leaf))),
                max_size=8).map(dict))
@settings(max_examples=100, deadline=None)
def test_every_configuration_is_taken_back(tmp_path_factory, values):
  """Bit for bit, whatever some of its fields hold."""
  path = tmp_path_factory.getbasetemp() / "round.json"
  config = with_values(values)
  path.write_text(to_json(config))
  assert load_recipe(str(path)) == config


def test_recipes_by_name():
  """Every recipe of the folder has a name, which finds what its path finds; a file in the current folder goes before."""
  assert {"quickstart", "atma_378m", "atma_378m_nope", "debug"} <= set(recipe_names())
  for name in recipe_names():
    assert load_recipe(name).validate() == load_recipe(str(recipe_folder() / f"{name}.py")).validate()


@pytest.mark.parametrize(("recipe", "words"), [
  ("quickstrt", ["'quickstrt'", "did you mean 'quickstart'?", "atma_378m", ".json"]),
  ("elsewhere/quickstart.py", ["elsewhere/quickstart.py: no such file", "--config=quickstart"]),
  ("absent.json", ["absent.json: no such file"]),
  ("", ["no such file"]), ("quick start", ["no such file"]), ("../x\0y", ["--config"]),
])
def test_what_is_not_there(tmp_path, monkeypatch, recipe, words):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError) as caught:
    load_recipe(recipe)
  assert [word for word in words if word not in str(caught.value)] == []


def test_a_crowded_folder_is_not_listed(tmp_path, monkeypatch):
  for i in range(100):
    (tmp_path / f"{i}.py").touch()
  with pytest.raises(UserError, match="and 80 more") as caught:
    load_recipe(str(tmp_path / "absent.py"))
  assert len(str(caught.value)) < 40 * (len(str(tmp_path)) + 10)


@pytest.mark.parametrize(("content", "words"), [
  (b"", ["not valid JSON"]), (b"[1]", ["config", "object"]), (b'{"modle": {}}', ["modle", "did you mean 'model'?"]),
  (b'{"model": {"width": "wide"}}', ["config.model.width='wide'", "int"]), (b'{"model": 5}', ["config.model=5", "object"]),
  (b'{"train": {"steps": 1e999}}', ["not valid JSON", "too large"]), (b"\xff\xfe", ["UTF-8"]),
  (b'{"model": {"block_pattern": [["local"]]}}', ["config.model.block_pattern"]),
  (b'{"train": {"foreign_keys": "ab"}}', ["config.train.foreign_keys"]), (b"[" * 100_000, ["not valid JSON", "deep"]),
])
def test_json_that_is_no_recipe(tmp_path, content, words):
  path = tmp_path / "recipe.json"
  path.write_bytes(content)
  with pytest.raises(UserError) as caught:
    load_recipe(str(path)).validate()
  assert [word for word in words if word not in str(caught.value)] == [] and "\n" not in str(caught.value)
  assert str(caught.value).count(str(path)) <= 1


def test_print_config(main, tmp_path):
  """Mains print the recipe, do nothing else, and take the file."""
  overrides = ["--config.model.attention=nope", "--config.train.validation_lengths=1,3"]
  done = main("train", "--config=debug", *overrides, "--print_config")
  assert done.returncode == 0 and done.stderr == ""
  printed = json.loads(done.stdout)
  assert printed["model"]["attention"] == "nope" and printed["train"]["validation_lengths"] == [1, 3]
  (tmp_path / "mine.json").write_text(done.stdout)
  assert main("prepare_data", f"--config={tmp_path}/mine.json", "--print_config").stdout == done.stdout
  bad = main("train", f"--config={tmp_path}/mine.json", "--print_config", "--config.train.steps=0")
  assert bad.returncode == 2 and "config.train.steps" in bad.stderr and bad.stdout == ""


def test_a_typo_is_answered_at_once():
  """Before JAX and what else takes seconds is imported."""
  code = ("import sys; sys.argv = ['train', '--config=quickstrt', '--workdir=x']; import runpy\n"
          "try: runpy.run_module('atma_jax.train', run_name='__main__', alter_sys=True)\n"
          "finally: print(*sorted({'jax', 'flax', 'orbax', 'numpy', 'tensorboardX'} & set(sys.modules)))")
  done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 2 and "did you mean 'quickstart'" in done.stderr and done.stdout.split() == []


def test_every_field_is_explained(main):
  """--help says of every field what it is, and its default."""
  said = " ".join(main("train", "--help").stdout.split())
  for leaf in leaves(Config()):
    assert leaf.help and f"--{leaf.name}: {' '.join(leaf.help.split())[:30]}" in said


def test_a_recipe_is_read_as_it_is(tmp_path, monkeypatch):
  """A change that keeps size and time of the file counts, and nothing is left beside it."""
  monkeypatch.setattr(sys, "dont_write_bytecode", False)
  path = tmp_path / "recipe.py"
  for steps in (100, 200):
    path.write_text(f"from atma_jax.config import Config, TrainConfig\n"
                    f"def get_config():\n  return Config(train=TrainConfig(steps={steps}))\n")
    os.utime(path, (1e9, 1e9))
    assert load_recipe(str(path)).train.steps == steps
  assert list(tmp_path.iterdir()) == [path]

"""A configuration survives storage, also by a version in which a field did not exist yet; bounds; sizes of the recipes."""

from __future__ import annotations

import math
import pathlib

import jax
import pytest

from atma_jax.cli import load_recipe
from atma_jax.config import Config
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition


def test_stored_configuration_comes_back():
  config = Config(name="other")
  config.model.block_pattern = ("global",)
  assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("field", "value"), [("null_length", 0), ("count_length", 0), ("window", -1)])
def test_bounds_are_positive(field, value):
  config = Config()
  setattr(config.model, field, value)
  with pytest.raises(UserError, match=rf"model\.{field}={value}: must be None or at least 1"):
    config.validate()


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_direction_has_a_length(value):
  config = Config()
  config.model.direction_scale = value
  with pytest.raises(UserError, match=rf"model\.direction_scale={value}: must be greater than 0"):
    config.validate()


def test_a_field_newer_than_the_checkpoint_gets_its_default():
  values = Config().to_dict()
  del values["model"]["scan"], values["model"]["memory"]["gamma_bias"]
  assert Config.from_dict(values) == Config()


def test_a_field_this_version_does_not_have_is_named():
  values = Config().to_dict()
  values["model"]["atention"] = "polar"
  with pytest.raises(UserError, match=r"'atention'.*did you mean 'attention'"):
    Config.from_dict(values)


@pytest.mark.parametrize(("recipe", "millions"), [("atma_378m", 378.22), ("atma_7b", 7094.85)])
def test_recipes_have_the_size_they_state(recipe, millions):
  config = load_recipe(str(pathlib.Path(__file__).parent.parent / "configs" / f"{recipe}.py")).validate()
  definition = ModelDefinition(config.model)
  shapes = jax.eval_shape(definition.init, jax.random.key(0)).values()
  assert sum(math.prod(shape.shape) for shape in shapes) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_7b_recipe_trains_twenty_tokens_a_parameter():
  config = load_recipe(str(pathlib.Path(__file__).parent.parent / "configs" / "atma_7b.py")).validate()
  tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
  assert tokens == pytest.approx(20 * 7.09485e9, rel=0.01)

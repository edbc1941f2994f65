"""The configuration survives storage, and storage from before a field existed."""

from __future__ import annotations

import pytest

from atma_jax.config import Config, UserError


def test_stored_configuration_comes_back():
  config = Config(name="other")
  config.model.block_pattern = ("global",)
  assert Config.from_dict(config.to_dict()) == config


def test_a_field_newer_than_the_checkpoint_gets_its_default():
  values = Config().to_dict()
  del values["model"]["scan"], values["model"]["memory"]["gamma_bias"]
  assert Config.from_dict(values) == Config()


def test_a_field_this_version_does_not_have_is_named():
  values = Config().to_dict()
  values["model"]["atention"] = "polar"
  with pytest.raises(UserError, match=r"'atention'.*did you mean 'attention'"):
    Config.from_dict(values)

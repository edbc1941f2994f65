"""A model loaded with other values of its fields: what changes, what is refused, and what the flags hand over."""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import numpy as np
import pytest

from atma_jax.checkpoints.load import load_model, overridden
from atma_jax.checkpoints.overrides import OVERRIDES, RECORDED, checked_overrides, in_effect
from atma_jax.checkpoints.store import save_model
from atma_jax.config import Config, MemoryConfig, ModelConfig, RetentionCap
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.models import Atma

CONFIG = ModelConfig(vocab_size=257, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                     block_pattern=("local", "global"), activation_dtype="float32")


def abstract(**changes: object) -> Atma:
  """A model of shapes, which is all that a refusal looks at."""
  return nnx.eval_shape(lambda: Atma(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model() -> Atma:
  """A model in which no parameter is zero."""
  graphdef, params = nnx.split(abstract(), nnx.Param)
  rng = np.random.default_rng(1)
  return nnx.merge(graphdef, jax.tree.map(lambda p: jax.numpy.asarray(rng.normal(size=p.shape) * 0.4, p.dtype), params))


def logits(model: Atma) -> np.ndarray:
  """Of 24 tokens."""
  graphdef, state = nnx.split(model)
  tokens = np.random.default_rng(0).integers(1, 257, (1, 24))
  return np.asarray(jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state))


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
  """A checkpoint of a model that was trained in a window."""
  folder = tmp_path_factory.mktemp("checkpoint") / "run"
  config = Config(name="windowed", model=dataclasses.replace(CONFIG, window=5, null_length=12))
  save_model(folder, config, overridden(model, {"window": 5, "null_length": 12}), ByteTokenizer(), 3)
  return folder


@pytest.mark.parametrize("name", ["null_length", "count_length"])
def test_counts_of_a_model(model, name):
  changed = overridden(model, {name: 8})
  assert getattr(changed.config, name) == 8
  before, after = logits(model), logits(changed)
  np.testing.assert_array_equal(after[:, :8], before[:, :8])
  assert not np.array_equal(before, after)
  for value in (None, 0, "none"):
    assert overridden(changed, {name: value}).config == model.config
  assert overridden(model, {}).config == model.config


@pytest.mark.parametrize("name", ["null_length", "count_length"])
def test_counts_of_a_model_that_does_not_count(name):
  with pytest.raises(UserError, match=f"{name}=8: only polar attention counts its keys, and the model's is nope"):
    overridden(abstract(attention="nope"), {name: 8})
  with pytest.raises(UserError, match=f"{name}=8: only polar attention counts its keys, and the model has no attention"):
    overridden(abstract(block_pattern=("raven",)), {name: 8})


def test_a_window_needs_attention():
  raven = abstract(block_pattern=("raven",))
  assert overridden(raven, {"window": None}).config.window is None
  with pytest.raises(UserError, match="window=8: only attention has a window"):
    overridden(raven, {"window": 8})


@pytest.mark.parametrize(("overrides", "message"), [
  ({"nul_length": 8}, "override 'nul_length' does not exist; did you mean 'null_length'.* retention_cap, window"),
  ({"null_length": -1}, "--null_length=-1: must be a number of keys, or 0"),
  ({"count_length": 2.5}, "--count_length=2.5: must be a number of keys, or 0"),
  ({"window": True}, "--window=True: must be a number of keys, or 0"),
  ({"window": "all"}, "--window=all: must be a number of keys, or 0"),
  ({"memory_reset": -8}, "--memory_reset=-8: must be a number of tokens, or 0 for never"),
  ({"memory_off": 1}, "--memory_off=1: must be true or false"),
  ({"retention_cap": 0}, "--retention_cap=0: must be a half-life in tokens, greater than 0"),
  ({"retention_cap": math.inf}, "--retention_cap=inf: must be a half-life"),
  ({"retention_cap": "long"}, "--retention_cap=long: must be a half-life"),
])
def test_what_is_not_legal_is_refused_before_anything_is_read(overrides, message):
  with pytest.raises(UserError, match=message):
    checked_overrides(overrides)
  with pytest.raises(UserError, match=message):
    load_model("nowhere", overrides=overrides)


@pytest.mark.parametrize(("name", "value"), [("memory_reset", 8), ("memory_off", True)])
def test_controls_of_the_memory(model, name, value):
  changed = overridden(model, {name: value})
  assert in_effect(changed.config) == {name: value} and in_effect(model.config) == {}
  assert not np.allclose(logits(changed)[:, 9:], logits(model)[:, 9:])
  for without in (None, "none"):
    assert overridden(changed, {name: without}).config == model.config
  for changes, reason in (({"memory": MemoryConfig(enabled=False)}, "the model has no memory"),
                          ({"block_pattern": ("local",)}, "only global and raven blocks have a memory")):
    with pytest.raises(UserError, match=f"--{name}={value}: {reason}"):
      overridden(abstract(**changes), {name: value})


def test_none_stands_for_without():
  assert checked_overrides({"window": "none", "null_length": 0, "count_length": None, "retention_cap": "none"}) == {
    "window": None, "null_length": None, "count_length": None, "retention_cap": None}
  assert checked_overrides({"retention_cap": 256}) == {"retention_cap": RetentionCap(256)}


@pytest.mark.slow
def test_fields_of_a_loaded_model(workdir):
  loaded = load_model(workdir)
  config, model, tokenizer, step = loaded
  assert (loaded.config, loaded.model, loaded.tokenizer, loaded.step) == (config, model, tokenizer, step)
  assert (config.name, config.model, step) == ("windowed", model.config, 3) and in_effect(model.config) == {
    "window": 5, "null_length": 12}
  full = load_model(workdir, overrides={"window": None, "count_length": 6})
  assert full.config.model == full.model.config and in_effect(full.model.config) == {"null_length": 12, "count_length": 6}
  capped = load_model(workdir, overrides={"retention_cap": 0.05})
  assert capped.model.config == model.config
  for other in (full.model, capped.model):
    assert not np.array_equal(logits(model), logits(other))


def test_recorded_fields_are_fields_of_the_model():
  assert set(RECORDED) <= {field.name for field in dataclasses.fields(ModelConfig)} and set(RECORDED) <= OVERRIDES.keys()

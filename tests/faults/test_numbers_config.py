"""Numbers of a configuration: every field has a finite range, and what lies outside of it ends in one line, at once."""

from __future__ import annotations

import copy
import dataclasses
import math
import pathlib
import time
import types
import typing

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import pytest

from atma_jax.cli import load_recipe
from atma_jax.config import Config, DataConfig, Leaf, MeshConfig, ModelConfig, Range, TrainConfig, leaves
from atma_jax.errors import UserError
from atma_jax.memory_needs import check_generation_fits, check_training_fits, device_bytes, generation_needs, training_needs
from atma_jax.models.cache import Cache, nbytes
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh
from atma_jax.training.state import abstract_state, optimizer_for
from atma_jax.training.train_step import make_train_step

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def number_type(hint: object) -> type | None:
  """`int` or `float` if the values of a field are numbers, or tuples of numbers; else None."""
  choices = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is tuple else (hint,)
  return next((kind for kind in (int, float) if kind in choices), None)


NUMBERS = [leaf for leaf in leaves(Config()) if number_type(leaf.hint)]


def out_of_range(leaf: Leaf) -> st.SearchStrategy:
  """Numbers that a field refuses: past a bound, by little or by much, and what is no number at all."""
  rule, kind = leaf.rule, number_type(leaf.hint)
  if kind is int:
    past = st.integers(max_value=math.ceil(rule.low) - (not rule.above_low)) | st.integers(min_value=math.floor(rule.high) + 1)
    past |= st.sampled_from([2**63, 2**64, -(2**63), 10**400, -(10**5000)])
  else:
    past = st.floats(max_value=rule.low, exclude_max=not rule.above_low)
    past |= st.floats(min_value=rule.high, exclude_min=not rule.below_high)
    past |= st.sampled_from([math.inf, -math.inf, math.nan, 1e308, 10**5000])
  return st.tuples(past) if typing.get_origin(leaf.hint) is tuple else past


def with_value(name: str, value: object) -> Config:
  """The default configuration with another value in the field of a dotted name."""
  config = Config()
  owner: object = config
  *path, field = name.split(".")[1:]
  for part in path:
    owner = getattr(owner, part)
  setattr(owner, field, value)
  return config


@pytest.mark.parametrize("leaf", NUMBERS, ids=lambda leaf: leaf.name)
def test_every_number_has_a_range(leaf):
  """Finite bounds, in the metadata of the field."""
  assert isinstance(leaf.rule, Range), f"{leaf.name} needs a range: config.within(low, high)"
  assert math.isfinite(leaf.rule.low) and math.isfinite(leaf.rule.high) and leaf.rule.low < leaf.rule.high
  assert leaf.value is None or leaf.rule.allows(leaf.value)


@given(st.data())
@settings(max_examples=300, deadline=2000)
def test_out_of_range(data):
  """One line that names the field and the legal values."""
  leaf = data.draw(st.sampled_from(NUMBERS), label="field")
  value = data.draw(out_of_range(leaf), label=leaf.name)
  with pytest.raises(UserError) as caught:
    with_value(leaf.name, value).validate()
  message = str(caught.value)
  assert message.startswith(f"{leaf.name}=") and "must be" in message and len(message.splitlines()) == 1 and len(message) < 600


@given(st.data())
@settings(max_examples=200, deadline=2000)
def test_a_legal_number_is_judged_at_once(data):
  """Alone in its range, a number is accepted or refused in one line, also by the estimate of the memory."""
  leaf = data.draw(st.sampled_from(NUMBERS), label="field")
  bound = data.draw(st.sampled_from([leaf.rule.low, leaf.rule.high]))
  kind = number_type(leaf.hint)
  value = kind(bound) if kind is int else float(bound)
  config = with_value(leaf.name, (value,) if typing.get_origin(leaf.hint) is tuple else value)
  try:
    check_training_fits(config.validate())
  except UserError as error:
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("value", [0, -2])
def test_a_mesh_axis_has_devices(value):
  with pytest.raises(UserError, match=rf"config\.mesh\.tensor={value}: must be -1"):
    Config(mesh=MeshConfig(tensor=value)).validate()


SMALL = Config(model=ModelConfig(vocab_size=512, num_layers=4, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128),
               data=DataConfig(batch_size=4, sequence_length=64), train=TrainConfig(steps=10, ema_decay=0.9))


@pytest.mark.parametrize(("pattern", "kind", "attention"), [
  (("local", "local", "global"), "muon", "polar"), (("global",), "adamw", "rope"), (("raven", "local"), "muon", "nope")])
def test_estimate_of_the_state(pattern, kind, attention):
  """Parameters, optimizer and average are within 10 % of the arrays of the training state, and not more."""
  config = copy.deepcopy(SMALL)
  config.model.block_pattern, config.model.attention, config.optimizer.kind = pattern, attention, kind
  definition = ModelDefinition(config.model)
  state = abstract_state(config, definition, optimizer_for(config, definition), make_mesh())
  parts = training_needs(config).parts
  for name, tree in (("parameters", state.params), ("average of parameters", state.ema), ("optimizer", state.opt_state)):
    real = nbytes(tree)
    assert 0.9 * real <= parts[name] <= real, name


@pytest.mark.parametrize(("pattern", "window"), [(("local", "global"), None), (("global",), 128), (("raven", "local"), None)])
def test_estimate_of_the_cache(pattern, window):
  """Within 15 % of a cache's arrays, and not more."""
  model = dataclasses.replace(SMALL.model, block_pattern=pattern, window=window)
  for dtype in ("float32", "int8"):
    real = nbytes(jax.eval_shape(lambda dtype=dtype: Cache.create(model, 3, 1024, dtype)))
    assert 0.85 * real <= generation_needs(model, 3, 1024, dtype).parts["cache"] <= real


def test_estimate_of_a_step():
  """Never more than the compiled step takes, and at least an eighth of it; of a model this small, most is temporary."""
  mesh, config = make_mesh(), copy.deepcopy(SMALL)
  config.model.block_pattern, config.optimizer.kind = ("local",), "adamw"  # quick to compile
  with jax.set_mesh(mesh):
    definition = ModelDefinition(config.model)
    optimizer = optimizer_for(config, definition)
    state = abstract_state(config, definition, optimizer, mesh)
    tokens = jax.ShapeDtypeStruct((config.data.batch_size, config.data.sequence_length + 1), "int32")
    memory = make_train_step(config, definition, optimizer, mesh, state).lower(state, tokens).compile().memory_analysis()
  real = (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
  assert real / 8 <= training_needs(config).total <= real


@pytest.mark.parametrize(("recipe", "devices", "tokens", "gib"), [
  ("atma_378m", 1, 65_536, 42.5), ("atma_7b", 128, None, 28.8), ("atma_raven_titans", 1, 65_536, 28),
  ("raven_native", 1, 65_536, 16)])
def test_estimates_of_the_recipes(recipe, devices, tokens, gib):
  """What the recipes' docstrings say that a step takes of a device is one to three times the estimate."""
  config = load_recipe(f"{REPOSITORY}/configs/{recipe}.py").validate()
  if tokens is not None:
    config.data.batch_size, config.train.accumulation = tokens // config.data.sequence_length, 1
  assert gib / 3 <= training_needs(config, devices).total / 2**30 <= gib


@pytest.mark.parametrize(("name", "value"), [
  ("config.model.width", 1 << 20), ("config.model.vocab_size", 1 << 28), ("config.model.mlp_width", 1 << 24),
  ("config.data.batch_size", 2**31 - 1), ("config.data.sequence_length", 2**31 - 1)])
def test_too_large_for_this_machine(name, value):
  """The message says what is needed and what there is, without anything being built."""
  started = time.monotonic()
  with pytest.raises(UserError, match=r"needs at least [\d,]+\.\d\d GiB \(.*\), but this machine has [\d,]+\.\d\d GiB"):
    check_training_fits(with_value(name, value).validate())
  assert time.monotonic() - started < 2


def test_a_cache_too_large_for_this_machine():
  with pytest.raises(UserError, match=r"1 rows of 100000000000 tokens needs at least .* GiB"):
    check_generation_fits(SMALL.model, 1, 100_000_000_000)


def test_what_fits_is_not_refused():
  available, _ = device_bytes()
  assert available is not None and training_needs(SMALL).total < available
  check_training_fits(SMALL)
  assert generation_needs(SMALL.model, 8, 4096).total < available
  check_generation_fits(SMALL.model, 8, 4096)


def test_shards_share_the_state():
  """With everything split over eight devices, one of them holds an eighth of the parameters."""
  split = copy.deepcopy(SMALL)
  split.mesh = MeshConfig(data=1, fsdp=-1)
  assert training_needs(split, 8).parts["parameters"] == training_needs(SMALL).parts["parameters"] / 8

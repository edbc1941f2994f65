"""What the public code would compute otherwise is named and refused; with --lossy it is written, and read back."""

from __future__ import annotations

import dataclasses
import functools
import json

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.checkpoints.load import overridden
from atma_jax.checkpoints.store import save_model
from atma_jax.config import Config, MemoryConfig, ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.models import Atma, layers, mixers
from atma_jax.models.mixers import Mixer, register_mixer
from atma_jax.pytorch import read_published, to_published, write_published
from atma_jax.pytorch.published_limits import published_layers, uncarried, uncarried_fields

# A small model of the published proportions, in which every field below has an effect.
PLAIN = ModelConfig(vocab_size=11, num_layers=4, width=16, num_heads=4, num_kv_heads=1, head_dim=4, mlp_width=64)
OTHER = {"null_length": 7, "count_length": 9, "direction_scale": 2.0, "memory.max_half_life": 64.0, "memory_reset": 5,
         "memory_off": True, "logit_cap": 20.0, "norm_eps": 1e-5, "mlp_width": 48, "num_kv_heads": 2, "head_dim": 8,
         "block_pattern": ("local", "global")}
CARRIED = {"vocab_size": 12, "num_layers": 6, "attention": "nope", "window": 3, "conv_taps": 2, "canon_taps": 2,
           "activation_dtype": "float32", "param_dtype": "bfloat16", "memory.gamma_bias": 1.0, "memory.beta_bias": 0.5,
           "memory.enabled": False}


def changed(fields: dict) -> ModelConfig:
  """`PLAIN` with other values of some fields, by dotted name."""
  model = dataclasses.replace(PLAIN, memory=MemoryConfig())
  for name, value in fields.items():
    owner, _, leaf = name.rpartition(".")
    setattr(getattr(model, owner) if owner else model, leaf, value)
  return model


def built(model: ModelConfig) -> Atma:
  """A model with normal parameters."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(model, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(0)
  return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params))


@given(st.lists(st.sampled_from(sorted(OTHER)), unique=True), st.lists(st.sampled_from(sorted(CARRIED)), unique=True))
@settings(max_examples=100, deadline=None)
def test_every_field_that_acts_is_named(other, carried):
  """Each field of which the public code has one value is named if it acts in the model, and none that it reads."""
  model = changed({name: OTHER[name] for name in other} | {name: CARRIED[name] for name in carried})
  Config(model=model).validate()
  named = {found.removeprefix("config.model.").partition("=")[0] for found in uncarried_fields(model)}
  idle = set() if model.attention == "polar" else {"null_length", "count_length", "direction_scale"}
  idle |= set() if model.memory.enabled else {"memory.max_half_life", "memory_reset", "memory_off"}
  assert named - {"num_heads"} == set(other) - idle - {"head_dim"}
  assert ("num_heads" in named) == ("head_dim" in other)


@pytest.mark.parametrize(("fields", "named"), [
  (["null_length"], "null_length"), (["head_dim"], "num_heads"), (["block_pattern"], "block_pattern"),
  (list(OTHER), "num_heads")])
def test_refused_or_lossy(tmp_path, fields, named):
  model = changed({name: OTHER[name] for name in fields})
  config, atma = Config(model=model), built(model)
  with pytest.raises(UserError, match=rf"^--lossy is needed, because .*config\.model\.{named}=[^\n]* \(there: [^\n]*\)$"):
    write_published(tmp_path / "out", "pytorch", config, atma, ByteTokenizer(), 0)
  assert not list(tmp_path.iterdir())
  write_published(tmp_path / "out", "pytorch", config, atma, ByteTokenizer(), 0, lossy=True)
  again, loaded, _ = read_published(tmp_path / "out")
  assert again.model == model
  for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (atma, loaded)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_defaults_of_the_format_are_the_published_model():
  assert uncarried_fields(ModelConfig()) == [] and published_layers(ModelConfig()) == "atma"
  assert not set(to_published(Config())) & {"block_pattern", "logit_cap", "num_heads", "raven_slots"}


def test_fields_that_do_not_act_are_kept(tmp_path):
  """They are written in fields of ours without a complaint."""
  model = changed({"attention": "rope", "memory.enabled": False, "direction_scale": 2.0, "memory_reset": 5})
  write_published(tmp_path / "out", "pytorch", Config(model=model), built(model), ByteTokenizer(), 0)
  assert read_published(tmp_path / "out")[0].model == model


def test_a_cap_at_inference_is_named(tmp_path):
  model = overridden(built(PLAIN), {"retention_cap": 20.0})
  assert uncarried(model) == ["retention_cap (there: none)"]
  with pytest.raises(UserError, match="retention_cap"):
    write_published(tmp_path / "out", "pytorch", Config(model=PLAIN), model, ByteTokenizer(), 0)


class Scale(Mixer):
  """A foreign mixer whose parameters have axes and names of every sort."""

  def __init__(self, config, *, rngs):
    for name, shape in (("kernel", (2, 3)), ("filter", (2, 3, 4)), ("weights", (3,))):
      setattr(self, name, layers.parameter(config, rngs, layers.ones, shape, (None,) * len(shape), "vector"))
    self.inner = layers.DepthwiseFilter(config, 3, 5, rngs=rngs)

  def __call__(self, x, cache=None, span=None, trace=None):
    return x, None


class Twice(Mixer):
  """A foreign mixer of which two parameters would have the same published name."""

  def __init__(self, config, *, rngs):
    self.kernel, self.weight = (layers.parameter(config, rngs, layers.ones, (3,), (None,), "vector") for _ in range(2))


@pytest.fixture
def foreign():
  for kind, mixer in (("scale", Scale), ("twice", Twice)):
    register_mixer(kind)(mixer)
  yield
  for kind in ("scale", "twice"):
    del mixers.MIXERS[kind]


def test_foreign_kinds(tmp_path, foreign):
  model = changed({"block_pattern": ("scale", "local"), "num_layers": 3})
  write = functools.partial(write_published, tmp_path / "out", "pytorch", Config(model=model), built(model), ByteTokenizer(), 0)
  with pytest.raises(UserError, match=r"config\.model\.block_pattern=\('scale', 'local'\) \(there: "):
    write()
  write(lossy=True)
  again, loaded, _ = read_published(tmp_path / "out")
  assert again.model == model
  for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (built(model), loaded)), strict=True):
    np.testing.assert_array_equal(a, b)
  model = changed({"block_pattern": ("twice",)})
  with pytest.raises(UserError, match=r"two parameters of a block have the published name 'blocks\.0\.attn\.weight'"):
    write_published(tmp_path / "twice", "pytorch", Config(model=model), built(model), ByteTokenizer(), 0, lossy=True)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_command(main, tmp_path):
  """``convert`` refuses in one line with exit code 2, and writes with ``--lossy``."""
  model = changed({"null_length": 7, "memory.max_half_life": 64.0})
  save_model(tmp_path / "ours", Config(model=model), built(model), ByteTokenizer(), 3)
  flags = f"--input={tmp_path / 'ours'}", f"--output={tmp_path / 'out'}"
  result = main("convert", *flags)
  message = "config.model.null_length=7 (there: None), config.model.memory.max_half_life=64.0 (there: None)"
  assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
  assert not (tmp_path / "out").exists()
  result = main("convert", *flags, "--lossy")
  assert result.returncode == 0 and "null_length=7" in result.stderr, result.stderr
  assert json.loads((tmp_path / "out" / "config.json").read_text())["attn_null_length"] == 7

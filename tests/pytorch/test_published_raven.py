"""Raven under its published names: round trips keep every bit, logits are those of PyTorch, other variants are refused.

The golden checkpoints ``checkpoint_*raven*`` hold what a PyTorch restatement of the published mixer wrote with the published
code's tensor names and configuration, and its logits in float64.
"""

from __future__ import annotations

import functools
import json
import pathlib

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.cli import load_recipe
from atma_jax.config import Config, MemoryConfig, ModelConfig
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.pytorch import (
  from_state_dict,
  model_config,
  parameter_names,
  read_published,
  read_state_dict,
  to_state_dict,
  write_published,
)
from atma_jax.pytorch.archive import open_state_dict
from atma_jax.pytorch.published_config import from_published
from atma_jax.pytorch.published_limits import published_layers, uncarried_fields

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
NAMES = ["raven_native", "atma_raven", "atma_raven_titans"]


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(golden, tmp_path, name):
  source = golden.folder / f"checkpoint_{name}"
  config, model, tokenizer = read_published(source)
  assert config.data.sequence_length == 2048 and config.model.memory.enabled == name.endswith("titans")
  write_published(tmp_path / "out", "pytorch", config, model, tokenizer, 0)
  old, new = (read_state_dict(folder / "weights.pt") for folder in (source, tmp_path / "out"))
  assert old.keys() == new.keys() and old["embed.weight"].dtype == "bfloat16"
  for tensor in old:
    assert (old[tensor].dtype, old[tensor].tobytes()) == (new[tensor].dtype, new[tensor].tobytes()), tensor
  published, written = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
  assert {field: value for field, value in written.items() if field not in ("sketch_dim", "dtype")}.items() <= published.items()
  assert model_config(tmp_path / "out" / "config.json", new) == config.model


@pytest.mark.parametrize("name", NAMES)
def test_float64_logits(golden, name, x64):
  folder = golden.folder / f"checkpoint_{name}"
  tensors, expected = read_state_dict(folder / "weights.pt"), golden(f"checkpoint_{name}/expected.npz")
  config = model_config(folder / "config.json", tensors)
  config.activation_dtype = config.param_dtype = "float64"
  logits = from_state_dict(tensors, config)(jnp.asarray(expected["tokens"], jnp.int32))
  np.testing.assert_allclose(logits, expected["logits"], atol=1e-12)


def test_the_model_card_names_the_mixer(golden, tmp_path):
  write_published(tmp_path / "out", "safetensors", *read_published(golden.folder / "checkpoint_atma_raven_titans"), 3)
  assert "routed slot memory (Raven) and gated-delta memory" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("fields", "message"), [
  ({"feature_map": "relu"}, "feature_map='relu' is not supported; legal: 'swish'"),
  ({"router_score": "softmax"}, "router_score='softmax' is not supported"),
  ({"router_type": "mlp"}, "router_type='mlp' is not supported"),
  ({"decay_type": "GLA"}, "decay_type='GLA' is not supported; legal: 'Mamba2'"),
  ({"bias_rmm": True}, "bias_rmm=True is not supported; legal: False"),
  ({"arch_type": "gdn2_native"}, "arch_type='gdn2_native': must be one of raven_native, atma_raven, atma_raven_titans"),
  ({"arch_type": ["atma_raven"]}, "must be one of"),
  ({"arch_type": "atma_raven"}, r"unexpected tensor 'blocks\.2\.attn\.mem\."),
  ({"arch_type": "raven_native"}, r"unexpected tensor 'blocks\.0\.attn\."),
  ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads=3"),
  ({"num_heads": 5}, "num_heads=5: must divide hidden_size=32"),
  ({"num_heads": 0}, "num_heads=0"),
  ({"num_heads": "4"}, "num_heads='4'"),
  ({"num_kv_heads": 2}, r"attn\.k_proj\.weight' gives shape"),
  ({"num_kv_heads": None}, r"attn\.k_proj\.weight' gives shape"),
  ({"num_slots": 4}, r"attn\.r_proj\.weight' gives shape"),
  ({"topk": 9}, "raven.top_k=9: must be at most"),
  ({"topk": "absent"}, "field 'topk' is missing"),
  ({"seq_len": -1}, "seq_len: "),
  ({"dtype": "int8"}, "activation_dtype='int8'"),
])
def test_wrong_configurations(golden, tmp_path, fields, message):
  source = golden.folder / "checkpoint_atma_raven_titans"
  values = json.loads((source / "config.json").read_text()) | ({"num_kv_heads": 1} | fields)
  (tmp_path / "config.json").write_text(json.dumps({field: value for field, value in values.items() if value != "absent"}))
  for name in ("weights.pt", "tokenizer.json"):
    (tmp_path / name).write_bytes((source / name).read_bytes())
  with pytest.raises(UserError, match=message) as caught:
    read_published(tmp_path)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["raven_native", "atma_raven_titans"])
def test_the_recipes_are_the_published_models(name):
  model = load_recipe(str(GOLDEN.parent.parent / "configs" / f"{name}.py")).model
  assert published_layers(model) == name and uncarried_fields(model) == []
  names = {tensor for tensors, _ in parameter_names(model).values() for tensor in tensors}
  assert {"blocks.2.attn.A_log", "blocks.2.attn.r_proj.weight", "blocks.14.attn.o_proj.weight"} <= names
  assert ("blocks.2.attn.mem.proj.weight" in names) == name.endswith("titans")


def test_raven_elsewhere_is_written_in_names_of_ours(tmp_path):
  """With attention in the same model, or with memory in every layer, the public code has no name for it; we read it back."""
  tokenizer = read_published(GOLDEN / "checkpoint_raven_native")[2]
  for pattern in (("raven",), ("global", "raven", "local")):
    model = ModelConfig(vocab_size=7, num_layers=3, width=16, num_heads=4, num_kv_heads=1, head_dim=4, mlp_width=64,
                        block_pattern=pattern, memory=MemoryConfig(enabled=True))
    model.raven.slots, model.raven.top_k = 6, 2
    config, atma = _built(model)
    with pytest.raises(UserError, match=r"--lossy is needed, .*memory\.enabled=True|--lossy is needed, .*block_pattern="):
      write_published(tmp_path / "strict", "pytorch", config, atma, tokenizer, 0)
    folder = tmp_path / "-".join(pattern)
    write_published(folder, "pytorch", config, atma, tokenizer, 0, lossy=True)
    again, loaded, _ = read_published(folder)
    assert again.model == model
    for a, b in zip(to_state_dict(atma)[1], to_state_dict(loaded)[1], strict=True):
      np.testing.assert_array_equal(a, b)
  assert not (tmp_path / "strict").exists()


def _built(model: ModelConfig) -> tuple[Config, Atma]:
  """A configuration and a model with normal parameters."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(model, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(0)
  return Config(model=model), nnx.merge(graphdef, jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params))


FIELDS = ["arch_type", "attn_type", "attn_window", "bias_rmm", "block_pattern", "conv_kernel_size", "decay_type", "dtype",
          "hidden_size", "mem_beta_bias", "mem_gamma_bias", "num_heads", "num_hidden_layers", "num_kv_heads", "num_slots",
          "raven_slots", "raven_top_k", "topk", "vocab_size"]
ODD = st.sampled_from([None, True, -1, 0, 1, 3, 1e30, 2**31, 2**63, 1.5, float("nan"), "x", "", [], [1], ["local"], [["raven"]],
                       {}, "float128", "absent"])


@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_configurations_of_other_types(name, fields):
  """A configuration that is legal, or one line that names its source."""
  published, tensors = opened(name)
  try:
    config = from_published({k: v for k, v in (published | fields).items() if v != "absent"}, tensors, "FILE")
    Config(model=config).validate()
  except UserError as error:
    assert str(error).startswith("FILE") and len(str(error).splitlines()) == 1 and len(str(error)) < 1000


@functools.cache
def opened(name: str) -> tuple[dict, dict]:
  """The fields and the tensors of a golden checkpoint."""
  folder = GOLDEN / f"checkpoint_{name}"
  return json.loads((folder / "config.json").read_text()), open_state_dict(folder / "weights.pt")

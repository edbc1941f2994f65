"""Conversion: round trips keep every bit, other libraries read the files, and an error is one line that names what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import pathlib
import pickle
import pickletools
import shutil
import struct
import zipfile

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from atma_jax.checkpoints.load import load_model
from atma_jax.checkpoints.store import save_model
from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig
from atma_jax.data.tokenizers import ByteTokenizer, NamedTokenizer, tokenizer_from_dict
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.ops import rotary_embedding
from atma_jax.pytorch import (
  FORMATS,
  from_state_dict,
  is_published,
  load_pytorch,
  model_config,
  read_published,
  read_state_dict,
  to_state_dict,
  write_published,
)
from atma_jax.pytorch.archive import write_safetensors, write_state_dict
from atma_jax.pytorch.published_tensors import angular_frequencies

GOLDEN = ["polar_mem1_win0", "polar_mem0_win0", "nope_mem1_win0", "rope_mem1_win0", "rope_mem1_win0_as_published"]
ROTARY = "blocks.2.attn.rotary.angular_freq"


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


@pytest.mark.parametrize("kind", ["pytorch", "safetensors"])
@pytest.mark.parametrize("name", GOLDEN)
def test_published_to_published(golden, tmp_path, name, kind):
  source, target = golden.folder / f"checkpoint_{name}", tmp_path / "out"
  config, model, tokenizer = read_published(source)
  write_published(target, kind, config, model, tokenizer, 0)
  read = {"pytorch": read_state_dict, "safetensors": safetensors.numpy.load_file}[kind]
  again = read(target / FORMATS[kind])
  as_published = golden.folder / ("checkpoint_rope_mem1_win0_as_published" if name.startswith("rope") else source.name)
  same_bits(read_state_dict(as_published / "weights.pt"), again)
  published, written = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
  assert published.items() <= written.items() and (kind == "safetensors" or published == written)
  assert (source / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
  assert model_config(target / "config.json", again) == config.model


def test_through_our_checkpoint(golden, tmp_path):
  """Published to ours and back to published, each read as evaluation reads it."""
  source = golden.folder / "checkpoint_polar_mem1_win0"
  config, model, tokenizer = read_published(source)
  save_model(tmp_path / "ours", config, model, tokenizer, 0)
  config, model, tokenizer, step = load_model(tmp_path / "ours")
  assert step == 0 and config.data.sequence_length == 1024 and isinstance(tokenizer, NamedTokenizer)
  write_published(tmp_path / "back", "pytorch", config, model, tokenizer, step)
  same_bits(read_state_dict(source / "weights.pt"), read_state_dict(tmp_path / "back" / "weights.pt"))
  assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
  with pytest.raises(UserError, match="holds checkpoints already"):
    save_model(tmp_path / "ours", config, model, tokenizer, 0)


@pytest.mark.parametrize("name", GOLDEN[:1])
def test_a_published_directory_is_a_checkpoint(golden, name):
  source = golden.folder / f"checkpoint_{name}"
  config, model, _, step = load_model(source)
  assert is_published(source) and step == 0 and config.model.attention == "polar"
  for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(load_pytorch(source))), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(UserError, match=r"--step=3: .* one step, 0"):
    load_model(source, 3)


@pytest.mark.parametrize(("attention", "memory", "window", "layers", "dtype"), [
  ("rope", False, None, 4, "float32"), ("rope", True, 7, 6, "bfloat16"), ("nope", False, 5, 3, "float16"),
  ("polar", True, 1, 8, "bfloat16")])
def test_every_kind_of_model(tmp_path, attention, memory, window, layers, dtype):
  """Round trips of incomplete repetitions of the block pattern, narrow dtypes, and fields that the published format lacks."""
  model = ModelConfig(vocab_size=19, num_layers=layers, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24,
                      attention=attention, window=window, param_dtype=dtype, logit_cap=20.0, direction_scale=2.5, count_length=9,
                      memory=MemoryConfig(enabled=memory, gamma_bias=2.5, max_half_life=64.0 if memory else None))
  config = Config(model=model, data=DataConfig(sequence_length=32))
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(model, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
  for kind in ("pytorch", "safetensors"):
    write_published(tmp_path / kind, kind, config, nnx.merge(graphdef, params), ByteTokenizer(), 5, lossy=True)
    again, loaded, tokenizer = read_published(tmp_path / kind)
    assert again.model == model and again.data.sequence_length == 32 and isinstance(tokenizer, ByteTokenizer)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(nnx.state(loaded, nnx.Param)), strict=True):
      assert a.dtype == b.dtype and a.tobytes() == np.asarray(b).tobytes()


def test_weights_are_laid_out_as_pytorch_lays_them_out(golden, tmp_path):
  """Members, alignment and opcodes are those of a file that PyTorch wrote."""
  source = golden.folder / "checkpoint_polar_mem1_win0" / "weights.pt"
  tensors = read_state_dict(source)
  write_state_dict(tmp_path / "weights.pt", [(n, t.shape, t.dtype) for n, t in tensors.items()], tensors.values())
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "weights.pt") as new:
    optional = {"weights/.format_version", "weights/.storage_alignment", "weights/.data/serialization_id"}
    assert set(old.namelist()) - optional == set(new.namelist())
    for name in new.namelist():
      info = new.getinfo(name)
      with open(tmp_path / "weights.pt", "rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
      assert info.compress_type == zipfile.ZIP_STORED and (info.header_offset + 30 + name_length + extra_length) % 64 == 0
      assert name.endswith("data.pkl") or old.read(name) == new.read(name)
    memo = {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
    calls = [[op.name for op, _, _ in pickletools.genops(z.read("weights/data.pkl")) if op.name not in memo] for z in (old, new)]
    kept = [[name for name in ops if name in ("BINPERSID", "REDUCE", "TUPLE", "NEWFALSE", "SETITEMS", "SETITEM", "MARK")]
            for ops in calls]
    assert kept[0] == kept[1]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_pytorch_reads_what_was_written(tmp_path):
  import torch
  tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full((3, 1, 4), 1.5, ml_dtypes.bfloat16)}
  write_state_dict(tmp_path / "weights.pt", [(n, t.shape, t.dtype) for n, t in tensors.items()], tensors.values())
  loaded = torch.load(tmp_path / "weights.pt", weights_only=True)["model"]
  assert loaded["b"].dtype == torch.bfloat16
  assert all(np.array_equal(loaded[name].float().numpy(), tensor.astype(np.float32)) for name, tensor in tensors.items())


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_autoconfig_describes_the_export(golden, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
  import transformers
  write_published(tmp_path / "out", "safetensors", *read_published(golden.folder / "checkpoint_rope_mem1_win0"), 7)
  described = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
  assert described.model_type == "atma" and described.num_attention_heads == 4 and described.attn_type == "rope"


def test_the_export_describes_itself(golden, tmp_path):
  write_published(tmp_path / "out", "safetensors", *read_published(golden.folder / "checkpoint_nope_mem1_win0"), 7)
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields["model_type"] == "atma" and fields["architectures"] == ["AtmaForCausalLM"]
  module, name = fields["auto_map"]["AutoConfig"].split(".")
  assert f"class {name}(PretrainedConfig)" in (tmp_path / "out" / f"{module}.py").read_text()
  card = (tmp_path / "out" / "README.md").read_text()
  assert card.startswith("---\n") and "softmax attention without positions and gated-delta memory" in card and "step 7" in card


# --- Errors name what is wrong ------------------------------------------------------------------------------------------

TENSORS = {"a": np.ones((2, 3), np.float32)}


def rewrite(path: pathlib.Path, change) -> None:
  """Rewrites a zip file; `change` maps a member's name and content to its new content, or to None to leave it out."""
  with zipfile.ZipFile(path) as old:
    members = {info.filename: old.read(info) for info in old.infolist()}
  with zipfile.ZipFile(path, "w") as new:
    for name, content in members.items():
      if (content := change(name, content)) is not None:
        new.writestr(name, content)


class Evil:
  def __init__(self, *call):
    self.call = call

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("content", [
  {"model": Evil(print, ("owned",))}, {"model": {"a": Evil(eval, ("1",))}}, {"model": {"a": 3}}, {"model": {1: None}}, [], 3,
  {"state": {}}])
def test_hostile_and_foreign_pickles(tmp_path, capsys, content):
  path = tmp_path / "weights.pt"
  write_state_dict(path, [("a", (2, 3), np.dtype(np.float32))], TENSORS.values())
  rewrite(path, lambda name, old: pickle.dumps(content, 2) if name.endswith("data.pkl") else old)
  with pytest.raises(UserError, match=r"weights\.pt: "):
    read_state_dict(path)
  assert "owned" not in capsys.readouterr().out


@pytest.mark.parametrize(("what", "old", "new"), [
  ("global", b"ctorch\nFloatStorage", b"ctorch\nLongStorage"), ("global", b"c_rebuild_tensor_v2", b"c_rebuild_tensor_v2"),
  ("storage", b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00fileobj"), ("shape", b"K\x02K\x03\x86", b"K\x63K\x03\x86"),
  ("strides", b"K\x03K\x01\x86", b"K\x63K\x01\x86"), ("offset", b"QK\x00", b"QK\x09"), ("arguments", b"QK\x00", b"Q]"),
  ("size", b"K\x06t", b"K\x05t"), ("key", b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"), ("cut", b"su.", b"s"),
  ("callee", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n")])
def test_damaged_pickles(tmp_path, what, old, new):
  path = tmp_path / "weights.pt"
  write_state_dict(path, [("a", (2, 3), np.dtype(np.float32))], TENSORS.values())
  if what == "cut":
    rewrite(path, lambda name, content: content[:-1] if name.endswith("data.pkl") else content)
  elif old == new:
    rewrite(path, lambda name, content: None if name.endswith("/0") else content)
  else:
    rewrite(path, lambda name, content: content.replace(old, new, 1) if name.endswith("data.pkl") else content)
  with pytest.raises(UserError, match=r"weights\.pt: not a PyTorch checkpoint"):
    read_state_dict(path)


def test_flipped_bytes_of_a_tensor_are_found(tmp_path):
  path = tmp_path / "weights.pt"
  write_state_dict(path, [("a", (2, 3), np.dtype(np.float32))], TENSORS.values())
  path.write_bytes(path.read_bytes().replace(np.float32(1).tobytes(), np.float32(2).tobytes(), 1))
  with pytest.raises(UserError, match="tensor 'a' is damaged"):
    read_state_dict(path)


def copy(golden, tmp_path, **fields) -> pathlib.Path:
  """A golden checkpoint with some fields of its configuration replaced; the value "absent" leaves one out."""
  target = tmp_path / "copy"
  shutil.copytree(golden.folder / "checkpoint_polar_mem1_win0", target, copy_function=shutil.copyfile)
  config = json.loads((target / "config.json").read_text()) | fields
  (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
  return target


@pytest.mark.parametrize(("fields", "message"), [
  ({"hidden_size": "absent"}, "field 'hidden_size' is missing"),
  ({"hidden_size": "64"}, "config.model.width='64'"),
  ({"hidden_size": 32}, r"gives shape \(97, 64\), the configuration wants \(97, 32\)"),
  ({"num_hidden_layers": 10_000}, r"tensor 'blocks\.4\.norm1\.weight' is missing"),
  ({"num_hidden_layers": 1_000_000_000}, r"config\.model\.num_layers=1000000000: must be"),
  ({"num_hidden_layers": 3}, r"unexpected tensor 'blocks\.3\."),
  ({"attn_type": "linear"}, "config.model.attention='linear': must be one of polar, nope, rope"),
  ({"attn_type": "nope"}, r"unexpected tensor 'blocks\.2\.attn\."),
  ({"mem_enabled": False}, r"unexpected tensor 'blocks\.2\.attn\.mem"),
  ({"attn_window": 0}, "config.model.window=0"),
  ({"head_dim": 0}, "config.model.head_dim=0"),
  ({"wall_gate_bias": 1.0}, "wall_gate_bias=1.0 is not supported; legal: null"),
  ({"polar_variant": "fixed_null"}, "polar_variant='fixed_null' is not supported; legal: \"full\""),
  ({"arch_type": "mamba3_native"}, "arch_type='mamba3_native': must be one of raven_native, atma_raven, atma_raven_titans"),
  ({"max_position_embeddings": -1}, "max_position_embeddings"),
])
def test_wrong_configurations(golden, tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    read_published(copy(golden, tmp_path, **fields))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '"x"', "\x00"])
def test_malformed_json(golden, tmp_path, content):
  folder = copy(golden, tmp_path)
  (folder / "tokenizer.json").write_text(content)
  with pytest.raises(UserError, match=r"tokenizer\.json"):
    read_published(folder)
  (folder / "config.json").write_text(content)
  with pytest.raises(UserError, match=r"config\.json: not a published configuration"):
    load_pytorch(folder)


def test_safetensors_that_do_not_fit(golden, tmp_path):
  folder = copy(golden, tmp_path)
  tensors = read_state_dict(folder / "weights.pt")
  (folder / "weights.pt").unlink()
  (folder / "model.safetensors").write_bytes(b"\xff" * 40)
  with pytest.raises(UserError, match="not a safetensors file"):
    load_pytorch(folder)
  some = {name: t for name, t in tensors.items() if name != "blocks.1.mlp.fc.bias"}
  write_safetensors(folder / "model.safetensors", [(n, t.shape, t.dtype) for n, t in some.items()], some.values())
  with pytest.raises(UserError, match=r"tensor 'blocks\.1\.mlp\.fc\.bias' is missing"):
    load_pytorch(folder)
  safetensors.numpy.save_file({"blocks.1.mlp.fc.bias": tensors["blocks.1.mlp.fc.bias"]}, folder / "more.safetensors")
  load_pytorch(folder)
  safetensors.numpy.save_file({"norm.weight": np.ones(64, np.int64)}, folder / "z.safetensors")
  with pytest.raises(UserError, match=r"z\.safetensors: tensor 'norm.weight' is in another file too"):
    load_pytorch(folder)


def test_named_tokenizer():
  tokenizer = tokenizer_from_dict(NamedTokenizer("gpt2").to_dict())
  assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("gpt2", 50_257, 50_256)
  for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1]), lambda: NamedTokenizer("other").eot_id):
    with pytest.raises(UserError, match="--tokenizer=FILE"):
      call()


def test_state_dict_round_trip_names_what_is_wrong(golden):
  folder = golden.folder / "checkpoint_rope_mem1_win0_as_published"
  tensors = read_state_dict(folder / "weights.pt")
  config = model_config(folder / "config.json", tensors)
  shapes, arrays = to_state_dict(from_state_dict(tensors, config))
  same_bits(tensors, {name: array for (name, _, _), array in zip(shapes, arrays, strict=True)})
  with pytest.raises(UserError, match=r"'blocks\.1\.attn\.conv\.weight' gives shape \(64, 2, 3\), .* wants \(64, 1, 3\)"):
    from_state_dict(tensors | {"blocks.1.attn.conv.weight": np.zeros((64, 2, 3))}, dataclasses.replace(config))


@pytest.fixture(scope="module")
def rope(golden):
  """Tensors and configuration of the golden checkpoint with rope as the published code writes it."""
  folder = golden.folder / "checkpoint_rope_mem1_win0_as_published"
  tensors = read_state_dict(folder / "weights.pt")
  return tensors, model_config(folder / "config.json", tensors), folder / "config.json"


def test_angular_frequencies_may_be_absent_or_of_another_dtype(rope):
  tensors, config, path = rope
  narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
  assert model_config(path, narrow | {ROTARY: tensors[ROTARY]}).param_dtype == "bfloat16"
  stored = [from_state_dict(tensors | {ROTARY: tensors[ROTARY].astype(ml_dtypes.bfloat16)}, config),
            from_state_dict({name: tensor for name, tensor in tensors.items() if name != ROTARY}, config)]
  for a, b in zip(*(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in stored), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "change", "message"), [
  (ROTARY, lambda x: x[::-1], r"holds other values than \(1/1024\)\^linspace\(0, 1, 4\) and 4 zeros"),
  (ROTARY, lambda x: x * np.float32([1, 1, 1.00001, 1, 1, 1, 1, 1]), "holds other values"),
  (ROTARY, lambda x: (x * 1.02).astype(ml_dtypes.bfloat16), "holds other values"),
  (ROTARY, lambda x: x * np.nan, "holds other values"),
  (ROTARY, lambda x: x[:4], r"gives shape \(4,\), the configuration wants \(8,\)"),
  ("blocks.1.attn.rotary.angular_freq", lambda x: x, "unexpected"),
  ("blocks.2.attn.rotary.base", lambda x: x, "unexpected")])
def test_other_angular_frequencies(rope, name, change, message):
  tensors, config, _ = rope
  with pytest.raises(UserError, match=message) as caught:
    from_state_dict(tensors | {name: change(tensors[ROTARY])}, config)
  assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("head_dim", [4, 12, 16, 128])
def test_angular_frequencies_are_those_of_the_op(rope, head_dim):
  frequencies = angular_frequencies(head_dim)
  if head_dim == 16:
    np.testing.assert_array_equal(frequencies, rope[0][ROTARY])
  assert frequencies.shape == (head_dim // 2,) and frequencies.dtype == np.float32
  turned = rotary_embedding(jnp.ones((1, 2, 1, head_dim)), jnp.arange(2))[0, 1, 0]  # cos + sin and cos - sin of the angles
  expected = np.concatenate([np.cos(frequencies) + np.sin(frequencies), np.cos(frequencies) - np.sin(frequencies)])
  np.testing.assert_allclose(turned, expected, atol=2e-6)


def test_the_embedding_keeps_its_dtype(golden):
  """The published code keeps the embedding in bfloat16 beside float32 weights."""
  folder = golden.folder / "checkpoint_polar_mem0_win0"
  tensors = read_state_dict(folder / "weights.pt")
  tensors["embed.weight"] = tensors["embed.weight"].astype(ml_dtypes.bfloat16)
  config = model_config(folder / "config.json", tensors)
  assert config.param_dtype == "float32"
  shapes, arrays = to_state_dict(from_state_dict(tensors, config))
  same_bits(tensors, {name: array for (name, _, _), array in zip(shapes, arrays, strict=True)})


def test_command(main, golden, tmp_path):
  """The command itself: both directions, and exit code 2 with one line for bad input."""
  convert = functools.partial(main, "convert")
  source = golden.folder / "checkpoint_polar_mem0_win0"
  assert convert(f"--input={source}", f"--output={tmp_path / 'ours'}").returncode == 0
  assert convert(f"--input={tmp_path / 'ours'}", f"--output={tmp_path / 'back'}").returncode == 0
  same_bits(read_state_dict(source / "weights.pt"), read_state_dict(tmp_path / "back" / "weights.pt"))
  assert not list(tmp_path.glob(".*"))
  (tmp_path / "empty").mkdir()
  for flags, message in (((f"--input={source}", f"--output={tmp_path / 'back'}", "--format=pytorch"), "something already"),
                         ((f"--input={tmp_path / 'empty'}", f"--output={tmp_path / 'x'}"), "holds no checkpoint step"),
                         ((f"--input={source}", f"--output={tmp_path / 'x'}", "--format=onnx"), "--format"),
                         ((f"--input={source}", f"--output={tmp_path / 'x'}", "--lossy"), "--lossy: --format=atma carries"),
                         ((f"--input={source}", f"--output={tmp_path / 'x'}", "--tokenizer=none.json"), "--tokenizer=none.json")):
    result = convert(*flags)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
  assert not (tmp_path / "x").exists()

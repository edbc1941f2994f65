"""Published checkpoints: logits of whole models equal the published code's, computed in float64; malformed ones are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.pytorch import from_state_dict, load_pytorch, model_config, read_state_dict

CHECKPOINTS = ["polar_mem1_win0", "polar_mem0_win0", "nope_mem1_win0", "rope_mem1_win0"]


def logits_in(dtype: str, folder, tokens, implementation="auto"):
  tensors = read_state_dict(folder / "weights.pt")
  config = model_config(folder / "config.json", tensors)
  config.activation_dtype = config.param_dtype = dtype
  config.implementation = implementation
  with jax.default_matmul_precision("highest"):
    return np.asarray(from_state_dict(tensors, config)(jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float32_logits(golden, name, implementation):
  expected = golden(f"checkpoint_{name}/expected.npz")
  logits = logits_in("float32", golden.folder / f"checkpoint_{name}", expected["tokens"], implementation)
  np.testing.assert_allclose(logits, expected["logits"], atol=2e-4)  # the bound stated with the golden files


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float64_logits(golden, name, x64):
  expected = golden(f"checkpoint_{name}/expected.npz")
  logits = logits_in("float64", golden.folder / f"checkpoint_{name}", expected["tokens"])
  assert logits.dtype == np.float64
  np.testing.assert_allclose(logits, expected["logits"], atol=1e-10)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16_logits(golden, name):
  expected = golden(f"checkpoint_{name}/expected.npz")
  model = load_pytorch(golden.folder / f"checkpoint_{name}")
  logits = np.asarray(model(jnp.asarray(expected["tokens"], jnp.int32)))
  error = np.sqrt(np.mean((logits - expected["logits"]) ** 2) / np.mean(expected["logits"] ** 2))
  # Four blocks of two residual branches, each rounded about eight times to 8 bits: sqrt(64) * 2^-9 = 1.6e-2, doubled.
  assert logits.dtype == np.float32 and error < 3.2e-2, error


def write_checkpoint(source, target, content: bytes):
  shutil.copytree(source, target)
  with zipfile.ZipFile(source / "weights.pt") as old, zipfile.ZipFile(target / "weights.pt", "w") as new:
    for name in old.namelist():
      new.writestr(name, content if name.endswith("data.pkl") else old.read(name))


def test_hostile_pickle_is_refused(golden, tmp_path):
  class Hostile:
    def __reduce__(self):
      return (open, (str(tmp_path / "owned"), "w"))

  write_checkpoint(golden.folder / "checkpoint_polar_mem0_win0", tmp_path / "c", pickle.dumps({"model": Hostile()}))
  with pytest.raises(UserError, match="refused global"):
    load_pytorch(tmp_path / "c")
  assert not (tmp_path / "owned").exists()


def test_missing_and_unexpected_tensors_are_named(golden):
  folder = golden.folder / "checkpoint_polar_mem1_win0"
  tensors = read_state_dict(folder / "weights.pt")
  config = model_config(folder / "config.json", tensors)
  with pytest.raises(UserError, match=r"'blocks\.2\.attn.v_null' is missing"):
    from_state_dict({k: v for k, v in tensors.items() if k != "blocks.2.attn.v_null"}, config)
  with pytest.raises(UserError, match=r"unexpected tensor 'blocks\.9\.x'"):
    from_state_dict(tensors | {"blocks.9.x": np.zeros(1)}, config)
  with pytest.raises(UserError, match=r"'norm\.weight' gives shape"):
    from_state_dict(tensors | {"norm.weight": np.zeros(3)}, config)


def test_malformed_directories(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    load_pytorch(tmp_path)
  (tmp_path / "weights.pt").write_bytes(b"not a zip")
  with pytest.raises(UserError, match="not a PyTorch checkpoint"):
    load_pytorch(tmp_path)


def test_every_tensor_is_used_once(golden):
  folder = golden.folder / "checkpoint_polar_mem1_win0"
  config = model_config(folder / "config.json", read_state_dict(folder / "weights.pt"))
  count = sum(p.size for p in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0))))))
  assert count == sum(t.size for t in read_state_dict(folder / "weights.pt").values())
  assert json.loads((folder / "config.json").read_text())["vocab_size"] == config.vocab_size

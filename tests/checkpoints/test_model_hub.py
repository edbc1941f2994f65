"""Checkpoints on the hub, against a stand-in with faults: what is pushed and read back, and what is refused in one line."""

from __future__ import annotations

from flax import nnx
import huggingface_hub.constants
import jax
import numpy as np
import pytest

from atma_jax.checkpoints import model_hub
from atma_jax.checkpoints.load import load_model
from atma_jax.checkpoints.model_hub import fetch_checkpoint, located, push_directory
from atma_jax.checkpoints.store import save_model
from atma_jax.config import Config, DataConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import RunError, UserError
from atma_jax.pytorch import write_published
from tests.data.hub_stand_in import SHA, connected_hub
from tests.small_model import SMALL, lively_model

TOKEN = "Bearer hf_token"


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """A stand-in (see `connected_hub`) that takes what is pushed with the token."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
  with connected_hub(monkeypatch, tmp_path / "hub-cache") as hub:
    hub.tokens.add(TOKEN)
    yield hub


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
  """The small model in our format and in that for transformers, and the model."""
  folder, model = tmp_path_factory.mktemp("exports"), lively_model()
  config = Config(name="lively", model=SMALL, data=DataConfig(tokenizer="bytes", sequence_length=32))
  save_model(folder / "ours", config, model, ByteTokenizer(), 5)
  write_published(folder / "transformers", "transformers", config, model, ByteTokenizer(), 5)
  return {"ours": folder / "ours", "transformers": folder / "transformers", "model": model}


def same_weights(model, other) -> bool:
  pairs = zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, other)), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_a_pushed_checkpoint_is_read_back(hub, exports, kind):
  assert push_directory(exports[kind], "team/tiny", private=kind == "ours") == f"{hub.address}/team/tiny"
  assert hub.private == ({"team/tiny"} if kind == "ours" else set()) and hub.stored
  assert {a for part, a in hub.authorizations if part == "api"} == {TOKEN}
  hub.models["team/tiny"]["malicious.py"] = b"raise SystemExit"
  for name in ("hf:team/tiny", "hf:team/tiny@main"):
    loaded = load_model(name)
    assert loaded.config.model == SMALL and isinstance(loaded.tokenizer, ByteTokenizer)
    assert same_weights(loaded.model, exports["model"]) and loaded.step == (5 if kind == "ours" else 0)
  folder, identity = located("hf:team/tiny")
  assert identity == f"hf:team/tiny@{SHA}" and not list(folder.glob("*.py"))
  asked = len(hub.requests)
  assert fetch_checkpoint(f"hf:team/tiny@{SHA}") == folder and len(hub.requests) == asked  # out of the cache, by its commit
  push_directory(exports[kind], "team/tiny", private=False)  # once more, to a model that is there


@pytest.mark.parametrize(("faults", "error", "message"), [
  ({"/api/models": [401] * 9}, UserError, "Unauthorized"),
  ({"/api/models": [403] * 9}, UserError, "Forbidden"),
  ({"/api/models": [404] * 9}, UserError, "no such model or revision"),
  ({"/api/models": ["cut at once"] * 40}, RunError, "tried 4 times"),
  ({"/api/models": [503] * 60}, RunError, "tried 4 times"),
  ({"safetensors": [404] * 9}, UserError, "no such model or revision"),
  ({"safetensors": ["cut at once"] * 99}, RunError, "tried 4 times"),
])
def test_faults_of_reading(hub, exports, monkeypatch, faults, error, message):
  monkeypatch.setattr("time.sleep", lambda seconds: None)
  hub.models["team/tiny"] = {path.name: path.read_bytes() for path in exports["transformers"].iterdir()}
  hub.faults = faults
  with pytest.raises(error, match=rf"--checkpoint=hf:team/tiny.*{message}"):
    load_model("hf:team/tiny")


def test_a_cut_is_mended_and_damage_is_found(hub, exports, monkeypatch):
  monkeypatch.setattr("time.sleep", lambda seconds: None)
  files = {path.name: path.read_bytes() for path in exports["transformers"].iterdir()}
  hub.models["team/tiny"], hub.faults = dict(files), {"safetensors": ["cut"], "config.json": [503]}
  assert same_weights(load_model("hf:team/tiny").model, exports["model"])
  flipped = bytearray(files["model.safetensors"])
  flipped[-3] ^= 4
  hub.models["team/other"] = files | {"model.safetensors": bytes(flipped)}
  with pytest.raises(UserError, match=r"model\.safetensors: damaged: the digest of its tensors differs"):
    load_model("hf:team/other")
  hub.models["team/text"] = {"README.md": b"nothing else"}
  with pytest.raises(UserError, match="--checkpoint=hf:team/text: holds no checkpoint"):
    load_model("hf:team/text")


@pytest.mark.parametrize("name", ["hf:", "hf:tiny", "hf:a/b/c", "hf:../x", "hf:team/tiny@", "hf:team/ti ny", "hf:team/tiny@a b"])
def test_malformed_names(hub, name):
  with pytest.raises(UserError, match="legal: hf:USER/NAME or hf:USER/NAME@REVISION"):
    load_model(name)
  assert not hub.requests


@pytest.mark.parametrize(("faults", "error", "message"), [
  ({"/api/repos": [401]}, UserError, "Unauthorized"),
  ({"/api/repos": [404]}, UserError, "no such user or model, or HF_TOKEN"),
  ({"commit": [403]}, UserError, "Forbidden"),
  ({"commit": ["cut"] * 9}, RunError, "cannot be written on"),
  ({"/store/": [500] * 40}, RunError, "cannot be written on"),
])
def test_faults_of_pushing(hub, exports, monkeypatch, faults, error, message):
  monkeypatch.setattr("time.sleep", lambda seconds: None)
  hub.faults = faults
  with pytest.raises(error, match=f"--push=team/tiny cannot be written on .*is complete.*{message}|{message}"):
    push_directory(exports["transformers"], "team/tiny", private=False)


def test_names_to_push_to(hub, exports):
  for name in ("tiny", "team/tiny@main", "a/b/c", ""):
    with pytest.raises(UserError, match="legal: USER/NAME"):
      push_directory(exports["transformers"], name, private=False)
  assert not hub.requests and model_hub.is_on_hub("hf:a/b")


def test_convert_pushes_and_reads(hub, exports, main, tmp_path):
  """The command itself, with the token and the address of its environment."""
  environ = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_token",
             "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "NO_PROXY": "127.0.0.1"}
  flags = f"--checkpoint={exports['ours']}", "--format=transformers", "--push=team/tiny", "--private"
  done = main("convert", f"--output={tmp_path / 'out'}", *flags, environ=environ)
  assert done.returncode == 0 and done.stdout == f"{hub.address}/team/tiny\n" and hub.private == {"team/tiny"}, done.stderr
  assert load_model("hf:team/tiny").config.model == SMALL
  hub.faults = {"/api/repos": [401]}
  done = main("convert", f"--output={tmp_path / 'other'}", *flags[:2], "--push=team/new", environ=environ)
  *_, last = done.stderr.splitlines()
  assert done.returncode == 2 and "Traceback" not in done.stderr and (tmp_path / "other").is_dir(), done.stderr
  assert last.startswith(f"error: --push=team/new cannot be written on {hub.address} ("), last

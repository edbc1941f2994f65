"""Checkpoints and metrics on gs://, against an emulator of Google Cloud Storage; Orbax, TensorStore and gcsfs are real."""

from __future__ import annotations

import contextlib
import http
import json
import os
import socket
import subprocess
import sys
import types
import urllib.parse
import urllib.request

import pytest

from atma_jax.config import Config, DataConfig
from atma_jax.errors import UserError
from atma_jax.training import workdir
from atma_jax.training.workdir import data_directory

RECIPE = """
from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig

def get_config():
  return Config(
    name="remote",
    model=ModelConfig(vocab_size=264, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=("local",), activation_dtype="float32"),
    data=DataConfig(directory="{folder}/prepared", sources=("text:{folder}/*.txt",), tokenizer="bytes", validation_documents=3,
                    heldout_documents=2, shard_tokens=100_000, sequence_length=32, batch_size=4),
    train=TrainConfig(steps=6, log_every=1, checkpoint_every=2, checkpoint_keep=2, validate_every=0))
"""

READ_AGAIN = """
import tensorstore
store = tensorstore.KvStore.open("gs://bucket/").result()
store.write("file", b"old").result()
generation = store.read("file").result().stamp.generation
store.write("file", b"new").result()
print(store.read("file", if_not_equal=generation).result().value.decode())
"""


def with_generation(download, missing: type[Exception]):
  """Adds a header to the answers of the emulator's `download`: the generation of the object, which Cloud Storage sends.

  Without it TensorStore takes every object that it reads for generation 0, and then refuses to ask whether the object has
  changed ("Malformed StorageGeneration"). Whether a save asks that is a matter of timing: 4 of 12 small ones in a row failed.
  """
  def handle(request, response, storage):
    with contextlib.suppress(missing):  # the handler answers that itself
      found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
      response["x-goog-generation"] = found["generation"]
    return download(request, response, storage)
  return handle


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
  """The environment of a process whose gs:// is the emulator, and the folder in which the emulator keeps its objects."""
  server = pytest.importorskip("gcp_storage_emulator.server")
  pytest.importorskip("gcsfs")
  folder = tmp_path_factory.mktemp("storage")
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(server.objects, "download", with_generation(server.objects.download, server.objects.NotFound))
    running = server.create_server("127.0.0.1", port, in_memory=False, default_bucket="bucket", data_dir=str(folder))
    running.start()
    yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true",
           "GOOGLE_CLOUD_PROJECT": "none"}, folder / ".cloudstorage" / "bucket"
    running.stop()


@pytest.mark.slow
def test_emulator_answers_whether_an_object_has_changed(storage):
  """Saves depend on this question, which is asked here as they ask it."""
  environ, _ = storage
  done = subprocess.run([sys.executable, "-c", READ_AGAIN], env=os.environ | environ, capture_output=True, text=True, check=False)
  assert done.stdout == "new\n", done.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
  folder = tmp_path_factory.mktemp("recipe")
  for i in range(20):
    (folder / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 8)
  (folder / "recipe.py").write_text(RECIPE.format(folder=folder))
  return folder / "recipe.py"


@pytest.mark.slow
def test_train_and_resume(main, storage, recipe):
  environ, bucket = storage
  for steps, words in ((4, "starting"), (6, "resuming at step 4")):
    done = main("train", f"--config={recipe}", "--workdir=gs://bucket/run", f"--config.train.steps={steps}",
                environ=os.environ | environ)
    assert done.returncode == 0 and words in done.stderr, done.stderr
  records = [json.loads(line) for line in (bucket / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6] and records[-1]["failed_saves"] == 0
  checkpoints = bucket / "run" / "checkpoints"
  objects = [path.relative_to(checkpoints) for path in checkpoints.rglob("*") if path.is_file()]  # folders outlive their objects
  assert sorted({path.parts[0] for path in objects}) == ["4", "6"]
  assert (checkpoints / "6" / "commit_success.txt").exists()
  assert list((bucket / "run" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_save_after_one_that_was_refused(main, storage, recipe, monkeypatch):
  objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
  upload, refused = objects._media_upload, []

  def refuse_once(request, response, storage):
    name = request.query["name"][0]
    if not refused and name.endswith("manifest.ocdbt"):
      refused.append(name)
      response.status = http.HTTPStatus.FORBIDDEN
    else:
      upload(request, response, storage)

  monkeypatch.setattr(objects, "_media_upload", refuse_once)
  environ, bucket = storage
  done = main("train", f"--config={recipe}", "--workdir=gs://bucket/refused", "--config.train.steps=4",
              environ=os.environ | environ)
  assert done.returncode == 0 and "checkpoints/2 could not be written (1 failed so far)" in done.stderr, done.stderr
  assert refused[0].startswith("refused/checkpoints/2/") and "(2 failed so far)" not in done.stderr
  assert (bucket / "refused" / "checkpoints" / "4" / "commit_success.txt").exists()


@pytest.mark.slow
def test_text_and_tokens_in_a_bucket(main, storage, recipe, tmp_path):
  """``text:gs://`` and ``bin:gs://`` prepare the same data as the same files on this machine."""
  environ, _ = storage
  for path in recipe.parent.glob("*.txt"):
    upload(environ["STORAGE_EMULATOR_HOST"], f"corpus/{path.name}", path.read_bytes())

  def prepared(name: str, source: str, shards: str = "train/*/*.bin") -> bytes:
    done = main("prepare_data", f"--config={recipe}", f"--directory={tmp_path / name}", f"--config.data.sources={source}",
                environ=os.environ | environ)
    assert done.returncode == 0, done.stderr
    [shard] = (tmp_path / name).glob(shards)
    return shard.read_bytes()

  content = prepared("here", f"text:{recipe.parent}/*.txt")
  assert prepared("there", "text:gs://bucket/corpus") == content
  upload(environ["STORAGE_EMULATOR_HOST"], "tokens/0.bin", content)
  assert prepared("tokens", "bin:gs://bucket/tokens/*.bin", "fetched/*.bin") == content


def upload(address: str, name: str, content: bytes) -> None:
  """Puts an object into the emulator's bucket."""
  query = urllib.parse.urlencode({"uploadType": "media", "name": name})
  request = urllib.request.Request(f"{address}/upload/storage/v1/b/bucket/o?{query}", content, {"Content-Type": "text/plain"})
  urllib.request.urlopen(request).close()


@pytest.mark.slow
def test_without_a_directory_every_host_prepares_its_own(main, storage, recipe, tmp_path):
  """In the user's cache; the check leaves nothing in the bucket."""
  environ, bucket = storage
  environ = os.environ | environ | {"XDG_CACHE_HOME": str(tmp_path)}
  arguments = (f"--config={recipe}", "--config.data.directory=", "--config.train.steps=1")
  done = main("train", *arguments, "--workdir=gs://bucket/checked", "--check", environ=environ)
  assert done.returncode == 0 and "written to and removed again" in done.stdout, done.stderr
  assert not [path for path in (bucket / "checked").rglob("*") if path.is_file()]
  done = main("train", *arguments, "--workdir=gs://bucket/own", environ=environ)
  assert done.returncode == 0, done.stderr
  [folder] = (tmp_path / "atma_jax" / "data").iterdir()
  assert folder.name.endswith(f"-{socket.gethostname()}") and (folder / "manifest.json").exists()


def test_data_without_a_directory(monkeypatch, tmp_path):
  """Other options, another folder; never one of the bucket."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  found = {data_directory(Config(data=DataConfig(max_mib=most)), "gs://bucket/run") for most in (1, 2, None)}
  assert len(found) == 3 and {path.parent for path in found} == {tmp_path / "atma_jax" / "data"}


@pytest.mark.parametrize(("index", "shared", "prepares"), [
  (0, False, True), (1, False, False), (2, False, True), (2, True, False)])
def test_one_process_of_a_host_prepares(monkeypatch, tmp_path, index, shared, prepares):
  """The first one of every host, or only the first of all; hosts that find different text are refused."""
  calls, found = [], ["x", "x", "x"]
  monkeypatch.setattr(workdir.jax, "process_index", lambda: index)
  monkeypatch.setattr(workdir.distributed, "agreed", contextlib.nullcontext)
  monkeypatch.setattr(workdir.distributed, "exchange", lambda message: ["a", "a", "b"] if message != "x" else found)
  monkeypatch.setattr(workdir, "prepare", lambda config, directory, tokenizer: calls.append(directory))
  monkeypatch.setattr(workdir, "load_manifest", lambda directory: types.SimpleNamespace(fingerprint="x"))
  workdir.prepare_data(Config(), tmp_path, shared=shared)
  assert calls == [tmp_path] * prepares
  found[2] = "y"
  if not shared:
    with pytest.raises(UserError, match=r"config\.data\.sources: hosts a and b found different text"):
      workdir.prepare_data(Config(), tmp_path, shared=shared)

"""Checkpoints and metrics on gs://, with an emulator in place of Google Cloud Storage: Orbax, TensorStore and gcsfs are real."""

from __future__ import annotations

import json
import os
import socket

import pytest

from atma_jax.config import Config, UserError
from atma_jax.training.loop import train

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


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
  """The environment of a process whose gs:// is the emulator, and the folder where that keeps its objects."""
  server = pytest.importorskip("gcp_storage_emulator.server")
  pytest.importorskip("gcsfs")
  folder = tmp_path_factory.mktemp("storage")
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
  running = server.create_server("127.0.0.1", port, in_memory=False, default_bucket="bucket", data_dir=str(folder))
  running.start()
  address = f"http://127.0.0.1:{port}"
  yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true",
         "GOOGLE_CLOUD_PROJECT": "none"}, folder / ".cloudstorage" / "bucket"
  running.stop()


def test_train_and_resume(main, storage, tmp_path):
  environ, bucket = storage
  for i in range(20):
    (tmp_path / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 8)
  (tmp_path / "recipe.py").write_text(RECIPE.format(folder=tmp_path))
  for steps, words in ((4, "starting"), (6, "resuming at step 4")):
    done = main("train", f"--config={tmp_path / 'recipe.py'}", "--workdir=gs://bucket/run", f"--config.train.steps={steps}",
                environ=os.environ | environ)
    assert done.returncode == 0 and words in done.stderr, done.stderr
  records = [json.loads(line) for line in (bucket / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6] and records[-1]["failed_saves"] == 0
  checkpoints = bucket / "run" / "checkpoints"
  objects = [path.relative_to(checkpoints) for path in checkpoints.rglob("*") if path.is_file()]  # folders outlive their objects
  assert sorted({path.parts[0] for path in objects}) == ["4", "6"]
  assert (checkpoints / "6" / "commit_success.txt").exists()
  assert list((bucket / "run" / "tensorboard").glob("events*"))


def test_prepared_data_needs_a_directory_of_this_machine():
  with pytest.raises(UserError, match=r"config\.data\.directory is required with --workdir=gs://bucket/run"):
    train(Config().validate(), "gs://bucket/run")

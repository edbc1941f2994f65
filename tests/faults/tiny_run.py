"""A tiny training run and its prepared data, made once per test process, and what every outcome of a fault must be like."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import os
import pathlib
import random
import shutil
import subprocess
import tempfile

from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from atma_jax.training.loop import DONE, train

STEPS, EVERY = 8, 2
_RECIPE = "from atma_jax.config import Config\n\ndef get_config():\n  return Config.from_dict({config!r})\n"


@functools.cache
def folder() -> pathlib.Path:
  """A folder that lasts as long as the process; it holds the corpus."""
  path = pathlib.Path(tempfile.mkdtemp(prefix="atma_jax-faults-"))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  (path / "corpus").mkdir()
  for i in range(30):
    (path / "corpus" / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 8)
  return path


def recipe() -> Config:
  """What compiles quickly: the mechanics are the same."""
  return copy.deepcopy(_recipe())


@functools.cache
def _recipe() -> Config:
  return Config(
    name="faults",
    model=ModelConfig(vocab_size=257, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                      block_pattern=("local",), activation_dtype="float32"),
    data=DataConfig(directory=str(folder() / "prepared"), sources=(f"text:{folder()}/corpus/*.txt",), tokenizer="bytes",
                    validation_documents=3, heldout_documents=2, shard_tokens=4000, sequence_length=32, batch_size=4),
    train=TrainConfig(steps=STEPS, log_every=1, checkpoint_every=EVERY, checkpoint_keep=2, validate_every=0)).validate()


@functools.cache
def recipe_file() -> pathlib.Path:
  """`recipe` as a file for ``--config``."""
  path = folder() / "recipe.py"
  path.write_text(_RECIPE.format(config=recipe().to_dict()))
  return path


@functools.cache
def finished() -> pathlib.Path:
  """The working directory of an uninterrupted run; tests change copies of it."""
  workdir = folder() / "finished"
  assert train(recipe(), str(workdir)) == DONE
  return workdir


def prepared() -> pathlib.Path:
  """The prepared data; tests change copies of it."""
  finished()
  return folder() / "prepared"


def one_line(done: subprocess.CompletedProcess[str], *words: str, codes: tuple[int, ...] = (2,)) -> None:
  """Asserts that a main ended with one line about an error that has these words, and with one of these exit codes."""
  errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert done.returncode in codes and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
  assert all(word in errors[0] for word in words), errors[0]


def drawn(salt: str) -> random.Random:
  """Draws from a seed that is printed, and that ``ATMA_FAULTS_SEED`` sets."""
  seed = os.environ.get("ATMA_FAULTS_SEED") or str(random.SystemRandom().randrange(10**6))
  print(f"ATMA_FAULTS_SEED={seed}")
  return random.Random(f"{seed} {salt}")


@contextlib.contextmanager
def small_disk(path: pathlib.Path, kibibytes: int):
  """Mounts a disk of a size at `path`; yields False where this process may not."""
  path.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(path)], capture_output=True,
                           check=False).returncode == 0
  try:
    yield mounted
  finally:
    if mounted:
      subprocess.run(["umount", "--lazy", str(path)], check=False)

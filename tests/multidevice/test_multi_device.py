"""The benchmark of one host's devices, on fake ones: its tables have their lines, and meshes agree with one device."""

from __future__ import annotations

import re

import pytest

from atma_jax.benchmarks import multi_device
from atma_jax.benchmarks.profiles import covered
from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig

MODEL = ModelConfig(vocab_size=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                    block_pattern=("local", "global"), activation_dtype="float32")


@pytest.fixture
def recipe() -> Config:
  return Config(model=MODEL, data=DataConfig(sequence_length=32, batch_size=4), train=TrainConfig(steps=40))


@pytest.mark.slow
def test_training_table(recipe, capsys):
  """One line per mesh, and one device is all of linear."""
  multi_device.training_table(recipe, 2, step_tokens=128, long_length=64, repeats=1, seed=0)
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| T ")]
  assert [line.split(" | ")[1] for line in lines] == ["one device", "data=2", "fsdp=2", "tensor=2", "one device", "context=2"]
  assert [line.split(" | ")[4] for line in lines if "one device" in line] == ["100.0%", "100.0%"]


@pytest.mark.slow
def test_agreement_table(recipe, capsys):
  """Every mesh ends within the bound that another order of the rows gives."""
  multi_device.agreement_table(recipe, 2, seed=0)
  lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| \w+=2 ", line)]
  assert [line.rsplit(" | ", 1)[1] for line in lines] == ["yes |"] * 4


@pytest.mark.slow
def test_sequence_and_decoding_tables(recipe, capsys):
  """A split sequence has one device's mean loss, and tensor=2 decodes one device's tokens."""
  multi_device.sequence_table(recipe, 2, 512, seed=0)
  multi_device.decoding_table(recipe, 16, seed=0)
  out = capsys.readouterr().out
  means = [float(line.split(" | ")[-1].strip(" |")) for line in out.splitlines() if line.startswith("| 512 tokens")]
  assert max(means) - min(means) < 1e-4
  assert "192 of 192" in out


@pytest.mark.parametrize(("intervals", "length"), [([], 0), ([(0, 2), (1, 3)], 3), ([(5, 6), (0, 2), (1, 1.5)], 3)])
def test_union_of_intervals(intervals, length):
  assert covered(intervals) == length

"""The benchmark runs end to end on the CPU, and bad flags are one line and exit code 2."""

from __future__ import annotations

import functools

import pytest

from atma_jax.ops.core import tiles


@pytest.fixture
def benchmark(main):
  return functools.partial(main, "benchmark", "--config=configs/debug.py")


def test_every_table_on_small_shapes(benchmark):
  result = benchmark("--shapes=1x40", "--step_tokens=128", "--forward_lengths=64", "--repeats=1",
                     "--table=ops,step,forward")
  assert result.returncode == 0, result.stderr
  for expected in ("| polar | xla | 1 x 40 | 2 |", "| softmax | xla | 1 x 40 | 1 |", "| gated delta | xla | 1 x 40 |",
                   "| step, optimizer included, 1 x 128 tokens |", "| step, optimizer included, 4 x 128 tokens |",
                   "| 64 |"):
    assert expected in result.stdout


def test_generation_on_small_sizes(benchmark):
  result = benchmark("--table=generation", "--contexts=40", "--batches=2", "--batch_context=20",
                     "--chunk=16", "--decode_steps=2", "--cache_dtype=int8")
  assert result.returncode == 0, result.stderr
  for expected in ("copy", "int8", "| prefill | 40 | 1 |", "| decode | 40 | 1 |", "| decode | 20 | 2 |"):
    assert expected in result.stdout


def test_tuning_tries_every_kernel_and_prints_entries(benchmark):
  result = benchmark("--config.model.head_dim=64", "--table=tune", "--shapes=1x40", "--repeats=1")
  assert result.returncode == 0, result.stderr
  assert "does not run" not in result.stdout
  for kernel in ("gpu polar forward", "gpu polar dq", "gpu polar dkv", "gpu delta", "tpu polar forward", "tpu polar dq",
                 "tpu polar dkv", "tpu delta"):
    assert result.stdout.count(f"{kernel} 1 x 40: ") == 1
  entries = [line.split(": ", 1)[1].rstrip(",") for line in result.stdout.splitlines() if line.startswith(("POLAR", "DELTA"))]
  assert all(isinstance(eval(entry, vars(tiles)), (tiles.Tiles, tiles.Carry)) for entry in entries) and len(entries) == 4


@pytest.mark.parametrize("flag", ["--table=ops,speed", "--shapes=8", "--shapes=axb", "--step_tokens=100", "--step_tokens=384",
                                  "--forward_lengths=x", "--contexts=0"])
def test_bad_flags_are_one_line(benchmark, flag):
  result = benchmark("--table=step", flag)
  assert result.returncode == 2 and flag.split("=")[0] in result.stderr
  assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1

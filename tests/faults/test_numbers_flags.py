"""Numbers on command lines, as a user meets them: exit code 2 and one line, before anything is built."""

from __future__ import annotations

import pytest

DEBUG = "--config=configs/debug.py"


@pytest.mark.parametrize(("name", "arguments", "words"), [
  ("train", ["--config.train.seed=-1"], ["config.train.seed=-1", "at least 0 and at most 4_294_967_295"]),
  ("train", ["--config.train.steps=3000000000"], ["config.train.steps", "at most 2_147_483_647"]),
  ("train", ["--config.model.width=1000000", "--config.model.mlp_width=1000000"], ["GiB", "this machine has"]),
  ("train", ["--config.model.width=1000000000"], ["config.model.width", "at most 1_048_576"]),
  ("benchmark", ["--forward_lengths="], ["--forward_lengths="]),
  ("benchmark", ["--forward_lengths=-5", "--table=forward"], ["--forward_lengths=-5", "at least 1"]),
  ("benchmark", ["--forward_lengths=0"], ["--forward_lengths=0"]),
  ("benchmark", ["--forward_lengths=2000000000", "--table=forward"], ["GiB", "this machine has"]),
  ("benchmark", ["--config.model.width=1000000", "--config.model.mlp_width=10000000"], ["config.model", "GiB"]),
  ("benchmark", ["--contexts=2000000000", "--table=generation", "--config.model.block_pattern=global"], ["GiB", "tokens"]),
  ("compile_ahead", ["--topology=v5e:2x2", "--length=5"], ["--length=5", "--mode=evaluate"]),
  ("compile_ahead", ["--topology=v5e:2x2", "--batch=5"], ["--batch=5", "--mode=evaluate"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else None)
def test_bad_numbers(main, tmp_path, name, arguments, words):
  """Flags of training, benchmark and planning."""
  more = [f"--workdir={tmp_path}/run"] if name == "train" else []
  one_line(main(name, DEBUG, *arguments, *more), words)
  assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(("arguments", "words"), [
  (["--suite="], ["--suite=", "needle"]), (["--multiples="], ["--multiples="]), (["--multiples=0"], ["--multiples=0"]),
  (["--multiples=99999999999"], ["--multiples", "at most"]), (["--batch_tokens=99999999999"], ["--batch_tokens", "at most"]),
  (["--seed=-1"], ["--seed=-1"]), (["--memory_gib=nan"], ["--memory_gib=nan"]), (["--memory_gib=inf"], ["--memory_gib=inf"])])
def test_evaluate(main, tmp_path, arguments, words):
  """Options are checked before the checkpoint is looked for."""
  one_line(main("evaluate", f"--checkpoint={tmp_path}/none", f"--output={tmp_path}/out", *arguments), words)


def one_line(result, words: list[str]) -> None:
  """Exit code 2, and a last line that holds every word."""
  assert result.returncode == 2, (result.returncode, result.stderr[-2000:])
  lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
  assert len(lines) == 1 and lines[0] == result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
  assert [word for word in words if word not in lines[0]] == [], lines[0]

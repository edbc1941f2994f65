"""``ablate`` end to end: two tiny cells are trained, evaluated, reported, and reproduced from their recipes."""

from __future__ import annotations

import json
import pathlib

import pytest

from atma_jax.cli import load_recipe
from atma_jax.training.loop import DONE, train

SENTENCES = "The quick brown fox number {} jumps over the lazy dog, {} times in a row, and then sleeps.\n"


@pytest.fixture(scope="module")
def finished(main, tmp_path_factory):
  """The directory of a finished sweep over two seeds."""
  corpus, output = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("sweep")
  for i in range(40):
    (corpus / f"{i}.txt").write_text("".join(SENTENCES.format(i, j * i) for j in range(12)))
  done = main(
    "ablate", "--config=configs/debug.py", f"--config.data.sources=text:{corpus}/*.txt", "--config.data.sequence_length=32",
    "--config.model.num_layers=1", "--config.model.block_pattern=global", "--config.model.width=16",
    "--config.model.memory.enabled=false", "--config.optimizer.kind=adamw",
    "--config.model.window=16", "--config.train.steps=4", "--config.train.log_every=1", "--config.train.validate_every=0",
    "--config.train.auxiliary.distractors=4", "--seeds=0,1", "--multiples=1", "--trials=2", "--min_documents=2",
    f"--output={output}")
  assert done.returncode == 0, done.stderr
  return output


def losses(path: pathlib.Path) -> list[float]:
  return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_results_and_resumption(main, finished):
  """Cells share their data; starting the sweep again runs nothing."""
  results = {path.parent.name: json.loads(path.read_text()) for path in finished.glob("cells/*/result.json")}
  assert results.keys() == {"seed-0", "seed-1"}
  for result in results.values():
    measured = {(m["measure"], m["length"]) for m in result["measures"]}
    assert {("document_loss", 32), ("needle_accuracy", 32)} <= measured and len(result["training"]["loss"]) == 4
  assert results["seed-0"]["training"]["loss"] != results["seed-1"]["training"]["loss"]
  assert len(list((finished / "data").glob("*/manifest.json"))) == 1
  assert {"results.parquet", "results.csv", "tables.md", "tables.tex", "dashboard.html"} <= {p.name for p in finished.iterdir()}
  before = {path: path.stat().st_mtime_ns for path in finished.glob("cells/**/*") if path.is_file()}
  again = main("ablate", f"--output={finished}")
  assert again.returncode == 0 and "2 of 2 cells done" in again.stderr
  assert {path: path.stat().st_mtime_ns for path in finished.glob("cells/**/*") if path.is_file()} == before


@pytest.mark.slow
def test_a_cell_is_reproduced_from_its_recipe(finished, tmp_path):
  config = load_recipe(str(finished / "cells" / "seed-1" / "recipe.py"))
  assert train(config, str(tmp_path)) == DONE
  assert losses(tmp_path / "metrics.jsonl") == losses(finished / "cells" / "seed-1" / "metrics.jsonl")


@pytest.mark.parametrize("arguments, words", [
  (["--preset=paper12", "--list"], "paper120"),
  (["--output=OUT"], "holds no cells; give a grid"),
  (["--preset=paper120", "--output=OUT"], "--config=RECIPE is required"),
  (["--axis=model.attention=polar", "--config=configs/debug.py"], "--output=DIR is required"),
])
def test_bad_input_is_one_line(main, tmp_path, arguments, words):
  done = main("ablate", *(a.replace("OUT", str(tmp_path)) for a in arguments))
  assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr

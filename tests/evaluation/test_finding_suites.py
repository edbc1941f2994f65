"""A suite is one file, found by its name; no other file has to name it."""

from __future__ import annotations

import sys

import pytest

from atma_jax.errors import UserError
from atma_jax.evaluation import suites
from atma_jax.evaluation.api import evaluate
from atma_jax.evaluation.options import Options, option_owners, split_options
from atma_jax.evaluation.report.page import render_page
from atma_jax.evaluation.suite import Suite

UNIGRAM = '''
"""Suite ``unigram``: loss of the validation stream under its own smoothed unigram distribution, a baseline for `loss`."""

from __future__ import annotations

import dataclasses

import numpy as np

from atma_jax.config import POSITIVE, option
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.report import markup, plots
from atma_jax.evaluation.statistics import mean_and_error
from atma_jax.evaluation.suite import Cell, Suite, fingerprint


@dataclasses.dataclass(frozen=True)
class UnigramOptions(CheckedOptions):
  """Options of the suite."""

  smoothing: float = option(1.0, "Count added to every token.", POSITIVE)


def cells(inputs, options):
  """One cell per length."""

  def cell(length):
    def run(progress):
      counts = np.bincount(inputs.stream, minlength=inputs.config.model.vocab_size) + options.smoothing
      losses = -np.log(counts / counts.sum())[inputs.stream[:length]]
      progress(length)
      return [Measurement("unigram_loss", length, *[mean_and_error(losses)[0], length])]

    settings = {"smoothing": options.smoothing, "text": fingerprint(inputs.stream)}
    return Cell(f"unigram at {length}", (("unigram_loss", length),), settings, length, run)

  return [cell(length) for length in inputs.lengths]


def plot(records, title, training_length):
  figure, axes = plots.new_plot(title, "Unigram loss")
  plots.draw_series(axes, records, "unigram", "#000000", "o")
  return {"unigram.png": plots.png(figure, axes)}


SUITE = Suite(
  help="loss of the unigram distribution",
  cells=cells,
  options=UnigramOptions,
  columns=("unigram_loss",),
  table=lambda records: f"unigram table of {len(records)}",
  plots=plot,
  sections={"Unigram baseline": lambda runs: markup.value_table(runs, {"unigram_loss": "unigram"}, 3)},
)
'''


@pytest.fixture
def unigram(tmp_path, monkeypatch):
  """Puts the suite above into a file beside the others."""
  (tmp_path / "unigram.py").write_text(UNIGRAM)
  monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path)])
  yield
  sys.modules.pop(f"{suites.__name__}.unigram", None)


@pytest.fixture(scope="module")
def trained(main, tmp_path_factory):
  """The working directory of a small model after one step."""
  corpus, workdir = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("trained")
  for i in range(24):
    (corpus / f"{i}.txt").write_text("".join(f"The quick brown fox number {i} jumps over {i * j} lazy dogs.\n" for j in range(9)))
  done = main(
    "train", "--config=configs/debug.py", f"--workdir={workdir}", f"--config.data.sources=text:{corpus}/*.txt",
    "--config.data.sequence_length=32", "--config.model.num_layers=1", "--config.model.block_pattern=local",
    "--config.model.width=16", "--config.model.vocab_size=512", "--config.train.steps=1", "--config.train.validate_every=0",
    "--config.train.auxiliary.distractors=0", "--config.optimizer.kind=adamw")
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.mark.slow
def test_a_suite_is_one_file(unigram, trained, tmp_path, capsys):
  """The options, cells, column, table, plot and report section of a new file are used, and its results are resumed."""
  output = tmp_path / "evaluation"
  records = evaluate(trained, output, suite="unigram", multiples=[1, 2], smoothing=0.5)
  assert [(r["suite"], r["measure"], r["length"]) for r in records] == [("unigram", "unigram_loss", n) for n in (32, 64)]
  assert all(0 < r["value"] < 6 and r["settings"]["smoothing"] == 0.5 for r in records)
  printed = capsys.readouterr().out
  assert "unigram_loss" in printed and "unigram table of 2" in printed
  assert {path.name for path in output.iterdir()} == {"results.jsonl", "unigram.png"}
  assert "Unigram baseline" in render_page(records)
  assert evaluate(trained, output, suite="unigram", multiples=[1, 2], smoothing=0.5) == records
  with pytest.raises(UserError, match=r"--smoothing=0: must be greater than 0"):
    evaluate(trained, output, smoothing=0)


def test_unknown_names_are_told_with_the_nearest(unigram):
  with pytest.raises(UserError, match=r"^--suite 'unigrm' does not exist; did you mean 'unigram'\? Legal: babilong, bpb, "):
    Options(suite=("loss", "unigrm"))
  with pytest.raises(UserError, match=r"option 'smothing' does not exist; did you mean 'smoothing'\?"):
    split_options({"smothing": 2.0})
  with pytest.raises(UserError, match="did you mean 'needle'"):
    suites.find_suite("neddle")


def test_a_suite_of_a_notebook_is_registered(monkeypatch):
  registered = {}
  monkeypatch.setattr(suites, "_REGISTERED", registered)
  suite = Suite(help="nothing", cells=lambda inputs, options: [], order=0)
  suites.register("mine", suite)
  assert suites.find_suite("mine") is suite and "mine" in suites.suite_names()
  assert next(iter(suites.all_suites())) == "mine"
  assert Options(suite=("mine",)).suite == ("mine",)


def test_suites_are_complete():
  """Every suite has help and options with defaults, no two options share a name, and tables show the suites in this order."""
  found = suites.all_suites()
  assert list(found) == ["loss", "gain", "bpb", "needle", "retrieval", "babilong", "retention", "diagnostics"]
  for suite in found.values():
    assert suite.help and suite.options()
  names = [name for _, owner in option_owners() for name in owner.__dataclass_fields__]
  assert len(names) == len(set(names))

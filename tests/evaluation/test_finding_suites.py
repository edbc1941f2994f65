"""A suite is one file, found by its name; no other file has to name it."""

from __future__ import annotations

import json
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
    "--config.train.auxiliary.distractors=0", "--config.optimizer.kind=adamw", "--config.data.tokenizer=sentencepiece",
    "--config.data.tokenizer_vocab_size=340", "--config.data.heldout_documents=6")
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


@pytest.mark.slow
def test_retrieval_from_the_command_line(main, trained, tmp_path):
  """Every record says wording, chance and interval; what does not fit is left out; a second run adds nothing."""
  command = ("evaluate", f"--checkpoint={trained}", f"--output={tmp_path}", "--suite=needle,retrieval,lookup,mqar",
             "--multiples=8", "--trials=4", "--depths=50", "--lookup_tasks=multikey-2,multikey-64", "--mqar_pairs=2,64",
             "--report")
  done = main(*command)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split()[:5] == ["length", "x", "needle_exact", "unseen_exact", "needle_accuracy"]
  for text in ("all five digits right, unseen wording", "[0.0, 49.0]",
               "niah in text, unseen wording, depth 50 %", "multikey-2 in filler, seen wording (chance 50)",
               "2 pairs in text, unseen wording (chance 50)", "4 trials a cell"):
    assert text in done.stdout, (text, done.stdout)
  assert "multikey-64 takes up to" in done.stderr and "64 pairs do not fit into 256 tokens" in done.stderr
  content = (tmp_path / "results.jsonl").read_text()
  records = [json.loads(line) for line in content.splitlines()]
  assert {r["suite"] for r in records} == {"needle", "retrieval", "lookup", "mqar"}
  assert {r["settings"]["wording"] for r in records} == {"seen", "unseen"} and all(r["tokens"] > 0 for r in records)
  assert all(r["chance"] and r["interval"] and r["n"] >= 4 for r in records if r["measure"].endswith("exact"))
  page = (tmp_path / "report.html").read_text()
  assert all(heading in page for heading in ("Induction needle", "Retrieval", "Lookup among alternatives", "Associative recall"))
  assert main(*command).returncode == 0 and (tmp_path / "results.jsonl").read_text() == content


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
  assert list(found) == ["loss", "gain", "bpb", "needle", "retrieval", "lookup", "mqar", "babilong", "retention", "diagnostics"]
  for suite in found.values():
    assert suite.help and suite.options()
  names = [name for _, owner in option_owners() for name in owner.__dataclass_fields__]
  assert len(names) == len(set(names))

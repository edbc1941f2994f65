"""Suites against direct computations from all logits; results on disk; intervals against known values."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from atma_jax.config import Config
from atma_jax.data.needles import draw_needle
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import VARIANT_FIELDS, ResultsFile
from atma_jax.evaluation.scoring import Scorer
from atma_jax.evaluation.statistics import mean_and_error, wilson_interval
from atma_jax.evaluation.suite import Inputs
from atma_jax.evaluation.suites.loss import LossOptions, loss_cells
from atma_jax.evaluation.suites.needle import needle_cells, needle_row
from atma_jax.models import Atma
from atma_jax.sharding import make_mesh

LENGTHS = (16, 32, 64)
TEXT = "The quick brown fox jumps over the lazy dog number {}. "


def make_inputs(model: Atma, *, batch_tokens: int = 512, chunk: int = 16, documents: int = 5, trials: int = 3) -> Inputs:
  tokenizer = ByteTokenizer()
  texts = [tokenizer.encode("".join(TEXT.format(i * j) for j in range(6 + i))) for i in range(documents)]
  mesh = make_mesh(devices=jax.devices()[:1])
  scorer = Scorer(model, mesh, batch_tokens=batch_tokens, chunk=chunk)
  return Inputs(scorer, tokenizer, texts, np.concatenate(texts), LENGTHS, seed=0, min_documents=2, config=Config(), model=model,
                mesh=mesh, trials=trials)


def run(cells) -> dict:
  return {(m.measure, m.length): m for cell in cells for m in cell.run(lambda tokens: None)}


@pytest.mark.slow
def test_document_and_stream_loss(random_model, losses_of):
  inputs = make_inputs(random_model)
  found = run(loss_cells(inputs, LossOptions(4)))
  rows = np.stack([np.concatenate([[inputs.tokenizer.eot_id], d[:64]]) for d in inputs.documents])
  losses = losses_of(rows)
  for length in LENGTHS:
    np.testing.assert_allclose(found["document_loss", length].value, losses[:, :length].mean(), rtol=1e-5)
    windows = min(4, (len(inputs.stream) - 1) // 64) * 64 // length
    stream = np.stack([inputs.stream[i * length:(i + 1) * length + 1] for i in range(windows)])
    of_stream = losses_of(stream)
    np.testing.assert_allclose(found["stream_loss", length].value, of_stream.mean(), rtol=1e-5)
    bins = found["stream_loss", length].bins
    assert [(b["start"], b["stop"]) for b in bins] == [(0, 1), *((2**i, 2**i * 2) for i in range(int(np.log2(length))))]
    for part in bins:
      means = of_stream[:, part["start"]:part["stop"]].mean(axis=1)
      np.testing.assert_allclose(part["value"], means.mean(), rtol=1e-5)
      np.testing.assert_allclose(part["standard_error"], means.std(ddof=1) / np.sqrt(windows), rtol=1e-3)
  curve = found["position_loss", 64].bins
  assert curve[0]["start"] == 0 and curve[-1]["stop"] == 64
  for part in curve:
    np.testing.assert_allclose(part["value"], losses[:, part["start"]:part["stop"]].mean(), rtol=1e-5)


def test_needle_is_the_teacher_forced_prediction(random_model, losses_of):
  inputs = make_inputs(random_model)
  found = run(needle_cells(inputs, CheckedOptions()))
  filler_free = 1 + 2 * len(inputs.tokenizer.encode(" The access code for record 1234567 is 1 2 3 4 5"))
  rows = []
  for trial in range(3):
    key, value = draw_needle(trial, 0)
    statement = f" The access code for record {key} is" + "".join(f" {d}" for d in value)
    assert filler_free == 1 + 2 * len(inputs.tokenizer.encode(statement))
    rows.append((statement, value))
  for length in LENGTHS:
    measured = found["needle_loss", length]
    assert measured.n == 3 and 0 <= found["needle_accuracy", length].value <= 1
    assert found["needle_accuracy", length].interval[0] <= found["needle_accuracy", length].value
  # The cell's own rows, scored from all logits.
  text = np.concatenate([part for d in inputs.documents for part in (d, [inputs.tokenizer.eot_id])]).astype(np.int32)
  made = [needle_row(inputs, text, trial, 32, condition) for condition in ("needle", "absent") for trial in range(3)]
  tokens, positions = (np.stack(part) for part in zip(*made, strict=True))
  decoded = inputs.tokenizer.decode(tokens[0][1:])
  assert decoded.startswith(rows[0][0]) and decoded.endswith(rows[0][0])
  assert len(decoded) == 32 + 2 * len(rows[0][0]) and not inputs.tokenizer.decode(tokens[3][1:]).startswith(rows[0][0])
  losses = np.take_along_axis(losses_of(tokens), positions - 1, 1)
  np.testing.assert_allclose(found["needle_loss", 32].value, losses[:3].mean(), rtol=1e-5)
  np.testing.assert_allclose(found["absent_loss", 32].value, losses[3:].mean(), rtol=1e-5)


@pytest.mark.slow
def test_batch_and_chunk_change_nothing_and_shapes_are_few(random_model):
  one, many = make_inputs(random_model, batch_tokens=64, chunk=5), make_inputs(random_model, batch_tokens=4096, chunk=64)
  a, b = (run([*loss_cells(i, LossOptions(4)), *needle_cells(i, CheckedOptions())]) for i in (one, many))
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_allclose(a[key].value, b[key].value, rtol=2e-5, err_msg=str(key))
  assert max(one.scorer.compilations, many.scorer.compilations) <= 1 + len(LENGTHS) + len(LENGTHS)


def test_too_short_documents_are_refused_with_the_numbers(random_model):
  with pytest.raises(UserError, match=r"--min_documents=2: only 0 of 1 held-out .*longest length of 64 tokens"):
    short = make_inputs(random_model, documents=1)
    loss_cells(dataclasses.replace(short, documents=[short.documents[0][:20]]), LossOptions())


def test_results_survive_a_cut_line_and_keep_settings_apart(tmp_path):
  path = tmp_path / "results.jsonl"
  first = ResultsFile(path)
  first.append([{"step": 1, "settings": {"seed": 0}, "measure": "loss", "length": 8, "value": 1.5},
                {"step": 1, "settings": {"seed": 0}, "measure": "loss", "length": 16, "value": float("nan")}])
  with path.open("a") as file:
    file.write('{"schema": 1, "step": 2, "meas')
  again = ResultsFile(path)
  assert again.find({"step": 1, "settings": {"seed": 0}}, "loss", 8)["value"] == 1.5
  assert again.find({"step": 1, "settings": {"seed": 0}}, "loss", 16)["value"] is None
  assert again.find({"step": 1, "settings": {"seed": 1}}, "loss", 8) is None
  assert again.find({"step": 2, "settings": {"seed": 0}}, "loss", 8) is None
  again.append([{"step": 2, "settings": {"seed": 0}, "measure": "loss", "length": 8, "value": 2.0}])
  assert ResultsFile(path).find({"step": 2}, "loss", 8)["value"] == 2.0
  whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
  assert len([json.loads(line) for line in whole]) == 3


def test_variants_of_a_checkpoint_are_kept_apart(tmp_path):
  """A number measured with averaged weights, in a window or under an override is not taken for one without, or another one."""
  results = ResultsFile(tmp_path / "results.jsonl")
  identity = {"checkpoint": "a", "step": 1, "settings": {}}
  for variant in VARIANT_FIELDS:
    results.append([{**identity, variant: 8, "measure": "document_loss", "length": 64, "value": 1.0}])
    assert results.find({**identity, variant: 8}, "document_loss", 64)
    assert results.find(identity, "document_loss", 64) is None
    assert results.find({**identity, variant: 9}, "document_loss", 64) is None


def test_statistics_against_known_values():
  low, high = wilson_interval(8, 10)
  np.testing.assert_allclose((low, high), (0.4901625, 0.9433178), atol=1e-6)  # textbook value at 95 %
  assert wilson_interval(0, 5)[0] == 0 and wilson_interval(5, 5)[1] == 1
  value, error = mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
  assert value == 2.5 and abs(error - np.std([1, 2, 3, 4], ddof=1) / 2) < 1e-12
  assert mean_and_error(np.array([1.0])) == (1.0, None)

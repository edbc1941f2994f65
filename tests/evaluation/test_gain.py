"""The suite `gain` against direct computations, and its statistics against formulas written out."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from atma_jax.errors import UserError
from atma_jax.evaluation.statistics import clustered_mean_and_error, mean_and_error
from atma_jax.evaluation.suites.gain import GainOptions, candidate_spans, gain_cells

LENGTHS = (16, 32, 64)
TEXT = "The quick brown fox jumps over the lazy dog number {}. "


@pytest.fixture
def inputs(inputs_of):
  return inputs_of(["".join(TEXT.format(i * j) for j in range(4 + i)) for i in range(3)], LENGTHS)


def measured(cells) -> dict:
  return {(m.measure, m.length): m for cell in cells for m in cell.run(lambda tokens: None)}


def test_every_number_follows_from_the_records_of_the_spans(inputs, losses_of):
  """The paired changes are recomputed by hand from the spans that the results keep, and these from all logits."""
  cells = gain_cells(inputs, GainOptions(gain_spans=7, gain_span=6, gain_overlap=1.0))
  found = measured(cells)
  assert set(found) == {number for cell in cells for number in cell.expected}
  spans = {length: found["target_loss", length].bins for length in LENGTHS}
  for length in LENGTHS:
    assert len(spans[length]) == found["target_loss", length].n == 7
    assert [(s["document"], s["start"], s["stop"]) for s in spans[length]] == [
      (s["document"], s["start"], s["stop"]) for s in spans[16]]
    for s in spans[length]:
      row = np.concatenate([[inputs.tokenizer.eot_id], inputs.documents[int(s["document"])][s["stop"] - length:s["stop"]]])
      np.testing.assert_allclose(s["value"], losses_of(row[None])[0, -6:].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["target_loss", length].value, np.mean([s["value"] for s in spans[length]]), rtol=1e-12)
  for length, name, base in ((32, "1x", 16), (64, "1x", 16), (32, "half", 16), (64, "half", 32)):
    difference = [a["value"] - b["value"] for a, b in zip(spans[length], spans[base])]
    mean = sum(difference) / 7
    change, worse = found[f"change_from_{name}", length], found[f"worse_than_{name}", length]
    np.testing.assert_allclose(change.value, mean, rtol=1e-12)
    assert worse.value == sum(d > 0 for d in difference) / 7
    by_document = [sum(d - mean for d, s in zip(difference, spans[length]) if s["document"] == document)
                   for document in ("0", "1", "2")]
    np.testing.assert_allclose(change.standard_error, math.sqrt(3 / 2 * sum(r * r for r in by_document)) / 7, rtol=1e-9)


def test_an_interrupted_evaluation_reads_again_what_it_lacks(inputs):
  options = GainOptions(gain_spans=4, gain_span=6, gain_overlap=1.0)
  whole, last = measured(gain_cells(inputs, options)), gain_cells(inputs, options)[-1]
  for m in last.run(lambda tokens: None):
    np.testing.assert_allclose(m.value, whole[m.measure, m.length].value, rtol=1e-6)


def test_too_little_text_is_refused_with_the_numbers(inputs):
  with pytest.raises(UserError, match=r"--gain_spans=500: only \d+ spans of 8 tokens"):
    gain_cells(inputs, GainOptions(gain_spans=500, gain_overlap=1.0))
  with pytest.raises(UserError, match="--gain_span=16: must be from 1 to 15"):
    gain_cells(inputs, GainOptions(gain_span=16))
  with pytest.raises(UserError, match="--min_documents=4: only 3 of 3"):
    gain_cells(dataclasses.replace(inputs, min_documents=4), GainOptions())


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.integers(2, 500), st.integers(1, 64), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_spans_do_not_overlap_and_have_room(rest, longest, span, count):
  sizes = [longest + more for more in rest]
  found = candidate_spans(sizes, longest, span, count)
  room = [more // span + 1 for more in rest]
  each = -(-count // len(sizes))
  for document, size in enumerate(sizes):
    stops = sorted(s.stop for s in found if s.document == document)
    assert len(stops) == min(each, room[document]) and stops[0] >= longest and stops[-1] <= size
    assert len(stops) < 2 or min(np.diff(stops)) >= span
  first = found[:len(sizes)]
  assert len({s.document for s in first}) == len(sizes)  # the first ones are spread over the documents


def test_clustered_errors():
  samples = np.array([1.0, 2.0, 4.0, 7.0])
  value, error = clustered_mean_and_error(samples, np.arange(4))
  np.testing.assert_allclose((value, error), mean_and_error(samples))
  twice = clustered_mean_and_error(np.repeat(samples, 5), np.repeat(np.arange(4), 5))  # copies tell nothing new
  np.testing.assert_allclose(twice, (value, error))
  assert clustered_mean_and_error(samples, np.zeros(4)) == (3.5, None)

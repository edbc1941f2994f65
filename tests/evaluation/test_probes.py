"""Long rows, the retrieval grid and bits per byte against direct computations; running out of memory; resuming."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from atma_jax.data import needles
from atma_jax.data.sources import recall
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.records import Measurement, ResultsFile
from atma_jax.evaluation.resources import OutOfMemory, code_version, memory_errors
from atma_jax.evaluation.runner import run_cells
from atma_jax.evaluation.statistics import wilson_interval
from atma_jax.evaluation.suite import Cell
from atma_jax.evaluation.suites import retrieval
from atma_jax.evaluation.suites.bpb import BitsPerByteOptions, bits_per_byte_cells, span_bytes, whole_span
from atma_jax.evaluation.suites.retrieval import RetrievalOptions

TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs. " for i in range(30))


def measured(cell: Cell) -> dict[str, Measurement]:
  return {m.measure: m for m in cell.run(lambda tokens: None)}


# --- Rows longer than a pass ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pieces_equal_one_pass(inputs_of, losses_of):
  """Losses and predictions of rows that are read in pieces of 64, 64 and 32 tokens equal those from all logits."""
  scorer = inputs_of([TEXT], (32,), prefill_chunk=64).scorer
  rows = np.random.default_rng(0).integers(0, 257, (2, 161)).astype(np.int32)
  np.testing.assert_allclose(np.concatenate(list(scorer.losses(rows))), losses_of(rows), rtol=2e-5, atol=2e-5)
  positions = np.array([[1, 64, 65, 128, 159], [3, 63, 66, 129, 158]])
  losses, _ = next(scorer.at_positions(rows[:, :160], positions))
  np.testing.assert_allclose(losses, np.take_along_axis(losses_of(rows), positions - 1, 1), rtol=2e-5, atol=2e-5)
  programs = scorer.compilations
  list(scorer.losses(rows[:, :150]))  # other lengths of the same size class
  next(scorer.at_positions(rows[:, :140], np.minimum(positions, 139)))
  assert scorer.compilations == programs


def test_a_row_that_fits_in_no_memory(inputs_of):
  """The memory of a compiled program is compared with the limit before it runs."""
  scorer = inputs_of([TEXT], (32,), prefill_chunk=64, memory_bytes=1000).scorer
  with pytest.raises(OutOfMemory, match=r"needs 0\.\d\d GiB"):
    next(scorer.losses(np.zeros((2, 161), np.int32)))
  assert scorer.largest_program > 1000


def test_what_libraries_say_of_memory():
  """Only errors about memory become `OutOfMemory`."""
  for said, kind in (("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes", OutOfMemory), ("INVALID_ARGUMENT", Exception)):
    with pytest.raises(kind) as caught, memory_errors():
      raise jax.errors.JaxRuntimeError(said)
    assert isinstance(caught.value, OutOfMemory) == (kind is OutOfMemory)


# --- Resuming, and running out of memory -------------------------------------------------------------------------------


class Machine:
  """A stand-in for a scorer."""

  compile_seconds = 0.0
  largest_program = 0


def cell(name: str, calls: list[str], error: BaseException | None = None) -> Cell:
  def run(progress):
    calls.append(name)
    if error is not None:
      raise error
    return [Measurement("m", 8, 1.5, 3)]

  return Cell(name, (("m", 8),), {"name": name}, 24, run)


def test_an_interrupted_evaluation_goes_on_at_the_next_cell(tmp_path):
  """Finished cells are not run again; one that ran out of memory is recorded, and run again only within other limits."""
  calls, common = [], {"checkpoint": "c", "step": 1}
  extra = {"hardware": "1 x cpu", "limits": {"memory_gib": None}}

  def run(third: BaseException | None, extra=extra):
    calls.clear()
    cells = [("s", cell("a", calls)), ("s", cell("b", calls, OutOfMemory("too much"))), ("s", cell("c", calls, third)),
             ("s", cell("d", calls))]
    return run_cells(cells, ResultsFile(tmp_path / "results.jsonl"), common, extra, Machine())

  with pytest.raises(KeyboardInterrupt):
    run(KeyboardInterrupt())
  assert calls == ["a", "b", "c"]
  records = run(None)
  assert calls == ["c", "d"]
  assert [(r["status"], r["value"], r["n"]) for r in records] == [("ok", 1.5, 3), ("out_of_memory", None, 0), ("ok", 1.5, 3),
                                                                  ("ok", 1.5, 3)]
  assert records[1]["reason"] == "too much"
  run(None, extra | {"limits": {"memory_gib": 4.0}})
  assert calls == ["b"]
  assert {"schema", "hardware", "seconds"} <= json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0]).keys()
  assert code_version().startswith("0.")


# --- Retrieval --------------------------------------------------------------------------------------------------------


def test_a_retrieval_cell_by_hand(inputs_of, logits_of):
  """NIAH in text at 160 tokens and depth 90 %: the rows are written out here and scored from all logits."""
  inputs = inputs_of([TEXT], (128, 160))
  cells = retrieval.retrieval_cells(inputs, RetrievalOptions(retrieval_trials=3, depths=(10.0, 90.0)))
  assert len(cells) == 2 * 2 * 2 * 2 * 2
  (cell,) = [c for c in cells if c.expected[0][1] == 160 and c.settings["wording"] == "seen"
             and (c.settings["task"], c.settings["haystack"], c.settings["depth"]) == ("niah", "text", 0.9)]
  found = measured(cell)
  losses, hits = [], []
  for trial in range(3):
    _, value = needles.draw_needle(trial, 0)
    statement = f" The special magic {needles.draw_word(trial, 0)} number is" + "".join(f" {digit}" for digit in value)
    hay = 160 - 1 - 2 * len(statement)
    text = np.append(inputs.documents[0], 256)
    start = np.random.default_rng([0x7265, 0, trial]).integers(len(text))
    text = text[np.arange(start, start + 160) % len(text)]
    before = round(0.9 * hay)
    statement = list(statement.encode())
    row = np.array([256, *text[:before], *statement, *text[before:hay], *statement])
    assert len(row) == 160
    logits = logits_of(row[None, :-1])[0]
    for place in range(160 - 9, 160, 2):
      assert chr(row[place]).isdigit()
      losses.append(np.log(np.exp(logits[place - 1]).sum()) - logits[place - 1, row[place]])
      hits.append(logits[place - 1].argmax() == row[place])
  hits = np.reshape(hits, (3, 5))
  np.testing.assert_allclose(found["retrieval_loss"].value, np.mean(losses), rtol=1e-5)
  assert found["retrieval_accuracy"].value == hits.mean() and found["retrieval_exact"].value == hits.all(1).mean()
  assert found["retrieval_accuracy"].interval == wilson_interval(int(hits.sum()), 15)
  assert found["retrieval_exact"].n == 3


def test_trials_are_paired(inputs_of):
  """A trial has the same cue, value and haystack at every length and depth; both tasks have the same value."""
  inputs = inputs_of([TEXT], (128, 160))
  text = np.append(inputs.documents[0], 256)
  rows = {(task, length, depth): [retrieval.haystack_row(inputs, trial, task, text, "seen", length, depth)[0]
                                  for trial in range(2)]
          for task in retrieval.TASKS for length in (128, 160) for depth in (0.0, 0.5, 1.0)}
  for trial in range(2):
    written = {key: inputs.tokenizer.decode(tokens[trial]) for key, tokens in rows.items()}
    for task in retrieval.TASKS:
      cue, value = retrieval.cue_and_value(task, trial, 0)
      statement = cue + "".join(f" {digit}" for digit in value)
      filler = [w.replace(statement, "") for key, w in written.items() if key[0] == task]
      assert all(w.count(statement) == 2 and w.endswith(statement) for key, w in written.items() if key[0] == task)
      assert len(set(filler[:3])) == len(set(filler[3:])) == 1 and filler[3].startswith(filler[0])
      assert written[task, 160, 0.0].startswith(statement)
    assert retrieval.cue_and_value("passkey", trial, 0)[1] == retrieval.cue_and_value("niah", trial, 0)[1]
  with pytest.raises(UserError, match="haystack of 64 tokens needs at least"):
    retrieval.haystack_row(inputs, 0, "passkey", text, "seen", 64, 0.5)


def test_training_never_sees_what_evaluation_asks():
  """Training and evaluation have no words in common, as they have no keys and values in common."""
  assert not set(recall.WORDS) & set(needles.EVALUATION_WORDS)


# --- Bits per byte ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bits_per_byte_of_one_span(inputs_of, losses_of):
  """Every context is measured on the same bytes, which cut no character; the numbers are derived again from all logits."""
  documents = ["é漢字 " * 60, TEXT, "short"]
  inputs = inputs_of(documents, (64, 128))
  cells = bits_per_byte_cells(inputs, BitsPerByteOptions(20))
  for length, cell in zip((64, 128), cells):
    values = []
    for text in documents[:2]:
      tokens = inputs.tokenizer.encode(text)[:136]
      while inputs.tokenizer.decode(tokens).endswith("\N{REPLACEMENT CHARACTER}"):
        tokens = tokens[:-1]
      start = len(tokens) - 20
      while 0x80 <= tokens[start] < 0xC0:
        start -= 1
      row = np.concatenate([[256], tokens[len(tokens) - length:]])[None]
      values.append(losses_of(row)[0, -(len(tokens) - start):].sum() / math.log(2) / (len(tokens) - start))
    (found,) = cell.run(lambda tokens: None)
    np.testing.assert_allclose(found.value, np.mean(values), rtol=1e-5)
    assert found.n == 2 and found.length == length
  with pytest.raises(UserError, match=r"--bpb_span=60: must be from 1 to 56"):
    bits_per_byte_cells(inputs, BitsPerByteOptions(60))


def test_bytes_of_a_span():
  """Spans begin and end between characters."""
  tokenizer, text = ByteTokenizer(), "añ漢😀" * 9
  tokens = tokenizer.encode(text)
  for cut in range(30, 60):
    start, stop = whole_span(tokenizer, tokens[:cut], 7)
    assert 7 <= stop - start <= 15 and cut - 4 < stop <= cut
    assert "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(tokens[start:stop])
    assert span_bytes(tokenizer, tokens, start, stop) == stop - start

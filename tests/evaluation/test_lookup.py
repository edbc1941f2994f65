"""Suites ``lookup`` and ``mqar``, wordings and intervals: scripted models that know, guess or copy; one program a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from scipy.stats import binomtest

from atma_jax.config import Config
from atma_jax.data.lookup_tasks import WORDINGS, encode_trial, evaluation_trial, parse_task
from atma_jax.data.tokenizers import ByteTokenizer, Tokenizer, train_sentencepiece
from atma_jax.errors import UserError
from atma_jax.evaluation.digits import ANSWER_TOKENS, padded_width
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.report.page import render_page
from atma_jax.evaluation.scoring import Scorer
from atma_jax.evaluation.statistics import clustered_wilson_interval, wilson_interval
from atma_jax.evaluation.suite import Cell, Inputs
from atma_jax.evaluation.suites import lookup, mqar, needle, retrieval
from atma_jax.evaluation.suites.lookup import LookupOptions
from atma_jax.evaluation.suites.mqar import MqarOptions
from atma_jax.evaluation.suites.retrieval import RetrievalOptions
from atma_jax.sharding import make_mesh
from tests.data.conftest import make_text
from tests.data.test_lookup_tasks import answer

TEXT = make_text(5, 2000)
SENTENCEPIECE = train_sentencepiece([TEXT + "".join(make_text(seed, 300) for seed in range(3))], 400)
VALUE = r"(?: \d){5}"


class Scripted(Scorer):
  """Answers rows by a function from their text before the answer, and the right answer, to the answer that it gives."""

  def __init__(self, tokenizer: Tokenizer, reply: Callable[[str, list[str]], list[str]]):
    self.tokenizer, self.reply, self.shapes = tokenizer, reply, set()

  def rows_at_once(self, length: int) -> int:
    return 7

  def at_positions(self, rows: np.ndarray, positions: np.ndarray, *,
                   batch_size: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    self.shapes.add((batch_size, rows.shape[1], positions.shape[1]))
    predictions = np.zeros(positions.shape, np.int64)
    for row, at, out in zip(rows, positions, predictions, strict=True):
      asked = np.unique(at)
      right = [self.tokenizer.decode([t]).strip() for t in row[asked]]
      said = self.reply(self.tokenizer.decode(row[:asked[0]]), right)
      found = {place: row[place] if guess == truth else -1 for place, guess, truth in zip(asked, said, right, strict=True)}
      out[:] = [found[place] for place in at]
    yield np.zeros(positions.shape), predictions


def make_inputs(tokenizer: Tokenizer, scorer: Scorer, lengths: tuple[int, ...], trials: int) -> Inputs:
  text = tokenizer.encode(TEXT)
  return Inputs(scorer, tokenizer, [text], text, lengths, seed=0, min_documents=1, config=Config(), model=None, mesh=None,
                trials=trials)


def measured(cells: list[Cell]) -> dict[str, list[Measurement]]:
  found: dict[str, list[Measurement]] = {}
  for cell in cells:
    made = cell.run(lambda tokens: None)
    assert tuple((m.measure, m.length) for m in made) == cell.expected
    for m in made:
      found.setdefault(m.measure, []).append(m)
  return found


def knows(before: str, right: list[str]) -> list[str]:
  """Looks the question at the end of the text up in it."""
  for wording, words in WORDINGS.items():
    for template in (words.several, words.record, words.holds):
      cue = re.search(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template)) + r" ?$", before)
      if cue:
        return re.findall(r"\d", "".join(answer(before, cue[0].rstrip(), wording)))
  raise AssertionError(before[-80:])


def copies(rng: np.random.Generator) -> Callable[[str, list[str]], list[str]]:
  """Gives values in sight in the order of the text, whatever the key."""

  def reply(before: str, right: list[str]) -> list[str]:
    values = re.findall(VALUE, before)
    chosen = np.sort(rng.choice(len(values), len(right) // 5, replace=False))
    return re.findall(r"\d", "".join(values[i] for i in chosen))

  return reply


def guesses(rng: np.random.Generator) -> Callable[[str, list[str]], list[str]]:
  return lambda before, right: [str(digit) for digit in rng.integers(10, size=len(right))]


TASKS = ("multikey-8", "multivalue-2", "tracking-2")


def test_a_model_that_looks_up_is_always_right():
  """In both haystacks, wordings and lengths, and by every depth; all trials of a length have one shape."""
  scripted = Scripted(SENTENCEPIECE, knows)
  cells = lookup.lookup_cells(make_inputs(SENTENCEPIECE, scripted, (1024, 2048), 10), LookupOptions(TASKS))
  assert len(cells) == 3 * 2 * 2 * 2
  found = measured(cells)
  assert set(found) == {f"{task}{wording}_{what}" for task in TASKS for wording in ("", "_unseen")
                        for what in ("exact", "accuracy", "loss")}
  for name, all_of in found.items():
    assert len(all_of) == 4
    for m in all_of:
      if name.endswith("exact"):
        assert m.value == 1 and m.n == 10 and m.interval == wilson_interval(10, 10)
        assert sum(part["n"] for part in m.bins) == 10 and all(part["value"] == 1 for part in m.bins if part["n"])
        assert m.chance == parse_task(name.split("_")[0]).chance
  assert scripted.shapes == {(7, padded_width(n), ANSWER_TOKENS) for n in (1024, 2048)}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_copies_values_is_at_chance(task):
  """The chance of the record is what copying gives."""
  chance = parse_task(task).chance
  scripted = Scripted(ByteTokenizer(), copies(np.random.default_rng(0)))
  inputs = make_inputs(ByteTokenizer(), scripted, (2048,), 300)
  found = measured(lookup.lookup_cells(inputs, LookupOptions((task,), ("text",), ("seen",))))
  (exact,), (digits,) = found[f"{task}_exact"], found[f"{task}_accuracy"]
  assert digits.chance is None
  assert exact.chance == chance and abs(exact.value - chance) < 4 * np.sqrt(chance / 300)


def test_a_model_that_guesses_is_never_right():
  scripted = Scripted(ByteTokenizer(), guesses(np.random.default_rng(0)))
  inputs = make_inputs(ByteTokenizer(), scripted, (1024,), 200)
  found = measured([*lookup.lookup_cells(inputs, LookupOptions(("multikey-8",), ("filler",))),
                    *needle.needle_cells(inputs, CheckedOptions())])
  for name in ("multikey-8_exact", "multikey-8_unseen_exact", "needle_exact", "unseen_exact", "absent_exact"):
    assert found[name][0].value == 0 and found[name][0].interval[0] == 0 and found[name][0].n == 200
  for name in ("needle_accuracy", "unseen_accuracy", "absent_accuracy"):
    assert abs(found[name][0].value - 0.1) < 0.04 and found[name][0].chance == pytest.approx(0.1, abs=1e-4)


def test_trials_are_the_same_at_every_length_and_different_from_each_other():
  """Keys, values and depths; the haystack of a shorter row is a prefix of that of a longer one."""
  inputs = make_inputs(ByteTokenizer(), Scripted(ByteTokenizer(), knows), (1024, 2048), 4)
  task, haystack = parse_task("multikey-4"), np.append(inputs.tokenizer.encode(TEXT), 256)
  trials = [encode_trial(inputs.tokenizer, evaluation_trial(task, "seen", t, 0)) for t in range(4)]
  statement = r" The access code for record \d+ is" + VALUE
  texts = [[inputs.tokenizer.decode(lookup.task_row(inputs, task, trials[t], haystack, t, n)[0]) for n in inputs.lengths]
           for t in range(4)]
  for short, long in texts:
    assert re.findall(statement, short) == re.findall(statement, long)
    assert re.sub(statement, "", long).startswith(re.sub(statement, "", short))
    places = [[m.start() / len(text) for m in re.finditer(statement, text)] for text in (short, long)]
    assert np.allclose(places[0][:-1], places[1][:-1], atol=0.2)
  assert len({re.findall(statement, short)[-1] for short, _ in texts}) == 4
  assert len({re.sub(statement, "", short)[:100] for short, _ in texts}) == 4


def test_what_does_not_fit_is_left_out_or_refused():
  inputs = make_inputs(SENTENCEPIECE, Scripted(SENTENCEPIECE, knows), (128, 1024), 2)
  cells = lookup.lookup_cells(inputs, LookupOptions(("multikey-8", "multikey-512")))
  assert {(c.settings["task"], c.expected[0][1]) for c in cells} == {("multikey-8", 1024)}
  with pytest.raises(UserError, match=r"--lookup_tasks=multikey-512: none fits into 1024 tokens"):
    lookup.lookup_cells(inputs, LookupOptions(("multikey-512",)))
  for wrong in (("multikey",), (), ("multikey-8", "tracking-99")):
    with pytest.raises(UserError, match=r"--lookup_tasks=.*: must be multikey-N \(N from 2 to 4096\)"):
      LookupOptions(wrong)
  with pytest.raises(UserError, match=r"--lookup_wordings=old: must be some of seen, unseen"):
    LookupOptions(lookup_wordings=("old",))
  with pytest.raises(UserError, match=r"--mqar_pairs=1: must be whole numbers"):
    MqarOptions((1,))
  with pytest.raises(UserError, match=r"the bytes tokenizer has 0"):
    mqar.mqar_cells(make_inputs(ByteTokenizer(), Scripted(ByteTokenizer(), knows), (512,), 2), MqarOptions())


# --- Pairs ------------------------------------------------------------------------------------------------------------


def knows_pairs(before: str, right: list[str]) -> list[str]:
  """Looks the asked keys up in the pairs before; the later questions are not in `before`, so it finds them by their values."""
  pairs = {value: key for key, value in re.findall(r"(\w+)(?: ->| meets) (\w+)[;,]", before)}
  assert all(value in pairs for value in right)
  return right


def test_pairs_by_hand():
  """All pairs are of different words, each question repeats one of them, and the row has its length."""
  inputs = make_inputs(SENTENCEPIECE, Scripted(SENTENCEPIECE, knows_pairs), (256, 512), 20)
  words = mqar.single_words(SENTENCEPIECE)
  assert len(words) >= 20 and all(re.fullmatch(" ?[a-z]{2,}", SENTENCEPIECE.decode([w])) for w in words)
  haystack = SENTENCEPIECE.encode(TEXT)
  tokens, positions = mqar.mqar_row(inputs, words, haystack, "seen", 8, 0, 256)
  assert len(tokens) == 256 and tokens[0] == SENTENCEPIECE.eot_id and len(positions) == 8
  written = SENTENCEPIECE.decode(tokens)
  pairs = re.findall(r" (\w+) -> (\w+);", written)
  stated, asked = pairs[:8], pairs[8:]
  assert len({word for pair in stated for word in pair}) == 16 and set(asked) == set(stated) and asked != stated
  assert [SENTENCEPIECE.decode([t]).strip() for t in tokens[positions]] == [value for _, value in asked]
  assert written.endswith("".join(f" {key} -> {value};" for key, value in asked))
  again, _ = mqar.mqar_row(inputs, words, haystack, "seen", 8, 1, 256)
  assert set(re.findall(r" (\w+) -> (\w+);", SENTENCEPIECE.decode(again))) != set(pairs)
  cells = mqar.mqar_cells(inputs, MqarOptions((2, 8, 4096)))
  assert len(cells) == 2 * 2 * 2 * 2  # haystacks, lengths, pairs that fit, wordings
  found = measured(cells)
  assert all(m.value == 1 and m.n == {"2": 20, "8": 24}[name[5]] and m.chance == 1 / int(name[5])
             for name, all_of in found.items() if name.endswith("exact") for m in all_of)


def test_questions_of_a_row_widen_the_interval():
  """One question a row is Wilson's interval; rows that are all right or all wrong count once; independent ones count all."""
  assert clustered_wilson_interval(np.array([1] * 30 + [0] * 20), 1) == pytest.approx(wilson_interval(30, 50))
  assert clustered_wilson_interval(np.array([8] * 30 + [0] * 20), 8) == pytest.approx(wilson_interval(30, 50), abs=2e-3)
  right = np.random.default_rng(0).binomial(8, 0.6, 500)
  low, high = clustered_wilson_interval(right, 8)
  narrow = wilson_interval(int(right.sum()), 4000)
  assert narrow[1] - narrow[0] <= high - low < 1.2 * (narrow[1] - narrow[0])
  assert clustered_wilson_interval(np.array([8, 8]), 8) == wilson_interval(16, 16)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2000), share=st.floats(0, 1))
def test_wilson_equals_scipy(n, share):
  k = round(share * n)
  expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
  np.testing.assert_allclose(wilson_interval(k, n), (expected.low, expected.high), atol=1e-9)


# --- A real model -----------------------------------------------------------------------------------------------------


def test_one_program_serves_all_trials_of_a_length(random_model, monkeypatch):
  """Needle, retrieval, lookup and mqar, all wordings, haystacks and depths: one program a length."""
  monkeypatch.setattr(mqar, "single_words", lambda tokenizer: np.arange(97, 123, dtype=np.int32))
  mesh = make_mesh(devices=jax.devices()[:1])
  scorer = Scorer(random_model, mesh, batch_tokens=2048, chunk=32)
  inputs = dataclasses.replace(make_inputs(ByteTokenizer(), scorer, (256,), 2), mesh=mesh)
  cells = [*needle.needle_cells(inputs, CheckedOptions()), *retrieval.retrieval_cells(inputs, RetrievalOptions(depths=(50.0,))),
           *lookup.lookup_cells(inputs, LookupOptions(("multikey-2",))), *mqar.mqar_cells(inputs, MqarOptions((4,)))]
  done = 0
  for cell in cells:
    tokens: list[int] = []
    made = cell.run(tokens.append)
    assert sum(tokens) == cell.tokens and cell.settings["wording"] in WORDINGS
    assert all(m.interval is not None for m in made if m.measure.endswith(("exact", "accuracy")))
    assert all(m.chance is not None for m in made if m.measure.endswith("exact"))
    done += 1
  assert done == 2 + 2 * 2 * 2 + 2 * 2 + 2 * 2 and scorer.compilations == 1


def test_the_page_shows_curves_and_depths():
  """Panels and depths of lookup and the curve of mqar, from the cells' own records."""
  base = {"schema": 1, "checkpoint": "/runs/a", "step": 1, "name": "a", "training_length": 1024, "config": Config().to_dict(),
          "jax": "0", "hardware": "1 x test", "code": "0", "seconds": 1.0}
  scripted = Scripted(SENTENCEPIECE, knows)
  inputs = make_inputs(SENTENCEPIECE, scripted, (1024,), 8)
  cells = [("lookup", cell) for cell in lookup.lookup_cells(inputs, LookupOptions(("multikey-8",)))]
  pairs = dataclasses.replace(inputs, scorer=Scripted(SENTENCEPIECE, knows_pairs))
  cells += [("mqar", cell) for cell in mqar.mqar_cells(pairs, MqarOptions((2, 8)))]
  records = [{**base, "suite": suite, "settings": cell.settings, **dataclasses.asdict(m)} for suite, cell in cells
             for m in cell.run(lambda tokens: None)]
  page = render_page(records)
  for text in ("Lookup among alternatives", "multikey-8 in filler", "40 to 60 %", "Associative recall", "unseen wording",
               "by chance 0.125", "2 pairs"):
    assert text in page, text
  own = [r for r in records if r["suite"] == "lookup"]
  printed = lookup.lookup_table(own)
  for text in ("multikey-8 in text, unseen wording (chance 12.5)", "100 [67.6, 100.0]", "8 trials a cell"):
    assert text in printed
  assert "8 pairs in filler, seen wording (chance 12.5)" in mqar.mqar_table([r for r in records if r["suite"] == "mqar"])

"""Retrieval tasks: the text holds the answer, wordings are disjoint, and training material does not give answers away."""

from __future__ import annotations

import hashlib
import pathlib
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from atma_jax.data import lookup_tasks
from atma_jax.data.lookup_tasks import (
  BETWEEN_VALUES,
  CHAINS,
  WORDINGS,
  Task,
  encode_trial,
  evaluation_trial,
  lookup_row,
  parse_task,
)
from atma_jax.data.needles import is_evaluation_number, spaced
from atma_jax.data.sources import parse_source, recall
from atma_jax.data.sources.recall_tasks import task_document
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from tests.data.conftest import make_text
from tests.data.test_needles import TOKENIZERS

TEXT = make_text(0, 2000)
MATERIAL = {"recall": lambda seed, gap: recall.recall_document(
              make_text(seed, 600), longest_gap=gap, rng=np.random.default_rng(seed)),
            "recall-tasks": lambda seed, gap: task_document(
              make_text(seed, 600), longest_gaps=gap, rng=np.random.default_rng(seed))}


def pattern(template: str) -> str:
  """A regular expression of the template with anything in its gaps."""
  return re.sub(r"\\{\w+\\}", r"(\\w+)", re.escape(template))


def answer(text: str, cue: str, wording: str) -> list[str]:
  """Reads the text as a person would and answers the question `cue`, which may be about records or registers."""
  words, value = WORDINGS[wording], r"((?: \d){5})"
  stated = {(template, key): found for template in (words.record, words.holds)
            for key, found in re.findall(pattern(template) + value, text)}
  if several := re.fullmatch(pattern(words.several), cue):
    return [v for k, v in re.findall(pattern(words.record) + value, text) if k == several[1]]
  if record := re.fullmatch(pattern(words.record), cue):
    return [stated[words.record, record[1]]]
  (name,) = re.fullmatch(pattern(words.holds), cue).groups()
  sources = dict(re.findall(pattern(words.copies), text))
  while name in sources:
    name = sources[name]
  return [stated[words.holds, name]]


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("name", ["multikey-2", "multikey-64", "multivalue-2", "multivalue-4", "tracking-1", "tracking-4"])
def test_the_answer_is_in_the_text(name, wording):
  """Each answer follows from the statements; numbers are evaluation's own, and differ where they must."""
  task = parse_task(name)
  about = []
  for trial in range(30):
    statements, (question,) = evaluation_trial(task, wording, trial, seed=3)
    text = "".join(statements)
    values = answer(text, question.cue, wording)
    assert values == [spaced(v) for v in question.values] and len(values) == (task.size if task.kind == "multivalue" else 1)
    numbers = re.findall(r"\d{3,}", text) + [v.replace(" ", "") for v in re.findall(r"(?: \d){5}", text)]
    assert all(is_evaluation_number(int(number)) for number in numbers)
    stated = re.findall(r"(?: \d){5}", text)
    assert len(set(stated)) == len(stated) == {"multikey": task.size, "multivalue": 2 * task.size, "tracking": CHAINS}[task.kind]
    assert question.values[0] in statements[question.about].replace(" ", "")
    about.append(question.about / len(statements))
  assert np.std(about) > 0.1  # the asked record is anywhere
  assert evaluation_trial(task, wording, 4, 3) == evaluation_trial(task, wording, 4, 3) != evaluation_trial(task, wording, 4, 5)


def test_both_wordings_ask_the_same():
  for name in ("multikey-8", "multivalue-4", "tracking-2"):
    seen, unseen = (evaluation_trial(parse_task(name), wording, 7, 0) for wording in WORDINGS)
    assert [q.values for q in seen.questions] == [q.values for q in unseen.questions]
    assert [re.findall(r"\d", s) for s in seen.statements] == [re.findall(r"\d", s) for s in unseen.statements]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["multikey-8", "multivalue-3", "tracking-2"])
def test_a_row_by_hand(kind, name):
  """A row has the length, the haystack in its order, the statements at their depths, the question last, and digits where said."""
  tokenizer, task = TOKENIZERS[kind], parse_task(name)
  trial = evaluation_trial(task, "seen", 0, 0)
  encoded = encode_trial(tokenizer, trial)
  haystack, length = tokenizer.encode(TEXT), 2000
  depths = np.linspace(0.2, 0.9, len(trial.statements))
  tokens, positions = lookup_row(tokenizer, haystack, encoded, length=length, depths=depths)
  assert len(tokens) == length and tokens[0] == tokenizer.eot_id
  assert "".join(tokenizer.decode([t]).strip() for t in tokens[positions]) == "".join(trial.questions[0].values)
  written = tokenizer.decode(tokens)
  question = trial.questions[0].cue + BETWEEN_VALUES.join(map(spaced, trial.questions[0].values))
  assert written.endswith(question) and positions[-1] == length - 1
  bare = written.removesuffix(question)
  places = [bare.index(statement) for statement in trial.statements]
  assert places == sorted(places)
  hay = length - encoded.tokens
  assert np.array_equal(tokens[1:1 + round(0.2 * hay)], haystack[:round(0.2 * hay)])
  for statement in trial.statements:
    bare = bare.replace(statement, "", 1)
  assert bare == tokenizer.decode(haystack[:hay])
  exactly, _ = lookup_row(tokenizer, haystack, encoded, length=encoded.tokens, depths=depths)
  assert tokenizer.decode(exactly) == "".join(trial.statements) + question
  with pytest.raises(UserError, match=f"a trial of {encoded.tokens} tokens does not fit into {encoded.tokens - 1}"):
    lookup_row(tokenizer, haystack, encoded, length=encoded.tokens - 1, depths=depths)


def test_chance():
  """Guessing among values in sight, in the order of the text."""
  assert [parse_task(name).chance for name in ("multikey-64", "multivalue-4", "tracking-2")] == [1 / 64, 1 / 70, 1 / 8]
  assert parse_task("multikey-64") == Task("multikey", 64)


@pytest.mark.parametrize("name", ["multikey", "multikey-1", "multikey-5000", "multivalue-7", "tracking-0", "tracking-16", "x-3",
                                  "multikey-٣", "multikey--8", ""])
def test_what_is_not_a_task(name):
  with pytest.raises(ValueError, match="is not a task: must be multikey-N with N from 2 to 4096, multivalue-N"):
    parse_task(name)


# --- Training material ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", MATERIAL)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), gap=st.integers(1, 5000))
def test_the_unseen_wording_is_in_no_material(source, seed, gap):
  """No template of the unseen wording, and no number of the evaluation in any record, whatever the seed and length."""
  text = MATERIAL[source](seed, gap)
  unseen = WORDINGS["unseen"]
  for template in unseen.cues:
    assert not re.search(pattern(template), text)
  assert not re.search(rf" \w+{unseen.pair[0]} \w+{unseen.pair[1]}", text)
  seen = WORDINGS["seen"]
  for template in (seen.record, seen.holds):
    for key, value in re.findall(pattern(template) + r"((?: \d){5})", text):
      assert not is_evaluation_number(int(key)) and not is_evaluation_number(int(value.replace(" ", "")))


def test_the_wordings_share_no_words():
  """No word of an unseen template, but for "is" and "with", is in any phrasing of the training material."""
  material = [*WORDINGS["seen"].cues, "x".join(WORDINGS["seen"].pair), *(phrase for phrase, _ in recall.PHRASINGS)]
  seen_words = set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", " ".join(material))))
  for template in (*WORDINGS["unseen"].cues, "".join(WORDINGS["unseen"].pair)):
    words = set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", template)))
    assert not words & seen_words - {"is", "with"}, template
    assert "{" not in template or template not in pathlib.Path(lookup_tasks.__file__).read_text()  # python-source may read it


def test_the_seen_wordings_are_in_the_material():
  """Records of one form are in both; the other tasks only in that of recall-tasks."""
  texts = {name: "".join(make(seed, 3000) for seed in range(10)) for name, make in MATERIAL.items()}
  seen = WORDINGS["seen"]
  assert all(len(re.findall(pattern(seen.record), text)) > 20 for text in texts.values())
  for template in (seen.several, seen.holds, seen.copies):
    assert len(re.findall(pattern(template), texts["recall-tasks"])) > 5 and not re.search(pattern(template), texts["recall"])
  assert len(re.findall(r" \w+ -> \w+;", texts["recall-tasks"])) > 20


def test_recall_material_is_as_it_was():
  """Byte for byte: these are the documents that the published results were trained on."""
  digest = hashlib.sha256()
  for seed in range(10):
    digest.update(recall.recall_document(make_text(seed, 2000), longest_gap=600, rng=np.random.default_rng(seed)).encode())
  assert digest.hexdigest() == "c5b9fab64befe2641be869efda44ae8634c8d5b643f320299ae263585ee6d34e"


def test_task_documents_ask_for_what_they_stated():
  """Deterministic; the text keeps its order; every question about a record or register has the stated answer."""
  make, cue_of = MATERIAL["recall-tasks"], WORDINGS["seen"]
  assert make(1, 800) == make(1, 800) != make(2, 800)
  asked = 0
  for seed in range(20):
    text = make(seed, 2000)
    records: dict[str, set[str]] = {}
    for key, value in re.findall(pattern(cue_of.record) + r"((?: \d){5})", text):
      records.setdefault(key, set()).add(value)
    asked += len(re.findall(pattern(cue_of.record), text)) - sum(map(len, records.values()))
    for match in re.finditer(pattern(cue_of.several) + r"((?: \d){5}(?:;(?: \d){5})+)", text):
      assert answer(text[:match.start()], match[0].removesuffix(match[2]), "seen") == match[2].split(";")
    pairs = re.findall(r" (\w+) -> (\w+);", text)
    assert not pairs or len(set(pairs)) < len(pairs)  # each question repeats a pair
  assert asked > 20
  bare = re.sub(r" (?:The access code for record \d+ is(?: \d){5}|All access codes for record \d+ are(?: \d){5}(?:;(?: \d){5})*|"
                r"Register \d+ holds(?: \d){5}|Register \d+ copies register \d+\.|\w+ -> \w+;)", "", make(3, 2000))
  assert make_text(3, 600).startswith(bare) and len(bare) > 0.9 * len(make_text(3, 600))


@pytest.mark.parametrize("filler", ["", "a", "one two", "x" * 300])
def test_task_documents_of_odd_text(filler):
  """They end, and hold all of the text, with however few words."""
  text = task_document(filler, longest_gaps=5, rng=np.random.default_rng(0))
  assert (filler == "") == (text == "")


def test_the_source_is_found_by_its_name():
  source = parse_source("recall-tasks:python-source")
  assert source.base.entry == "python-source" and source.settings == ("recall_max_mib", "sequence_length")
  with pytest.raises(UserError, match="must name a source of text after recall-tasks:"):
    parse_source("recall-tasks:recall:python-source")


def test_the_byte_tokenizer_spells_a_trial():
  encoded = encode_trial(ByteTokenizer(), evaluation_trial(parse_task("multikey-2"), "seen", 0, 0))
  assert encoded.tokens == 1 + len(encoded.stated) + len(encoded.asked) and len(encoded.offsets) == 5

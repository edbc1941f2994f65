"""Suite ``babilong`` on generated questions of its first task: where is somebody?"""

from __future__ import annotations

import json

from flax import nnx
import jax
import numpy as np
import pytest

from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.suites import babilong
from atma_jax.evaluation.suites.babilong import BabilongOptions

TOKENIZER = ByteTokenizer()


def question(rng: np.random.Generator, place: str) -> dict[str, str]:
  name = rng.choice(["Mary", "John"])
  return {"input": f"{name} went to the {place}.", "question": f"Where is {name}?", "target": place}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Training files as a JSON list and as JSON lines, test files at two lengths."""
  folder, rng = tmp_path_factory.mktemp("babilong"), np.random.default_rng(0)
  for split in ("train", "test"):
    (folder / split / "qa1").mkdir(parents=True)
  (folder / "train/qa1/0k.json").write_text(json.dumps([question(rng, "hall") for _ in range(6)]))
  lines = [question(rng, "hall") for _ in range(6)]
  (folder / "train/qa1/1k.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (folder / "test/qa1/0k.json").write_text(json.dumps([question(rng, "hall") for _ in range(3)] + [question(rng, "attic")]))
  (folder / "test/qa1/1k.json").write_text(json.dumps([question(rng, "hall")]))
  return folder


def test_only_answers_are_trained_on(folder):
  """The weights select the answer and its end-of-text; a row begins with end-of-text and the prompt."""
  examples = babilong.load_examples(str(folder / "train"), "qa1", "0k", TOKENIZER, 2)
  tokens, weights = babilong.make_batch(examples, TOKENIZER.eot_id)
  assert tokens.shape == (2, 65) and weights.shape == (2, 64)
  for row, scored in zip(tokens, weights):
    assert row[0] == TOKENIZER.eot_id
    targets = row[1:][scored > 0]
    assert TOKENIZER.decode(targets) == " hall" and targets[-1] == TOKENIZER.eot_id
    assert TOKENIZER.decode(row[:-1][np.flatnonzero(scored)[0]::-1][::-1]).endswith("?\nAnswer:")


@pytest.mark.slow
def test_the_probe_learns_to_answer(inputs_of, folder, random_model):
  """The fine-tuned model has learnt to answer "hall", which is right three times of four; the model itself is unchanged."""
  options = BabilongOptions(
    str(folder / "train"), str(folder / "test"), babilong_train_lengths=("0k", "1k"), babilong_test_lengths=("0k", "1k"),
    babilong_steps=40, babilong_batch_size=4, babilong_learning_rate=2e-2)
  inputs = inputs_of(["text"], (32,))
  before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(random_model))]
  cells = babilong.babilong_cells(inputs, options)
  assert [cell.expected for cell in cells] == [(("babilong_exact", 0),), (("babilong_exact", 1024),)]
  (found,) = cells[0].run(lambda tokens: None)
  assert (found.value, found.n) == (0.75, 4) and found.interval[0] < 0.75 < found.interval[1]
  for old, new in zip(before, jax.tree.leaves(nnx.state(random_model))):
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(("content", "said"), [
  ("[{]", "not JSON"), ('[{"input": "x", "question": 3, "target": "y"}]', "item 1 must be"), ("[]", "no examples"),
])
def test_malformed_data_is_named(tmp_path, content, said):
  (tmp_path / "qa1").mkdir()
  (tmp_path / "qa1" / "0k.json").write_text(content)
  with pytest.raises(UserError, match=rf"qa1/0k\.json: .*{said}"):
    babilong.load_examples(str(tmp_path), "qa1", "0k", TOKENIZER)
  with pytest.raises(UserError, match=r"no file .*qa2/0k\.json"):
    babilong.load_examples(str(tmp_path), "qa2", "0k", TOKENIZER)
  with pytest.raises(UserError, match="'long' is not one of BABILong's"):
    babilong.load_examples(str(tmp_path), "qa1", "long", TOKENIZER)

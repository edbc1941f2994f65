"""The model of the lm-evaluation-harness against direct computations from all logits."""

from __future__ import annotations

import numpy as np
import pytest

from atma_jax.checkpoints.load import LoadedModel
from atma_jax.config import Config, DataConfig
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError

pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed: pip install 'atma_jax[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from atma_jax.evaluation import lm_eval_adapter
from tests import local_task

TOKENIZER = ByteTokenizer()
PAIRS = [("The fox", " jumps"), ("", "alone"), ("A context of some length, then", " more than eight tokens of continuation"),
         ("x", "y"), ("The fox", " sleeps "), ("trailing space ", "word"), ("é", "漢字"), ("The fox", "")]


def requests(*arguments, kind="loglikelihood"):
  return [Instance(kind, {}, a, 0) for a in arguments]


@pytest.fixture(scope="module")
def model(random_model):
  """``model(**model_args)``, made by the harness, with the tiny model in place of that of a checkpoint."""

  def make(**arguments):
    patch = pytest.MonkeyPatch()
    config = Config(model=random_model.config, data=DataConfig(sequence_length=32))
    patch.setattr(lm_eval_adapter, "load_model",
                  lambda directory, step, mesh, ema, overrides: LoadedModel(config, random_model, TOKENIZER, 7))
    with patch.context():
      made = get_model("atma_jax").create_from_arg_obj({"checkpoint": "DIR", **arguments}, {"batch_size": None})
    patch.undo()
    return made

  return make


@pytest.fixture(scope="module")
def direct(logits_of):
  """``(context, continuation) -> (log-probability, greedy)`` from all logits, with end-of-text before the context."""

  def score(context: str, continuation: str) -> tuple[float, bool]:
    context, continuation = TOKENIZER.encode(context), TOKENIZER.encode(continuation)
    row = np.concatenate([[256], context, continuation])
    logits = logits_of(row[None])[0][len(context):-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(continuation)), continuation].sum(), bool((logits.argmax(-1) == continuation).all())

  return score


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"batch_size": 1}, {"batch_size": "auto", "batch_tokens": 256},
                                       {"batch_size": "2", "prefill_chunk": 32}], ids=str)
def test_scores_equal_a_direct_computation(model, direct, arguments):
  """Batch size, padding and pieces do not change scores."""
  made = model(**arguments)
  for (context, continuation), (value, is_greedy) in zip(PAIRS, made.loglikelihood(requests(*PAIRS), disable_tqdm=True)):
    if not continuation:
      assert (value, is_greedy) == (0.0, True)
      continue
    stripped = context.rstrip()  # the harness moves white space at the context's end to the continuation
    expected = direct(stripped, context[len(stripped):] + continuation)
    np.testing.assert_allclose(value, expected[0], rtol=2e-5)
    assert is_greedy == expected[1]
  assert made.scorer.compilations <= 6


@pytest.mark.slow
def test_rolling_scores_whole_texts_or_windows(model, direct, logits_of):
  """Without `max_length` the whole text follows one end-of-text; with it, windows score each token once."""
  text = "A text that is longer than a window of sixteen tokens."
  (whole,) = model(batch_size=2).loglikelihood_rolling(requests((text,), kind="loglikelihood_rolling"), disable_tqdm=True)
  np.testing.assert_allclose(whole, direct("", text)[0], rtol=2e-5)
  (found,) = model(batch_size=2, max_length=16).loglikelihood_rolling(requests((text,)), disable_tqdm=True)
  tokens, expected = [256, *TOKENIZER.encode(text)], 0.0
  for start in range(1, len(tokens), 16):
    stop = min(start + 16, len(tokens))
    first = max(0, stop - 17) if stop < len(tokens) else len(tokens) - 17
    logits = logits_of(np.array(tokens[first:stop - 1])[None])[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.array(tokens[first + 1:stop])
    expected += logprobs[np.arange(len(targets)), targets][start - first - 1:].sum()
  np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.slow
def test_generation_is_greedy_and_stops(model, logits_of):
  """Every token is the most likely one, and the text ends before a stop string."""
  tokens = [256, *TOKENIZER.encode("The fox")]
  start = len(tokens)
  for _ in range(8):
    tokens.append(int(logits_of(np.array([tokens]))[0, -1].argmax()))
    if tokens[-1] == 256:
      break
  expected = TOKENIZER.decode(tokens[start:])
  made = model(batch_size=2)
  ask = [("The fox", {"until": [], "max_gen_toks": 8}),
         ("The fox", {"until": [expected[2]], "max_gen_toks": 8, "do_sample": False}),
         ("x", {"until": "\n", "max_gen_toks": 3, "temperature": 0.0})]
  found = made.generate_until(requests(*ask, kind="generate_until"), disable_tqdm=True)
  assert found[0] == expected
  assert found[1] == expected[:expected.index(expected[2])]


def test_nothing_is_cut_or_ignored(model):
  """Requests that do not fit, options that the engine lacks and arguments that do not exist are errors."""
  made = model(max_length=16)
  with pytest.raises(UserError, match="max_length=16: a request has 30 tokens"):
    made.loglikelihood(requests(("c" * 20, "d" * 10)), disable_tqdm=True)
  with pytest.raises(UserError, match="max_length=16: a request has 257 tokens of prompt and new"):
    made.generate_until(requests(("", {"until": []})), disable_tqdm=True)
  with pytest.raises(UserError, match="'num_beams' does not exist"):
    made.generate_until(requests(("", {"until": [], "num_beams": 4})), disable_tqdm=True)
  for arguments, said in (({"chekpoint": "x"}, "did you mean 'checkpoint'"), ({"batch_size": "many"}, "--batch_size=many"),
                          ({"fsdp": 3}, "fsdp=3"), ({"max_length": 0}, "max_length=0"), ({"checkpoint": ""}, "checkpoint=DIR")):
    with pytest.raises(UserError, match=said):
      model(**arguments)


@pytest.mark.slow
def test_a_local_task_through_the_harness(model, direct, tmp_path, monkeypatch):
  """A multiple-choice task in JSON lines, without network: accuracy and log-likelihoods equal those computed directly."""
  found, accuracy = local_task.evaluate(tmp_path, monkeypatch, model=model(batch_size=3))
  scores = [[direct(item["question"], " " + choice)[0] for choice in item["choices"]] for item in local_task.ITEMS]
  np.testing.assert_allclose(found, scores, rtol=2e-5)
  assert accuracy == np.mean(np.argmax(scores, 1) == [item["answer"] for item in local_task.ITEMS])

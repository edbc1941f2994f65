"""The engine: every request is answered once, with the tokens that it would get alone."""

from __future__ import annotations

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest

from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Completion, Engine
from atma_jax.inference.footprint import rows_within
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.models.cache import Cache, nbytes

GREEDY = Sampling(temperature=0, max_tokens=20, ignore_end=True)


@pytest.fixture(scope="module")
def model(lively):
  return lively()


def full_pass(model: Atma, length: int = 128):
  """Returns a function of n tokens that computes the log-probabilities (n, V) after each, by a full pass over `length` tokens."""
  graphdef, state = nnx.split(model)
  call = jax.jit(lambda state, tokens: jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens)))
  return lambda tokens: np.asarray(call(state, np.pad(tokens, (0, length - len(tokens)))[None])[0, : len(tokens)])


@pytest.fixture(scope="module")
def forward(model):
  return full_pass(model)


def assert_greedy(forward, prompt: np.ndarray, completion: Completion) -> np.ndarray:
  """Checks that every token is the likeliest legal one; returns the log-probabilities (n, V) at the n tokens."""
  assert (len(completion.tokens), completion.finish_reason) == (20, "length")
  logprobs = forward(np.concatenate([prompt, completion.tokens]).astype(np.int32))[len(prompt) - 1 : -1]
  assert completion.tokens == logprobs[:, :257].argmax(-1).tolist()  # ids beyond the tokenizer never come
  return logprobs


@pytest.fixture(scope="module")
def engine(model):
  return Engine(model, ByteTokenizer(), rows=3, capacity=128, chunk=32, decode_steps=4, alternatives=2, prefixes=2)


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, rng.integers(1, 90)).astype(np.int32) for _ in range(count)]


def test_greedy_is_the_argmax_of_the_full_pass(engine, forward):
  """Tokens and log-probabilities are those of the full pass for prompts of one token, odd lengths and several chunks."""
  starts = [np.arange(n, dtype=np.int32) for n in (1, 2, 31, 33, 65, 90)]
  for prompt, completion in zip(starts, engine.generate(starts, GREEDY), strict=True):
    logprobs = assert_greedy(forward, prompt, completion)
    np.testing.assert_allclose(completion.logprobs, logprobs[np.arange(20), completion.tokens], atol=1e-4)
    top = np.array(completion.alternatives)
    np.testing.assert_allclose(top[:, :, 1], np.sort(logprobs, -1)[:, :-3:-1], atol=1e-4)
    assert completion.text == ByteTokenizer().decode(completion.tokens)


def test_a_request_gets_what_it_gets_alone(engine):
  """Seeded draws with all kinds of options do not depend on the other requests, their order or their number."""
  starts = prompts(9)
  options = [Sampling(max_tokens=5 + 4 * i, seed=i, temperature=0.3 + 0.2 * i, top_k=(0, 7)[i % 2],
                      top_p=(1.0, 0.9, 0.5)[i % 3], min_p=(0.0, 0.05)[i % 2], repetition_penalty=(1.0, 1.3)[i % 2])
             for i in range(9)]
  together = engine.generate(starts, options)
  order = np.random.default_rng(3).permutation(9)
  shuffled = engine.generate([starts[i] for i in order], [options[i] for i in order])
  for place, i in enumerate(order):
    alone, = engine.generate([starts[i]], options[i])
    for other in (together[i], shuffled[place]):
      assert (other.tokens, other.text, other.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
      np.testing.assert_allclose(other.logprobs, alone.logprobs, atol=1e-4)
  other_seed, = engine.generate([starts[8]], dataclasses.replace(options[8], seed=99))
  assert other_seed.tokens != together[8].tokens


def test_nothing_is_compiled_while_serving(engine):
  """Whatever the lengths and options, there is one decoding program, and one prefill program per power of two."""
  engine.generate(prompts(12, seed=4), [Sampling(max_tokens=1 + i, top_k=i) for i in range(12)])
  assert engine.programs.decode._cache_size() == engine.programs.place._cache_size() == engine.programs.stop._cache_size() == 1
  assert engine.programs.prefill._cache_size() <= 2  # 16 and 32


@pytest.mark.slow
def test_long_prompts_and_short_buckets(model):
  """Prompts whose first pass uses the ops of the full forward pass, and rows that outgrow their buckets while they decode, get
  the tokens of the full pass, and nothing is compiled after the warm-up."""
  engine = Engine(model, ByteTokenizer(), rows=3, capacity=1024, chunk=64, first_chunk=256, decode_steps=4, max_buckets=3)
  assert engine.buckets == [256, 512, 1024]
  engine.warm_up()
  programs = engine.programs.prefill._cache_size(), engine.programs.decode._cache_size()
  assert programs == (5, 3)  # 16, 32, 64 and first 128, 256; one per bucket
  rng = np.random.default_rng(11)
  starts = [rng.integers(0, 256, n).astype(np.int32) for n in (700, 245, 1, 257, 500, 100)]
  forward = full_pass(model, 720)
  for prompt, completion in zip(starts, engine.generate(starts, GREEDY), strict=True):
    assert_greedy(forward, prompt, completion)
  assert (engine.programs.prefill._cache_size(), engine.programs.decode._cache_size()) == programs


def test_a_long_prompt_lets_others_decode(engine):
  """Between two decoding programs a prompt advances by a bounded number of tokens, and it may be cancelled meanwhile."""
  first = engine.submit([1], dataclasses.replace(GREEDY, max_tokens=60))
  second = engine.submit([2], dataclasses.replace(GREEDY, max_tokens=60))
  assert engine.step() == []  # the first tokens are looked at once the next program runs
  long = engine.submit(np.arange(100, dtype=np.int32), GREEDY)
  before, rows = engine.prefilled, jax.tree.leaves(engine.state)
  outputs = engine.step()
  assert all(leaf.is_deleted() for leaf in rows)  # the device writes where it read: nothing of a row exists twice
  assert {output.request for output in outputs} == {first, second}
  assert engine.prefilled == before + 32 and engine.counts == {"waiting": 0, "prefilling": 1, "decoding": 2}
  assert engine.cancel(long).finish_reason == "cancelled" and engine.counts["prefilling"] == 0
  while engine.busy:
    assert all(output.request != long for output in engine.step())


def test_a_stored_prompt_is_continued(engine, forward, tmp_path):
  """A prompt that continues a loaded state gets the tokens of the full pass, and only its new tokens are prefilled."""
  prompt = np.random.default_rng(12).integers(0, 256, 70).astype(np.int32)
  engine.save(tmp_path / "state.npz", prompt)
  engine.forget_prefixes()
  before = engine.prefilled
  np.testing.assert_array_equal(engine.load(tmp_path / "state.npz"), prompt)
  longer = np.append(prompt, [1, 2, 3]).astype(np.int32)
  assert_greedy(forward, longer, engine.generate([longer], GREEDY)[0])
  assert engine.prefilled == before + 2


@pytest.mark.slow
def test_int8_keys_and_values_move_log_probabilities_a_little(model, engine):
  """They move by less than 0.1 in a model of large random weights, and requests still do not depend on each other."""
  narrow = Engine(model, ByteTokenizer(), rows=3, capacity=128, chunk=32, decode_steps=4, cache_dtype="int8")
  starts = prompts(5, seed=13)
  together = narrow.generate(starts, dataclasses.replace(GREEDY, max_tokens=8))
  alone, = narrow.generate(starts[4:], dataclasses.replace(GREEDY, max_tokens=8))
  assert alone.tokens == together[4].tokens
  exact = engine.generate(starts, dataclasses.replace(GREEDY, max_tokens=1))
  for a, b in zip(exact, together):
    assert abs(a.logprobs[0] - b.logprobs[0]) < 0.1 or a.tokens[0] != b.tokens[0]


def test_rows_fit_the_memory(model):
  """Rows and kept prefixes fill the memory; a memory that is too small is refused with the size that is needed."""
  row = nbytes(jax.eval_shape(lambda: Cache.create(model.config, 1, 128)))
  assert rows_within(model.config, 10.5 * row / 2**30, capacity=128, prefixes=3) == 5
  assert rows_within(model.config, 10.5 * row / 2**30, capacity=128, cache_dtype="bfloat16") > 8
  with pytest.raises(UserError, match=r"cache_gib=1e-06: a row of 128 tokens takes .* at least"):
    rows_within(model.config, 1e-6, capacity=128)


def test_ends(engine):
  """End-of-text, a stop string and the token limit end a text, which excludes the stop string while the tokens include it."""
  prompt = np.arange(40, dtype=np.int32)
  free, = engine.generate([prompt], dataclasses.replace(GREEDY, max_tokens=40))
  place = next(i for i in range(10, 40) if free.tokens[i] < 128)
  stop = ByteTokenizer().decode(free.tokens)[2:]
  stop = stop[: stop.find(chr(free.tokens[place])) + 1]
  stopped, = engine.generate([prompt], dataclasses.replace(GREEDY, max_tokens=40, stop=(stop,)))
  assert stopped.finish_reason == "stop" and free.text.startswith(stopped.text + stop)
  assert stopped.tokens == free.tokens[: len(stopped.tokens)] and len(stopped.tokens) < 40
  drawn = engine.generate([prompt] * 40, [Sampling(seed=i, max_tokens=80, temperature=3.0) for i in range(40)])
  ended = [c for c in drawn if c.finish_reason == "stop"]
  assert ended and all(c.tokens[-1] == 256 and 256 not in c.tokens[:-1] for c in ended)
  assert all(len(c.tokens) == 80 for c in drawn if c.finish_reason == "length")


def test_cancelled_requests_free_their_rows(engine):
  """Under random cancellations each request ends exactly once, and the others get the tokens that they get alone."""
  rng = np.random.default_rng(5)
  starts = prompts(20, seed=6)
  expected = engine.generate(starts, GREEDY)
  names = [engine.submit(prompt, GREEDY) for prompt in starts]
  tokens, ends = {name: [] for name in names}, {}
  while engine.busy:
    outputs = engine.step()
    if (output := engine.cancel(int(rng.choice(names)))) is not None:
      outputs.append(output)
    for output in outputs:
      assert output.request not in ends
      if output.token is not None:
        tokens[output.request].append(output.token)
      if output.finish_reason is not None:
        ends[output.request] = output.finish_reason
  assert ends.keys() == set(names) and set(ends.values()) == {"length", "cancelled"}
  for name, completion in zip(names, expected):
    own = tokens[name]
    assert own == completion.tokens[: len(own)]
    assert (len(own) == 20) or ends[name] == "cancelled"
  assert engine.cancel(names[0]) is None and engine.step() == []


def test_refusals(engine, model):
  """Bad requests and sizes are refused in one line that says what is legal, before anything runs."""
  for prompt, sampling, words in (
      (np.zeros(100, np.int32), Sampling(max_tokens=29), "max_tokens=29.*at most 28"),
      ([0, 272], Sampling(), "from 0 to 271"), ([-1], Sampling(), "from 0 to 271")):
    with pytest.raises(UserError, match=words):
      engine.submit(prompt, sampling)
  for options, words in (({"chunk": 48}, "power of two"), ({"first_chunk": 256}, "power of two of at least 512"),
                         ({"rows": 0}, "rows=0"), ({"decode_steps": 0}, "decode_steps=0")):
    with pytest.raises(UserError, match=words):
      Engine(model, ByteTokenizer(), **options)
  assert not engine.busy


@pytest.mark.slow
def test_a_window_takes_any_length(lively, model):
  """Prompt and text may be many times as long as the cache."""
  model = lively(dataclasses.replace(model.config, window=12))
  engine = Engine(model, ByteTokenizer(), rows=1, capacity=12, chunk=16, decode_steps=20)
  prompt = np.random.default_rng(7).integers(0, 256, 150)
  assert_greedy(full_pass(model, 170), prompt, engine.generate([prompt], GREEDY)[0])


def test_a_kept_prefix_restores_everything(engine, forward):
  """A prompt that continues an earlier one gets the tokens of the full pass, and only its new tokens are prefilled."""

  def cost(prompt: np.ndarray) -> int:
    before = engine.prefilled
    assert_greedy(forward, prompt, engine.generate([prompt], GREEDY)[0])
    return engine.prefilled - before

  base, other, third = (np.random.default_rng(seed).integers(0, 256, 60).astype(np.int32) for seed in (8, 9, 10))
  longer = np.concatenate([base, np.arange(7, dtype=np.int32)])
  assert [cost(p) for p in (base, longer, longer, np.append(base[:-1], [1, 2]))] == [59, 7, 0, 1]
  assert [cost(p) for p in (other, third, longer)] == [59, 59, 66]  # only the last two are kept


@pytest.mark.slow
def test_generate_command(main, checkpoint, engine, tmp_path):
  """Each prompt of a file becomes a JSON line, in order, with the completion that the engine returns."""
  file = tmp_path / "prompts.txt"
  file.write_text("one\ntwo and more\n\n")
  done = main("generate", f"--checkpoint={checkpoint}", f"--prompts_file={file}", "--temperature=0", "--max_tokens=12",
              "--ignore_end")
  assert done.returncode == 0, done.stderr
  records = [json.loads(line) for line in done.stdout.splitlines()]
  expected = engine.generate(["one", "two and more", ""], dataclasses.replace(GREEDY, max_tokens=12))
  assert [record["prompt"] for record in records] == ["one", "two and more", ""]
  assert [record["tokens"] for record in records] == [completion.tokens for completion in expected]
  assert "tokens/s" in done.stderr


@pytest.mark.parametrize(("arguments", "words"), [
  (["--prompt=a"], ["--checkpoint"]), (["--checkpoint=/nowhere", "--prompt=a", "--top_p=2"], ["top_p=2", "at most 1"])])
def test_generate_refusals(main, arguments, words):
  done = main("generate", *arguments)
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
  assert last.startswith("error:") and all(word in last for word in words)

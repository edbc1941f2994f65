"""Half-lives of the memory: computed from the gate's bias, bounded in training, and capped at inference."""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import Config, MemoryConfig, ModelConfig, RetentionCap
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.models.cache import Cache
from atma_jax.models.definition import reconfigured
from atma_jax.models.memory import Memory
from atma_jax.models.retention_cap import capped_heads, half_life, with_retention_cap, zero_input_half_lives

TINY = ModelConfig(vocab_size=257, num_layers=6, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24,
                   block_pattern=("global", "local"), activation_dtype="float32")  # 3 groups; memories in 0, 2, 4
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 21)).astype(np.int32)


def memory_of(**changes) -> Memory:
  return Memory(dataclasses.replace(TINY, memory=MemoryConfig(**changes)), rngs=nnx.Rngs(0))


def random_model(config: ModelConfig = TINY, seed: int = 1) -> Atma:
  """A model in which no parameter is zero and gates depend on their input."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(seed)
  return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.3, p.dtype), params))


@nnx.jit
def hidden(model: Atma) -> jax.Array:
  return model.hidden(TOKENS)


@pytest.fixture(scope="module")
def model() -> Atma:
  model = random_model()
  model.groups.blocks[0].mixer.memory.gamma.bias[...] = jnp.asarray([[0.0, 4.0], [14.0, 1.0], [0.0, 2.0]])
  return model


def test_without_a_bound_gamma_is_the_published_sigmoid():
  z = jnp.linspace(-30, 30, 41)[:, None].repeat(2, 1)
  np.testing.assert_array_equal(memory_of().log_gamma(z), jax.nn.log_sigmoid(z + 3.9))


@pytest.mark.parametrize("bound", [0.5, 64.0, 1e6])
def test_bounded_half_life(bound):
  """Half-lives never exceed the bound and approach it; decay rates add; the gradient is that of the published form."""
  memory, published = memory_of(max_half_life=bound), memory_of()
  z = jnp.linspace(-12, 40, 105)[:, None].repeat(2, 1)
  bounded, free = half_life(memory.log_gamma(z)), half_life(published.log_gamma(z))
  assert np.all(bounded <= bound * (1 + 1e-6)) and np.all(np.diff(bounded[:, 0]) >= 0)
  np.testing.assert_allclose(1 / bounded, 1 / free + 1 / bound, rtol=1e-5)
  np.testing.assert_allclose(bounded[-1], bound, rtol=1e-5)
  slope = [jax.grad(lambda z, m=m: m.log_gamma(z).sum())(z) for m in (memory, published)]
  np.testing.assert_array_equal(*slope)
  assert np.all(np.asarray(slope[0]) > 0)  # nowhere flat, so nowhere stuck


def test_start_is_near_the_published_start():
  start = half_life(memory_of(max_half_life=2048.0).log_gamma(jnp.zeros(2)))
  np.testing.assert_allclose(half_life(memory_of().log_gamma(jnp.zeros(2))), 34.6, rtol=5e-3)
  np.testing.assert_allclose(start, 34.6, rtol=2.5e-2)


def test_bound_is_validated_and_off_for_older_configurations():
  for wrong in (0.0, -1.0, math.inf, math.nan):
    with pytest.raises(UserError, match=r"config\.model\.memory\.max_half_life"):
      Config(model=dataclasses.replace(TINY, memory=MemoryConfig(max_half_life=wrong))).validate()
  values = Config().to_dict()
  del values["model"]["memory"]["max_half_life"]
  assert Config.from_dict(values).model.memory.max_half_life is None


def test_bounded_model_trains_every_gate():
  config = dataclasses.replace(TINY, num_layers=2, memory=MemoryConfig(max_half_life=8.0))
  graphdef, params = nnx.split(random_model(config), nnx.Param)
  gradient = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p).hidden(TOKENS) ** 2)))(params)
  gate = nnx.to_pure_dict(gradient)["groups"]["blocks"][0]["mixer"]["memory"]["gamma"]
  assert np.all(np.asarray(gate["bias"]) != 0) and np.all(np.isfinite(gate["kernel"]))


def test_zero_input_half_lives(model):
  found = zero_input_half_lives(model)
  biases = np.asarray([[0.0, 4.0], [14.0, 1.0], [0.0, 2.0]]) + 3.9
  expected = math.log(0.5) / np.log1p(-1 / (1 + np.exp(biases)))
  assert list(found) == [0, 2, 4]
  for layer, values in zip((0, 2, 4), expected):
    np.testing.assert_allclose(found[layer], values, rtol=1e-5)
  assert found[2][0] > 4e7  # no rounding of gamma to 1


@pytest.mark.parametrize(("heads", "chosen"), [
  ("all", [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1)]), ("worst", [(2, 0)]), ("4:1,0:0", [(4, 1), (0, 0)])])
def test_cap_bounds_the_chosen_heads_and_no_other(model, heads, chosen):
  cap = RetentionCap(16.0, heads)
  assert capped_heads(model, cap) == chosen
  before, after = zero_input_half_lives(model), zero_input_half_lives(with_retention_cap(model, cap))
  for layer, values in before.items():
    for head, value in enumerate(values):
      expected = min(value, 16.0) if (layer, head) in chosen else value
      np.testing.assert_allclose(after[layer][head], expected, rtol=1e-6)
  assert jax.tree.structure(nnx.state(model)) != jax.tree.structure(nnx.state(with_retention_cap(model, cap)))
  assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(
    nnx.state(with_retention_cap(with_retention_cap(model, cap), None)))


def test_another_window_keeps_the_cap(model):
  """`reconfigured` carries a cap over, sets one beside other changes, and takes one away."""
  cap = RetentionCap(16.0, "2:0")
  capped = with_retention_cap(model, cap)
  for changed in (reconfigured(capped, window=4), reconfigured(model, window=4, retention_cap=cap)):
    assert changed.config.window == 4
    jax.tree.map(np.testing.assert_array_equal, zero_input_half_lives(changed), zero_input_half_lives(capped))
  free = reconfigured(capped, window=4, retention_cap=None)
  jax.tree.map(np.testing.assert_array_equal, zero_input_half_lives(free), zero_input_half_lives(model))


def gates_by_hand(model: Atma, cap: RetentionCap) -> Atma:
  """A model in which the gates of the capped heads are constants, by their kernel and bias."""
  chosen = capped_heads(model, cap)
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
  gamma = model.groups.blocks[0].mixer.memory.gamma
  logit = -math.log(2 ** (1 / cap.tokens) - 1) - 3.9  # sigmoid(logit + 3.9) = 2^(-1 / tokens)
  for layer, head in chosen:
    gamma.kernel[...] = gamma.kernel[...].at[layer // 2, :, head].set(0)
    gamma.bias[...] = gamma.bias[...].at[layer // 2, head].set(logit)
  return model


@pytest.mark.parametrize("scan", [True, False])
def test_capped_model_is_the_model_with_those_gates(scan):
  """A cap far below every half-life of its heads turns their gates into constants, whether layers are scanned or inlined."""
  model = random_model(dataclasses.replace(TINY, scan=scan, num_layers=4))
  cap = RetentionCap(0.05, "2:1,0:0")
  expected = hidden(gates_by_hand(model, cap))
  np.testing.assert_allclose(hidden(with_retention_cap(model, cap)), expected, rtol=1e-4, atol=1e-4)
  assert not np.allclose(hidden(model), expected, atol=1e-2)


def test_decoding_obeys():
  """Prefill and single steps equal the full pass with a bound on all heads and a cap on some; 5 layers give groups and a tail."""
  config = dataclasses.replace(TINY, num_layers=5, memory=MemoryConfig(max_half_life=4.0))
  model = with_retention_cap(random_model(config), RetentionCap(1.0, "0:0,2:1,4:1"))
  full = hidden(model)
  extend = nnx.jit(lambda model, tokens, cache: model.extend(tokens, cache))
  cache, parts = Cache.create(config, 2, 32), []
  for piece in (TOKENS[:, :19], TOKENS[:, 19:20], TOKENS[:, 20:]):
    out, cache = extend(model, piece, cache)
    parts.append(out)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_generation_obeys(model):
  """The engine continues a prompt as the full pass of the capped model does, and not as that of the model without a cap."""
  capped = with_retention_cap(model, RetentionCap(0.05))
  prompt = [int(token) for token in TOKENS[0, :16]]
  engine = Engine(capped, ByteTokenizer(), rows=1, capacity=32, chunk=16, decode_steps=2)
  tokens = list(engine.generate([prompt], [Sampling(max_tokens=3, temperature=0.0)])[0].tokens)
  logits = nnx.jit(lambda model, tokens: model(tokens))
  expected, free = (np.argmax(logits(m, np.asarray([prompt + tokens]))[0, 15:-1], -1).tolist() for m in (capped, model))
  assert tokens == expected != free


def test_no_cap_costs_nothing(model):
  """The program of a model without a cap, or whose cap was taken away, computes no minimum over the gates."""

  def program(model):
    graphdef, state = nnx.split(model)
    return str(jax.make_jaxpr(lambda s: nnx.merge(graphdef, s).hidden(TOKENS))(state))

  plain, capped = program(model), program(with_retention_cap(model, RetentionCap(16.0)))
  assert plain == program(with_retention_cap(with_retention_cap(model, RetentionCap(16.0)), None))
  assert capped.count(" min ") == plain.count(" min ") + 1


@pytest.mark.parametrize(("tokens", "heads", "message"), [
  (0.0, "all", "--retention_cap=0.0"), (math.nan, "all", "--retention_cap=nan"), (8.0, "best", "--retention_heads=best"),
  (8.0, "1", "--retention_heads=1"), (8.0, "0:0:1", "LAYER:HEAD"), (8.0, "", "LAYER:HEAD"),
  (8.0, "1:0", "no memory head 1:0; layers with a memory: 0, 2, 4; heads: 0 to 1"), (8.0, "0:2", "no memory head 0:2"),
  (8.0, "0:-1", "no memory head 0:-1")])
def test_wrong_caps(model, tokens, heads, message):
  with pytest.raises(UserError, match=message):
    with_retention_cap(model, RetentionCap(tokens, heads))


def test_a_model_without_memory_has_nothing_to_cap():
  model = nnx.eval_shape(lambda: Atma(dataclasses.replace(TINY, memory=MemoryConfig(enabled=False)), rngs=nnx.Rngs(0)))
  with pytest.raises(UserError, match="no memory"):
    with_retention_cap(model, RetentionCap(8.0))

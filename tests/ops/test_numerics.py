"""One suite for all implementations of polar attention and the gated delta, kernels in interpret mode, against the oracles.

Values, every gradient, odd lengths, windows, groups, head sizes, bfloat16, extremes, bitwise repeat; `test_golden` has the
same implementations against the golden files.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import gated_delta, polar_attention
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.gated_delta import pallas_gpu as delta_gpu
from atma_jax.ops.gated_delta import pallas_tpu as delta_tpu
from atma_jax.ops.gated_delta.api import repeat_heads
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.gpu import pallas_gpu
from atma_jax.ops.polar_attention.tpu import pallas_tpu

SMALL = {"gpu": Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)), "tpu": Tiles(*(Tile(256, 128),) * 3)}
POLAR = {
  "xla": functools.partial(polar_attention, implementation="xla"),
  "pallas_gpu": functools.partial(pallas_gpu.polar_attention, tiles=SMALL["gpu"], interpret=True),
  "pallas_tpu": functools.partial(pallas_tpu.polar_attention, tiles=SMALL["tpu"], interpret=True),
  "reference": functools.partial(polar_attention, implementation="reference"),
}
DELTA = {
  "xla": functools.partial(gated_delta, implementation="xla"),
  "pallas_gpu": functools.partial(delta_gpu.gated_delta, interpret=True),
  "pallas_tpu": functools.partial(delta_tpu.gated_delta, interpret=True),
  "reference": functools.partial(gated_delta, implementation="reference"),
}
every_polar = pytest.mark.parametrize("implementation", [name for name in POLAR if name != "reference"])
every_delta = pytest.mark.parametrize("implementation", [name for name in DELTA if name != "reference"])


def polar_inputs(T, S, H, K, D, dtype=jnp.float32, scale=1.0):
  rng = np.random.default_rng(T + S + D)
  q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, T, H, D), (2, S, K, D), (2, S, K, D)))
  raw = {"v_null": rng.normal(size=(H, D))}
  raw |= {name: rng.normal(size=H) for name in ("null_base", "null_slope", "len_gain", "mag_beta")}
  return q * scale, k, v, {name: jnp.asarray(x, jnp.float32) for name, x in raw.items()}


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("null_length", "count_length"))
def polar_run(implementation, window, q, k, v, raw, **lengths):
  """Outputs and gradients under fixed cotangents."""
  call = functools.partial(POLAR[implementation], window=window, **lengths)
  (direction, magnitude), vjp = jax.vjp(lambda q, k, v, raw: call(q, k, v, **raw), q, k, v, raw)
  rng = np.random.default_rng(9)
  cotangents = (jnp.asarray(rng.normal(size=direction.shape), direction.dtype),
                jnp.asarray(rng.normal(size=magnitude.shape), magnitude.dtype))
  return (direction, magnitude), vjp(cotangents)


def delta_inputs(T, D, Dv, dtype=jnp.float32, H=2):
  rng = np.random.default_rng(T + D)
  q, k = (rng.normal(size=(1, T, H, D)) for _ in range(2))
  q, k = (jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), dtype) for x in (q, k))
  log_gamma = jax.nn.log_sigmoid(jnp.asarray(rng.normal(size=(1, T, H)) + 2, jnp.float32))
  beta = jax.nn.sigmoid(jnp.asarray(rng.normal(size=(1, T, H)), jnp.float32))
  return (q, k, jnp.asarray(rng.normal(size=(1, T, H, Dv)), dtype), log_gamma, beta,
          jnp.asarray(rng.normal(size=(1, H, Dv, D)), jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def delta_run(implementation, *inputs):
  """Outputs and gradients under fixed cotangents."""
  def call(q, k, v, log_gamma, beta, state):
    return DELTA[implementation](q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state)

  outputs, vjp = jax.vjp(call, *inputs)
  rng = np.random.default_rng(9)
  return outputs, vjp(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in outputs))


def assert_near(actual, expected, tolerance):
  """Every array within `tolerance` of the expected one, relative to its norm (or to 1 where that is larger)."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1), path


def wide(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.cache
def polar_case(T, S, H, K, D, window):
  """Inputs of a case and what the oracle makes of them."""
  inputs = polar_inputs(T, S, H, K, D)
  return inputs, polar_run("reference", window, *inputs)


@every_polar
@pytest.mark.parametrize("T, S, H, K, D, window", [
  (40, 40, 4, 2, 64, 100), (37, 53, 2, 2, 64, 9), (33, 33, 2, 1, 64, 1), (1, 1, 2, 1, 64, None), (1, 40, 2, 1, 64, None),
  (140, 170, 2, 1, 128, 70)])
def test_polar_equals_oracle(implementation, T, S, H, K, D, window):
  inputs, expected = polar_case(T, S, H, K, D, window)
  assert_near(polar_run(implementation, window, *inputs), expected, 1e-4)


@pytest.mark.parametrize("window, lengths", [
  (None, {"null_length": 33}), (50, {"null_length": 33}), (None, {"count_length": 33}),
  (50, {"count_length": 33, "null_length": 40})])
@every_polar
def test_counts_that_stop_equal_oracle_and_change_nothing_before(implementation, window, lengths):
  inputs = polar_inputs(67, 80, 4, 2, 64)
  expected = polar_run("reference", window, *inputs, **lengths)
  assert_near(polar_run(implementation, window, *inputs, **lengths), expected, 1e-4)
  direction, magnitude = expected[0]
  plain = polar_run("reference", window, *inputs)[0]
  seen_before = 80 - 67 + jnp.arange(67) < 33  # as many keys as are counted
  for stopped, growing in zip((direction, magnitude), plain):
    # With count_length the same numbers by another program: logits of up to 16 round at 1e-6, and do so a few times.
    np.testing.assert_allclose(stopped[:, seen_before], growing[:, seen_before], rtol=0,
                               atol=4e-6 if "count_length" in lengths else 0)
    assert not np.allclose(stopped[:, ~seen_before], growing[:, ~seen_before], atol=1e-3)
  if "count_length" in lengths:  # to the last bit beside the same program with an end that is never reached
    for stopped, growing in zip((direction, magnitude), polar_run("reference", window, *inputs, count_length=80)[0]):
      np.testing.assert_array_equal(stopped[:, seen_before], growing[:, seen_before])


def test_null_logit_is_that_of_null_length_keys_at_the_temperature_of_all():
  numbers = functools.partial(formula.per_query, *scalars(), queries=1, window=None, count_length=None)
  temp, null, _ = numbers(keys=500, null_length=20)
  temp_20, null_20, _ = numbers(keys=20, null_length=None)
  np.testing.assert_allclose(null, temp * null_20 / temp_20, rtol=1e-6)
  np.testing.assert_array_equal(temp, numbers(keys=500, null_length=None).temp)


@pytest.mark.parametrize("keys", [20, 21, 5000])
def test_past_count_length_null_keeps_its_share_and_magnitude_its_range(keys):
  """Against n keys that match nothing, of logit 0, as against 20; and of n keys found, what 20 found come to."""
  numbers = functools.partial(formula.per_query, *scalars(), queries=1, window=None, null_length=None, count_length=20)
  few, many = numbers(keys=20), numbers(keys=keys)
  np.testing.assert_allclose(many.null - np.log(keys), few.null - np.log(20), rtol=1e-6)
  np.testing.assert_allclose(formula.magnitude(float(keys), 1.0, many.rate), formula.magnitude(20.0, 1.0, few.rate), rtol=1e-6)
  plain = formula.per_query(*scalars(), queries=1, window=None, null_length=None, count_length=None, keys=keys)
  np.testing.assert_array_equal(many.temp, plain.temp)


def scalars():
  """null_base, null_slope, len_gain and mag_beta of one head."""
  return [jnp.asarray([x], jnp.float32) for x in (0.7, -0.3, 0.4, -0.6)]


@pytest.mark.parametrize("name", ["null_length", "count_length"])
def test_counts_must_be_positive(name):
  q, k, v, raw = polar_inputs(4, 4, 2, 1, 64)
  with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
    polar_attention(q, k, v, **raw, **{name: 0})


@every_polar
def test_polar_in_bfloat16_is_within_its_rounding(implementation):
  inputs = polar_inputs(64, 64, 2, 1, 128, jnp.bfloat16)
  outputs, gradients = polar_run(implementation, None, *inputs)
  assert outputs[0].dtype == gradients[0].dtype == jnp.bfloat16 and outputs[1].dtype == jnp.float32
  # Scores reach 4 * temp: each rounding of 2^-9 of a product's operand moves a weight by that times the score.
  assert_near((outputs, gradients), polar_run("reference", None, *wide(inputs)), 2e-2)


def test_polar_in_float32_is_exact_from_three_products_of_tf32_parts(monkeypatch):
  """As a GPU multiplies float32: parts are off by 2^-21, which moves a weight by that times a score of up to 20."""
  def tf32(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x1000)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFE000), jnp.float32)

  def three_products(a, b, contract=(1, 0), dot=pallas_gpu.dot):
    high, low = (tf32(a), tf32(b)), (tf32(a - tf32(a)), tf32(b - tf32(b)))
    return dot(low[0], high[1], contract) + dot(high[0], low[1], contract) + dot(*high, contract)

  monkeypatch.setattr(pallas_gpu, "dot", three_products)
  inputs, expected = polar_case(37, 53, 2, 2, 64, 9)
  assert_near(polar_run.__wrapped__("pallas_gpu", 9, *inputs), expected, 1e-5)


@pytest.mark.parametrize("implementation", list(POLAR))
def test_polar_at_extreme_logits_is_finite_and_repeats_bitwise(implementation):
  inputs = polar_inputs(40, 40, 2, 1, 64, scale=1e4)
  first, second = (polar_run(implementation, None, *inputs) for _ in range(2))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert np.isfinite(a).all() and (a == b).all()


@every_polar
def test_polar_holds_no_matrix_of_scores_and_no_repeated_keys(implementation):
  inputs = polar_inputs(1024, 1024, 4, 1, 64)
  equations = list(_equations(jax.make_jaxpr(lambda *x: polar_run(implementation, None, *x))(*inputs).jaxpr))
  B, T, H, D = inputs[0].shape
  assert max(np.prod(v.aval.shape) for eqn in equations for v in eqn.outvars) < B * H * T * T
  kernels = [eqn for eqn in equations if eqn.primitive.name == "pallas_call"]
  assert len(kernels) == (3 if implementation.startswith("pallas") else 0)
  assert all([np.prod(v.aval.shape) for v in eqn.invars].count(B * T * D) == 2 for eqn in kernels)


@pytest.mark.parametrize("T, S, window", [(96, 96, None), (67, 80, 20)])
def test_polar_on_gpu_leaves_whole_arrays_to_its_kernels(T, S, window):
  """Nothing around the kernels goes over q, k, v, their gradients or the output, whatever the length."""
  q, k, v, raw = polar_inputs(T, S, 4, 2, 64)

  def run(q, k, v, raw, g):
    return jax.vjp(lambda *x: POLAR["pallas_gpu"](*x[:3], window=window, **x[3]), q, k, v, raw)[1](g)

  cotangents = q, jnp.ones(q.shape[:3])
  equations = [e for e in _equations(jax.make_jaxpr(run)(q, k, v, raw, cotangents).jaxpr) if not _encloses(e)]
  kernels = [e for e in equations if e.primitive.name == "pallas_call"]
  assert len(kernels) == 3
  # The largest left are v_null's gradients of blocks of 16 queries.
  assert max(np.prod(x.aval.shape) for e in equations if e not in kernels for x in (*e.invars, *e.outvars)) < q.size / 8


@pytest.mark.parametrize("batch, heads, blocks, group", [(8, 8, 16, 16), (1, 8, 256, 1), (2, 3, 1, 6), (1, 7, 64, 7)])
def test_a_grid_visits_every_block_once_and_few_heads_at_a_time(batch, heads, blocks, group):
  grid = pallas_gpu.Grid(batch, heads, blocks, descending=True)
  assert grid.shape == (group, blocks, batch * heads // group)
  spec = grid.spec((None, None, 1), lambda b, h, i: (b, h, i))
  places = [tuple(map(int, spec.index_map(x, y, z))) for z in range(grid.shape[2]) for y in range(blocks) for x in range(group)]
  assert sorted(places) == [(b, h, i) for b in range(batch) for h in range(heads) for i in range(blocks)]
  assert {i for _, _, i in places[:group]} == {blocks - 1}


def _encloses(eqn):
  """Whether an equation only names its argument, or is a call, whose equations `_equations` yields as well."""
  encloses = any(hasattr(getattr(x, "jaxpr", x), "eqns") for x in eqn.params.values())
  return eqn.primitive.name == "name" or (encloses and eqn.primitive.name != "pallas_call")


def _equations(jaxpr):
  """Equations outside kernels, those of nested jaxprs included."""
  for eqn in jaxpr.eqns:
    yield eqn
    if eqn.primitive.name != "pallas_call":
      for parameter in eqn.params.values():
        inner = getattr(parameter, "jaxpr", parameter)
        if hasattr(inner, "eqns"):
          yield from _equations(inner)


@functools.cache
def delta_case(T, D, Dv):
  """Inputs of a case and what the oracle makes of them."""
  inputs = delta_inputs(T, D, Dv)
  return inputs, delta_run("reference", *inputs)


@every_delta
@pytest.mark.parametrize("T, D, Dv", [(150, 64, 128), (1, 128, 64)])
def test_delta_equals_oracle(implementation, T, D, Dv):
  inputs, expected = delta_case(T, D, Dv)
  assert_near(delta_run(implementation, *inputs), expected, 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_gpu"])
def test_delta_of_shared_keys_and_values_is_that_of_repeated_ones(implementation):
  q, k, v, *rest = delta_inputs(70, 64, 64, H=4)
  k, v = k[:, :, :2], v[:, :, :2]
  outputs, (dq, dk, dv, *others) = delta_run(implementation, q, repeat_heads(k, 4), repeat_heads(v, 4), *rest)
  dk, dv = (jnp.sum(x.reshape(*k.shape[:3], 2, -1), axis=3) for x in (dk, dv))
  assert_near(delta_run(implementation, q, k, v, *rest), (outputs, (dq, dk, dv, *others)), 1e-6)


@every_delta
def test_delta_in_bfloat16_is_within_its_rounding_and_repeats_bitwise(implementation):
  inputs = delta_inputs(130, 128, 128, jnp.bfloat16, H=1)
  first, second = (delta_run(implementation, *inputs) for _ in range(2))
  assert_near(first, delta_run("reference", *wide(inputs)), 2e-2)
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@every_delta
def test_delta_with_repeated_keys_is_as_stable_as_substitution(implementation):
  q, k, v, log_gamma, beta, state = delta_inputs(64, 64, 64)
  k = jnp.broadcast_to(k[:, :1], k.shape)
  inputs = q, k, v, jnp.zeros_like(log_gamma), jnp.ones_like(beta), state
  assert_near(delta_run(implementation, *inputs), delta_run("reference", *inputs), 2e-5)


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("arguments", [(16, 16, 2, 1, 32), (16, 16, 2, 1, 64, jnp.float16)])
def test_unsupported_calls_are_refused(name, arguments):
  *arrays, raw = polar_inputs(*arguments)
  with pytest.raises(NotImplementedError, match="takes"):
    polar_attention(*arrays, **raw, implementation=name)


@pytest.mark.parametrize("name, needs", [("pallas_gpu", "needs a GPU"), ("pallas_tpu", "needs a TPU")])
def test_without_their_device_the_kernels_are_refused(name, needs):
  q, k, v, raw = polar_inputs(16, 16, 2, 1, 64)
  with pytest.raises(NotImplementedError, match=needs):
    polar_attention(q, k, v, **raw, implementation=name)
  q, k, v, log_gamma, beta, _ = delta_inputs(16, 64, 64)
  with pytest.raises(NotImplementedError, match=needs):
    gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, implementation=name)

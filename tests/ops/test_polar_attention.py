"""One suite for all implementations of polar attention, kernels in interpret mode, against the oracle.

Values, every gradient, odd lengths, windows, groups, head sizes, bfloat16, extremes, bitwise repetition; `test_golden` compares
the same implementations with the golden files.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import polar_attention
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.polar_attention import formula, reference, xla
from atma_jax.ops.polar_attention.gpu import gpu_grid, pallas_gpu
from atma_jax.ops.polar_attention.spec import SCALARS, AttentionSpec, PolarParams
from atma_jax.ops.polar_attention.tpu import pallas_tpu

SMALL = {"gpu": Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)), "tpu": Tiles(*(Tile(256, 128),) * 3)}
POLAR = {
  "xla": xla.attend,
  "pallas_gpu": functools.partial(pallas_gpu.attend, tiles=SMALL["gpu"], interpret=True),
  "pallas_tpu": functools.partial(pallas_tpu.attend, tiles=SMALL["tpu"], interpret=True),
  "reference": reference.attend,
}
every = pytest.mark.parametrize("implementation", [name for name in POLAR if name != "reference"])


def polar_inputs(T, S, H, K, D, dtype=jnp.float32, scale=1.0):
  rng = np.random.default_rng(T + S + D)
  q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, T, H, D), (2, S, K, D), (2, S, K, D)))
  raw = {"v_null": rng.normal(size=(H, D))} | {scalar.name: rng.normal(size=H) for scalar in SCALARS}
  return q * scale, k, v, PolarParams(**{name: jnp.asarray(x, jnp.float32) for name, x in raw.items()})


@functools.partial(jax.jit, static_argnums=(0, 1))
def polar_run(implementation, spec, *inputs):
  """Outputs and gradients under fixed cotangents."""
  (direction, magnitude), vjp = jax.vjp(lambda *inputs: POLAR[implementation](*inputs, spec), *inputs)
  rng = np.random.default_rng(9)
  cotangents = (jnp.asarray(rng.normal(size=direction.shape), direction.dtype),
                jnp.asarray(rng.normal(size=magnitude.shape), magnitude.dtype))
  return (direction, magnitude), vjp(cotangents)


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
  return inputs, polar_run("reference", AttentionSpec(window), *inputs)


@every
@pytest.mark.parametrize("T, S, H, K, D, window", [
  (40, 40, 4, 2, 64, 100), (37, 53, 2, 2, 64, 9), (33, 33, 2, 1, 64, 1), (1, 1, 2, 1, 64, None), (1, 40, 2, 1, 64, None),
  (140, 170, 2, 1, 128, 70)])
def test_polar_equals_oracle(implementation, T, S, H, K, D, window):
  inputs, expected = polar_case(T, S, H, K, D, window)
  assert_near(polar_run(implementation, AttentionSpec(window), *inputs), expected, 1e-4)


@pytest.mark.parametrize("spec", [
  AttentionSpec(null_length=33), AttentionSpec(50, null_length=33), AttentionSpec(count_length=33),
  AttentionSpec(50, count_length=33, null_length=40)], ids=str)
@every
def test_counts_that_stop_equal_oracle_and_change_nothing_before(implementation, spec):
  inputs = polar_inputs(67, 80, 4, 2, 64)
  expected = polar_run("reference", spec, *inputs)
  assert_near(polar_run(implementation, spec, *inputs), expected, 1e-4)
  direction, magnitude = expected[0]
  plain = polar_run("reference", AttentionSpec(spec.window), *inputs)[0]
  seen_before = 80 - 67 + jnp.arange(67) < 33  # as many keys as are counted
  for stopped, growing in zip((direction, magnitude), plain):
    # With count_length the same numbers by another program: logits of up to 16 round at 1e-6, and do so a few times.
    np.testing.assert_allclose(stopped[:, seen_before], growing[:, seen_before], rtol=0,
                               atol=4e-6 if spec.count_length else 0)
    assert not np.allclose(stopped[:, ~seen_before], growing[:, ~seen_before], atol=1e-3)
  if spec.count_length:  # to the last bit beside the same program with an end that is never reached
    for stopped, growing in zip((direction, magnitude), polar_run("reference", AttentionSpec(spec.window, None, 80), *inputs)[0]):
      np.testing.assert_array_equal(stopped[:, seen_before], growing[:, seen_before])


def test_null_logit_is_that_of_null_length_keys_at_the_temperature_of_all():
  temp, null, _ = last_query(500, null_length=20)
  temp_20, null_20, _ = last_query(20)
  np.testing.assert_allclose(null, temp * null_20 / temp_20, rtol=1e-6)
  np.testing.assert_array_equal(temp, last_query(500).temp)


@pytest.mark.parametrize("keys", [20, 21, 5000])
def test_past_count_length_null_keeps_its_share_and_magnitude_its_range(keys):
  """Against n keys that match nothing, of logit 0, as against 20; and of n keys found, what 20 found come to."""
  few, many = last_query(20, count_length=20), last_query(keys, count_length=20)
  np.testing.assert_allclose(many.null - np.log(keys), few.null - np.log(20), rtol=1e-6)
  np.testing.assert_allclose(formula.magnitude(float(keys), 1.0, many.curve), formula.magnitude(20.0, 1.0, few.curve), rtol=1e-6)
  np.testing.assert_array_equal(many.temp, last_query(keys).temp)


def last_query(keys, **lengths):
  """What one head makes of how many keys the last query of `keys` sees."""
  raw = {"null_base": 0.7, "null_slope": -0.3, "len_gain": 0.4, "mag_beta": -0.6}
  params = dataclasses.replace(PolarParams.initial(1, 4), **{name: jnp.asarray([x], jnp.float32) for name, x in raw.items()})
  return formula.of_positions(params, formula.last_positions(1, keys), AttentionSpec(**lengths))


@pytest.mark.parametrize("name", ["window", "null_length", "count_length"])
def test_counts_must_be_positive(name):
  q, k, v, params = polar_inputs(4, 4, 2, 1, 64)
  with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
    polar_attention(q, k, v, **vars(params), **{name: 0})


@every
def test_polar_in_bfloat16_is_within_its_rounding(implementation):
  inputs = polar_inputs(64, 64, 2, 1, 128, jnp.bfloat16)
  outputs, gradients = polar_run(implementation, AttentionSpec(), *inputs)
  assert outputs[0].dtype == gradients[0].dtype == jnp.bfloat16 and outputs[1].dtype == jnp.float32
  # Scores reach 4 * temp: each rounding of 2^-9 of a product's operand moves a weight by that times the score.
  assert_near((outputs, gradients), polar_run("reference", AttentionSpec(), *wide(inputs)), 2e-2)


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
  assert_near(polar_run.__wrapped__("pallas_gpu", AttentionSpec(9), *inputs), expected, 1e-5)


@pytest.mark.parametrize("implementation", list(POLAR))
def test_polar_at_extreme_logits_is_finite_and_repeats_bitwise(implementation):
  inputs = polar_inputs(40, 40, 2, 1, 64, scale=1e4)
  first, second = (polar_run(implementation, AttentionSpec(), *inputs) for _ in range(2))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert np.isfinite(a).all() and (a == b).all()


@every
def test_polar_holds_no_matrix_of_scores_and_no_repeated_keys(implementation):
  inputs = polar_inputs(1024, 1024, 4, 1, 64)
  equations = list(_equations(jax.make_jaxpr(lambda *x: polar_run(implementation, AttentionSpec(), *x))(*inputs).jaxpr))
  B, T, H, D = inputs[0].shape
  assert max(np.prod(v.aval.shape) for eqn in equations for v in eqn.outvars) < B * H * T * T
  kernels = [eqn for eqn in equations if eqn.primitive.name == "pallas_call"]
  assert len(kernels) == (3 if implementation.startswith("pallas") else 0)
  assert all([np.prod(v.aval.shape) for v in eqn.invars].count(B * T * D) == 2 for eqn in kernels)


@pytest.mark.parametrize("T, S, window", [(96, 96, None), (67, 80, 20)])
def test_polar_on_gpu_leaves_whole_arrays_to_its_kernels(T, S, window):
  """Nothing around the kernels goes over q, k, v, their gradients or the output, whatever the length."""
  q, *others = polar_inputs(T, S, 4, 2, 64)

  def run(g, *inputs):
    return jax.vjp(lambda *x: POLAR["pallas_gpu"](*x, AttentionSpec(window)), *inputs)[1](g)

  cotangents = q, jnp.ones(q.shape[:3])
  equations = [e for e in _equations(jax.make_jaxpr(run)(cotangents, q, *others).jaxpr) if not _encloses(e)]
  kernels = [e for e in equations if e.primitive.name == "pallas_call"]
  assert len(kernels) == 3
  # The largest left are v_null's gradients of blocks of 16 queries.
  assert max(np.prod(x.aval.shape) for e in equations if e not in kernels for x in (*e.invars, *e.outvars)) < q.size / 8


@pytest.mark.parametrize("batch, heads, blocks, group", [(8, 8, 16, 16), (1, 8, 256, 1), (2, 3, 1, 6), (1, 7, 64, 7)])
def test_a_grid_visits_every_block_once_and_few_heads_at_a_time(batch, heads, blocks, group):
  grid = gpu_grid.Grid(batch, heads, blocks, descending=True)
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


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("arguments", [(16, 16, 2, 1, 32), (16, 16, 2, 1, 64, jnp.float16)])
def test_unsupported_calls_are_refused(name, arguments):
  *arrays, params = polar_inputs(*arguments)
  with pytest.raises(NotImplementedError, match="takes"):
    polar_attention(*arrays, **vars(params), implementation=name)


@pytest.mark.parametrize("name, needs", [("pallas_gpu", "needs a GPU"), ("pallas_tpu", "needs a TPU")])
def test_without_their_device_the_kernels_are_refused(name, needs):
  q, k, v, params = polar_inputs(16, 16, 2, 1, 64)
  with pytest.raises(NotImplementedError, match=needs):
    polar_attention(q, k, v, **vars(params), implementation=name)


@pytest.mark.parametrize("window", [None, 11])
def test_block_size_does_not_matter(window):
  inputs = polar_inputs(50, 50, 4, 2, 8)
  whole, _ = xla.attend(*inputs, AttentionSpec(window))
  blocked, _ = xla.attend(*inputs, AttentionSpec(window), block_q=16, block_k=8)
  np.testing.assert_allclose(whole, blocked, atol=2e-6)


def test_parameters_start_and_travel_by_name():
  """Fields, starts and transforms are said once; the flat form, the pytree and the sharded heads are made of them."""
  params = PolarParams.initial(3, 4)
  assert [s.name for s in SCALARS] == [name for name in vars(params) if name != "v_null"]
  assert {s.name: float(getattr(params, s.name)[0]) for s in SCALARS} == {s.name: s.initial for s in SCALARS}
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  assert paths == [f".{name}" for name in vars(params)]

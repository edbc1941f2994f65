"""Rows that pack documents: in every implementation of every operation, each document comes out as a row of its own would.

The oracle runs each document by itself, without `starts`; all others run the whole rows with them. Kernels run in interpret mode.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import document_starts, gated_delta, gated_short_conv, polar_attention, short_conv, softmax_attention
from atma_jax.ops.core import visibility
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.gated_delta import pallas_gpu as delta_gpu
from atma_jax.ops.gated_delta import pallas_tpu as delta_tpu
from atma_jax.ops.polar_attention import reference, xla
from atma_jax.ops.polar_attention.gpu import pallas_gpu
from atma_jax.ops.polar_attention.spec import SCALARS, AttentionSpec, PolarParams
from atma_jax.ops.polar_attention.tpu import pallas_tpu
from atma_jax.ops.short_conv import pallas_gpu as conv_gpu

T = 75  # no multiple of any block; chunks of 64 steps
# A document of one token, boundaries at 0 and T - 1, neighbours on either side of a chunk's end; and few, long documents.
ROWS = ((0, 20, 21, 40, 63, 64, T - 1), (50,))
POLAR = {
  "reference": reference.attend,
  "xla": functools.partial(xla.attend, block_q=16, block_k=24),
  "pallas_gpu": functools.partial(pallas_gpu.attend, interpret=True,
                                  tiles=Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))),
  "pallas_tpu": functools.partial(pallas_tpu.attend, interpret=True, tiles=Tiles(*(Tile(128, 128),) * 3)),
}
DELTA = {
  "reference": functools.partial(gated_delta, implementation="reference"),
  "xla": functools.partial(gated_delta, implementation="xla"),
  "pallas_gpu": functools.partial(delta_gpu.gated_delta, interpret=True),
  "pallas_tpu": functools.partial(delta_tpu.gated_delta, interpret=True),
}


def tokens() -> np.ndarray:
  """Rows in which documents start at `ROWS` with token 0."""
  rows = np.ones((len(ROWS), T), np.int32)
  for row, starts in zip(rows, ROWS, strict=True):
    row[list(starts)] = 0
  return rows


STARTS = document_starts(jnp.asarray(tokens()), 0)


def documents():
  """(row, first, one past the last) of every document."""
  for row, starts in enumerate(ROWS):
    edges = sorted({0, *starts, T})
    yield from ((row, first, end) for first, end in itertools.pairwise(edges))


def separately(op, *arrays):
  """The results (B, T, ...) of a causal `op` for each document as a row of its own; every array is (B, T, ...).

  All rows are filled up behind the document to T tokens, so that they are one batch.
  """
  found = list(documents())
  row, at = np.zeros((len(found), T), int), np.zeros((len(found), T), int)
  own, place = np.zeros((len(ROWS), T), int), np.zeros((len(ROWS), T), int)
  for number, (r, first, end) in enumerate(found):
    row[number], at[number] = r, np.minimum(first + np.arange(T), T - 1)
    own[r, first:end], place[r, first:end] = number, np.arange(end - first)
  return jax.tree.map(lambda y: y[own, place], op(*(x[row, at] for x in arrays)))


def run(op, *inputs):
  """Outputs and gradients under fixed cotangents."""
  @jax.jit
  def both(*inputs):
    outputs, vjp = jax.vjp(op, *inputs)
    rng = np.random.default_rng(9)
    return outputs, vjp(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), outputs))

  return both(*inputs)


def assert_near(actual, expected, tolerance):
  """Every array within `tolerance` of the expected one, relative to its norm (or to 1 where that is larger)."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1), path


def test_starts_and_ends():
  starts, ends = np.zeros((2, T), int), np.zeros((2, T), int)
  for row, first, end in documents():
    starts[row, first:end], ends[row, first:end] = first, end - 1
  np.testing.assert_array_equal(STARTS, starts)
  np.testing.assert_array_equal(visibility.document_ends(STARTS), ends)


def polar_inputs(dtype=jnp.float32, H=4, K=2, D=64):
  rng = np.random.default_rng(D)
  q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, D)), dtype) for heads in (H, K, K))
  raw = {"v_null": rng.normal(size=(H, D))} | {scalar.name: rng.normal(size=H) for scalar in SCALARS}
  return q, k, v, PolarParams(**{name: jnp.asarray(x, jnp.float32) for name, x in raw.items()})


@functools.cache
def polar_case(spec):
  def op(q, k, v, params):
    return separately(lambda *arrays: reference.attend(*arrays, params, spec), q, k, v)

  return run(op, *polar_inputs())


@pytest.mark.parametrize("implementation, window", [("reference", 9), ("xla", None), ("pallas_gpu", 9), ("pallas_tpu", 9),
                                                    pytest.param("pallas_gpu", None, marks=pytest.mark.slow)])
def test_polar_attention(implementation, window):
  spec = AttentionSpec(window, null_length=5, count_length=7)

  def op(*inputs):
    return POLAR[implementation](*inputs, spec, starts=STARTS)

  assert_near(run(op, *polar_inputs()), polar_case(spec), 1e-4)  # as in test_polar_attention


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_bfloat16(implementation):
  """Within rounding of the oracle at the rounded inputs."""
  inputs = polar_inputs(jnp.bfloat16)
  wide = (*(x.astype(jnp.float32) for x in inputs[:3]), inputs[3])
  found, expected = (jax.jit(lambda *inputs, op=op: op(*inputs, AttentionSpec(), starts=STARTS))(*arrays)
                     for op, arrays in ((POLAR[implementation], inputs), (reference.attend, wide)))
  assert_near(found, expected, 2e-2)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window", [9])
def test_softmax_attention(implementation, window):
  q, k, v, _ = polar_inputs(D=8)
  call = functools.partial(softmax_attention, scale=0.3, window=window, implementation=implementation)
  expected = run(lambda *arrays: separately(functools.partial(call, implementation="reference"), *arrays), q, k, v)
  assert_near(run(functools.partial(call, starts=STARTS), q, k, v), expected, 2e-5)


def delta_inputs(D=64):
  rng = np.random.default_rng(D)
  q, k = (rng.normal(size=(2, T, 2, D)) for _ in range(2))
  q, k = (jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32) for x in (q, k))
  v, gates = jnp.asarray(rng.normal(size=(2, T, 2, D)), jnp.float32), jnp.asarray(rng.normal(size=(2, 2, T, 2)), jnp.float32)
  return q, k, v, jax.nn.log_sigmoid(gates[0] + 2), jax.nn.sigmoid(gates[1])


@functools.cache
def delta_case():
  def alone(q, k, v, log_gamma, beta):
    return gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, implementation="reference")[0]

  return run(functools.partial(separately, alone), *delta_inputs())


@pytest.mark.parametrize("implementation", DELTA)
def test_gated_delta(implementation):
  state = jnp.ones((2, 2, 64, 64)) if implementation != "reference" else None  # no document has a part of it

  def op(q, k, v, log_gamma, beta):
    initial = {"initial_state": jnp.zeros((2, 2, 64, 64)) if state is None else state}
    return DELTA[implementation](q, k, v, log_gamma=log_gamma, beta=beta, **initial, starts=STARTS)[0]

  assert_near(run(op, *delta_inputs()), delta_case(), 2e-5)  # as in test_gated_delta


@pytest.mark.parametrize("implementation", DELTA)
def test_a_document_that_began_before_goes_on_from_the_state(implementation):
  """And the last state is that of the last document."""
  q, k, v, log_gamma, beta = (x[1:] for x in delta_inputs())
  state = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 64, 64)), jnp.float32)
  first, last = (
    gated_delta(q[:, part], k[:, part], v[:, part], log_gamma=log_gamma[:, part], beta=beta[:, part], initial_state=before,
                implementation="reference") for part, before in ((slice(0, 50), state), (slice(50, None), None)))
  starts = jnp.where(STARTS[1:] == 0, -3, STARTS[1:])
  readout, final = jax.jit(lambda *inputs: DELTA[implementation](
    *inputs, log_gamma=log_gamma, beta=beta, initial_state=state, starts=starts))(q, k, v)
  assert_near((readout, final), (jnp.concatenate([first[0], last[0]], axis=1), last[1]), 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
def test_short_convolutions(monkeypatch, implementation):
  taps = 4
  monkeypatch.setattr(conv_gpu, "STEPS", {"forward": 8, "backward": 8})
  rng = np.random.default_rng(taps)
  gate, output_gate, x = (jnp.asarray(rng.normal(size=(2, T, 64)), jnp.float32) for _ in range(3))
  weight, bias = (jnp.asarray(rng.normal(size=(n, 64)), jnp.float32) for n in (taps, 3))
  gated = {"xla": functools.partial(gated_short_conv, implementation="xla"),
           "pallas_gpu": functools.partial(conv_gpu.gated_short_conv, interpret=True)}[implementation]

  def expected(gate, output_gate, x, weight, bias):
    product = (gate + bias[0]) * (x + bias[2])
    return (output_gate + bias[1]) * separately(lambda z: short_conv(z, weight), product)

  def op(gate, output_gate, x, weight, bias):
    return gated((gate, output_gate, x), weight, bias, starts=STARTS)

  inputs = gate, output_gate, x, weight, bias
  assert_near(run(op, *inputs), run(expected, *inputs), 2e-6)


def test_starts_that_do_not_fit_are_refused():
  q, k, v, params = polar_inputs(D=8)
  with pytest.raises(ValueError, match=r"polar_attention: starts int32 \(2, 74\) must be integers \(B, T\) = \(2, 75\)"):
    polar_attention(q, k, v, **vars(params), starts=STARTS[:, 1:])
  with pytest.raises(ValueError, match="as many keys as queries and not 75"):
    polar_attention(q[:, 1:], k, v, **vars(params), starts=STARTS[:, 1:])
  with pytest.raises(ValueError, match="softmax_attention: starts float32"):
    softmax_attention(q, k, v, scale=1.0, starts=STARTS.astype(jnp.float32))

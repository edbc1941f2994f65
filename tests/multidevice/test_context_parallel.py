"""A sequence split over devices: the ops equal the unsplit ones, forward and in every gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax import ops
from atma_jax.ops import context_parallel
from atma_jax.ops.context_parallel import delta, ring_attention
from atma_jax.ops.core import dispatch
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.gated_delta import pallas_gpu as delta_gpu
from atma_jax.ops.gated_delta import pallas_tpu as delta_tpu
from atma_jax.ops.polar_attention.api import attend
from atma_jax.ops.polar_attention.gpu import ring_gpu
from atma_jax.ops.polar_attention.spec import SCALARS, AttentionSpec, PolarParams
from atma_jax.ops.polar_attention.tpu import ring_tpu
from atma_jax.sharding import make_mesh

INTERPRETED = {
  "pallas_gpu": functools.partial(ring_gpu.RingSteps, tiles=Tiles(Tile(32, 16), Tile(32, 32), Tile(16, 32)), interpret=True),
  "pallas_tpu": functools.partial(ring_tpu.RingSteps, tiles=Tiles(Tile(256, 128), Tile(128, 256), Tile(128, 128)),
                                  interpret=True),
}
P = jax.sharding.PartitionSpec
TIME = P(None, "context")


def split(function, n, *specs, out=TIME):
  """`function` of arrays split on axis 1 (or as `specs` say) over n devices, inside a scan and a checkpoint, as models run it."""
  mesh = make_mesh(data=1, context=n, devices=jax.devices()[:n])

  def call(*args):
    mapped = jax.shard_map(functools.partial(function, axis="context"), mesh=mesh, in_specs=specs, out_specs=out,
                           check_vma=False)
    body = jax.checkpoint(lambda carry, _: (carry, mapped(*args)))
    return jax.tree.map(lambda x: x[0], jax.lax.scan(body, 0.0, None, length=1)[1])

  return call


def assert_equal_split(whole, parts, args, tolerance):
  """Outputs and gradients of one random functional of them, within `tolerance` of the largest entry."""
  weights = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(jax.tree.leaves(jax.eval_shape(whole, *args)))]

  def both(function):
    def scalar(*args):
      outputs = jax.tree.leaves(function(*args))
      return sum(jnp.sum(w * x) for w, x in zip(weights, outputs, strict=True)), outputs
    with jax.default_matmul_precision("highest"):
      return jax.jit(jax.grad(scalar, argnums=tuple(range(len(args))), has_aux=True))(*args)

  for expected, got in zip(jax.tree.leaves(both(whole)), jax.tree.leaves(both(parts)), strict=True):
    expected, got = np.asarray(expected), np.asarray(got)
    np.testing.assert_allclose(got, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


def attention_inputs(T, H, K, D=8, B=2):
  rng = np.random.default_rng(T)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, D)), jnp.float32) for heads in (H, K, K))
  raw = {"v_null": rng.normal(size=(H, D))} | {scalar.name: rng.normal(size=H) for scalar in SCALARS}
  return q, k, v, PolarParams(**{name: jnp.asarray(x, jnp.float32) for name, x in raw.items()})


# Gradients sum over at most 64 queries, 64 keys and 8 channels, each term rounded at 2^-24: 64 sqrt(8) 2^-24 = 1e-5 of the
# largest; positional parameters sum over twice that many.
CASES = [  # devices, T, query heads, key heads, window
  (2, 12, 4, 2, None),  # pieces of three
  (4, 8, 2, 1, None),  # pieces of one
  (8, 48, 4, 4, None),
  (4, 56, 4, 2, 37),  # more than half of the sequence: zigzag, with pieces of 7
  (8, 40, 2, 2, 13),  # over three pieces
  (4, 20, 2, 1, 1),
]


@pytest.mark.parametrize(("n", "T", "H", "K", "window"), CASES)
def test_polar_attention(n, T, H, K, window):
  spec = AttentionSpec(window, null_length=T // 3, count_length=T // 2)
  assert_equal_split(
    functools.partial(attend, spec=spec, implementation="reference"),
    split(functools.partial(context_parallel.polar_attention, spec=spec), n, TIME, TIME, TIME, P()),
    attention_inputs(T, H, K), 2e-5)


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels run in interpret mode."""
  def put(op, name, kernel):
    class Entry(dispatch.Implementation):
      function = property(lambda self: kernel)

    monkeypatch.setitem(op.implementations, name, Entry("", platforms=()))

  for name, steps in INTERPRETED.items():
    put(ring_attention.ATTENTION, name, steps)
  for name, kernels in (("pallas_gpu", delta_gpu), ("pallas_tpu", delta_tpu)):
    put(delta.MEMORY, name, functools.partial(kernels.gated_delta, interpret=True))
    put(delta.TRANSITION, name, functools.partial(kernels.transition, interpret=True))


@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize(("n", "T", "H", "K", "window"), [
  (2, 600, 2, 1, None),  # zigzag, pieces of 150: two blocks on a TPU, five on a GPU
  (4, 56, 4, 2, 37),  # zigzag, pieces of 7
  (4, 600, 2, 2, 160),  # consecutive pieces of 150, three hops
  (2, 540, 2, 2, 200),  # of 270: three blocks of queries on a TPU
])
def test_polar_attention_kernels(interpreted, implementation, n, T, H, K, window):
  spec = AttentionSpec(window)
  ring = functools.partial(context_parallel.polar_attention, spec=spec, implementation=implementation)
  assert_equal_split(
    functools.partial(attend, spec=spec, implementation="reference"), split(ring, n, TIME, TIME, TIME, P()),
    attention_inputs(T, H, K, D=64, B=1), 2e-5)


@pytest.mark.parametrize(("implementation", "D"), [("xla", 8), *((name, 64) for name in INTERPRETED)])
def test_softmax_attention(interpreted, implementation, D):
  n, T, H, K, window = CASES[0]

  ring = functools.partial(context_parallel.softmax_attention, scale=0.3, spec=AttentionSpec(window),
                           implementation=implementation)
  assert_equal_split(
    functools.partial(ops.softmax_attention, scale=0.3, window=window, implementation="reference"),
    split(ring, n, TIME, TIME, TIME),
    attention_inputs(T, H, K, D)[:3], 2e-5)


@pytest.mark.parametrize(("implementation", "n", "T", "D", "Dv"), [
  ("xla", 2, 70, 6, 5), ("xla", 8, 8, 6, 5), ("pallas_gpu", 4, 300, 64, 128), ("pallas_tpu", 4, 600, 64, 128)])
def test_gated_delta(interpreted, implementation, n, T, D, Dv):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, T, 2, d)), jnp.float32) for d in (D, D, Dv))
  q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  log_gamma = jax.nn.log_sigmoid(jnp.asarray(rng.normal(size=(1, T, 2)) + 3, jnp.float32))
  beta = jax.nn.sigmoid(jnp.asarray(rng.normal(size=(1, T, 2)), jnp.float32))

  def whole(q, k, v, log_gamma, beta):
    return ops.gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, implementation="reference")

  def parts(q, k, v, log_gamma, beta, axis):
    return context_parallel.gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, axis=axis, implementation=implementation)

  assert_equal_split(whole, split(parts, n, *[TIME] * 5, out=(TIME, P())), (q, k, v, log_gamma, beta), 2e-5)


@pytest.mark.parametrize(("n", "T", "taps"), [(2, 8, 3), (8, 8, 4), (2, 6, 1)])
def test_short_conv(n, T, taps):
  x, weight = jax.random.normal(jax.random.key(0), (2, T, 6)), jax.random.normal(jax.random.key(1), (taps, 6))
  assert_equal_split(ops.short_conv, split(context_parallel.short_conv, n, TIME, P()), (x, weight), 1e-6)


def test_zigzag_deals_out_early_and_late_pieces():
  n, x = 4, jnp.arange(16)[None]
  dealt = split(context_parallel.zigzag, n, TIME)(x)
  expected = np.arange(16).reshape(8, 2)[[0, 7, 1, 6, 2, 5, 3, 4]]
  np.testing.assert_array_equal(dealt[0].reshape(8, 2), expected)
  np.testing.assert_array_equal(split(context_parallel.unzigzag, n, TIME)(dealt), x)


def test_an_odd_piece_is_refused_with_the_numbers():
  with pytest.raises(ValueError, match=r"sequence of 12 .* multiple of 8"):
    split(lambda x, axis: context_parallel.softmax_attention(x, x, x, scale=1.0, spec=AttentionSpec(), axis=axis), 4,
          TIME)(jnp.ones((1, 12, 1, 4)))

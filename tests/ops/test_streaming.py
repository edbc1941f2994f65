"""Laws of the streamed ops: block and chunk sizes, merging, windows, no stored logits. `test_numerics` has the oracles."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import cross_entropy, gated_delta, soft_cap, softmax_attention, token_losses
from atma_jax.ops.core import streaming
from atma_jax.ops.cross_entropy import pallas_gpu as cross_entropy_pallas_gpu
from atma_jax.ops.cross_entropy.api import log_partition, logit_gradients
from atma_jax.ops.gated_delta import xla as chunked
from atma_jax.ops.polar_attention import xla


def inputs(T=37, S=None, H=4, K=2, D=8, B=2, scale=1.0, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  S = T if S is None else S
  q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, D)))
  raw = {"v_null": rng.normal(size=(H, D))} | {n: rng.normal(size=H) for n in ("null_base", "null_slope", "len_gain", "mag_beta")}
  return (q * scale, k * scale, v), {n: jnp.asarray(x, jnp.float32) for n, x in raw.items()}


@pytest.mark.parametrize("window", [None, 11])
def test_block_size_does_not_matter(window):
  (q, k, v), raw = inputs(50)
  whole, _ = xla.polar_attention(q, k, v, **raw, window=window)
  blocked, _ = xla.polar_attention(q, k, v, **raw, window=window, block_q=16, block_k=8)
  np.testing.assert_allclose(whole, blocked, atol=2e-6)


def test_merging_disjoint_keys_is_exact():
  (q, k, v), _ = inputs(1, 40)
  scale = jnp.full((1, 4), 0.3)
  whole = streaming.attention_statistics(q, k, v, scale)
  parts = [streaming.attention_statistics(q, k[:, s], v[:, s], scale) for s in (slice(0, 13), slice(13, 40))]
  for merged in (streaming.merge(*parts), streaming.merge(*parts[::-1])):
    for a, b in zip(whole, merged, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_softmax_equals_the_formula():
  (q, k, v), _ = inputs(21, 30)
  for window in (None, 6):
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)) * 0.2
    distance = jnp.arange(9, 30)[:, None] - jnp.arange(30)
    visible = (distance >= 0) & (distance < (window or 30))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1)
    expected = jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 2, 2))
    np.testing.assert_allclose(softmax_attention(q, k, v, scale=0.2, window=window), expected, atol=2e-6)


def delta_inputs(T, B=2, H=2, D=8):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, T, H, D)) for _ in range(3))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  k[:, 1::3] = k[:, :1]  # repeated keys are the hard case of the triangular solve
  gates = {"log_gamma": np.log(rng.uniform(0.8, 1, (B, T, H))), "beta": rng.uniform(0, 1, (B, T, H))}
  return [jnp.asarray(x, jnp.float32) for x in (q, k, v)], {n: jnp.asarray(x, jnp.float32) for n, x in gates.items()}


@pytest.mark.parametrize("T", [1, 8, 65, 130])
def test_chunked_equals_stepwise(T):
  arrays, gates = delta_inputs(T)
  for a, b in zip(gated_delta(*arrays, **gates, implementation="reference"),
                  gated_delta(*arrays, **gates, implementation="xla"), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunk_size_and_split_sequence():
  arrays, gates = delta_inputs(70)
  zero = jnp.zeros((2, 2, 8, 8))
  whole, final = chunked.gated_delta(*arrays, **gates, initial_state=zero)
  small, _ = chunked.gated_delta(*arrays, **gates, initial_state=zero, chunk=16)
  np.testing.assert_allclose(whole, small, atol=1e-5)
  head = [x[:, :29] for x in arrays], {n: x[:, :29] for n, x in gates.items()}
  tail = [x[:, 29:] for x in arrays], {n: x[:, 29:] for n, x in gates.items()}
  first, state = gated_delta(*head[0], **head[1])
  second, state = gated_delta(*tail[0], **tail[1], initial_state=state)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)
  np.testing.assert_allclose(state, final, atol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_cross_entropy_equals_the_formula(z_loss, chunk):
  rng = np.random.default_rng(0)
  hidden, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 19, 6), (6, 11), (11,)))
  targets, weights = jnp.asarray(rng.integers(0, 11, (2, 19))), jnp.asarray(rng.uniform(size=(2, 19)), jnp.float32)

  def naive(hidden, kernel, bias):
    z = hidden @ kernel + bias
    logits = 5 * z / jnp.sqrt(z * z + 25)
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return 3 * jnp.sum(weights * (nll + z_loss * lse**2))

  def ours(*args):
    return 3 * cross_entropy(*args, targets, weights, cap=5.0, z_loss=z_loss, chunk=chunk)[0]

  a, b = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(hidden, kernel, bias) for f in (naive, ours))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  losses = token_losses(hidden, kernel, bias, targets, cap=5.0, chunk=chunk)
  np.testing.assert_allclose(3 * jnp.sum(weights * losses), ours(hidden, kernel, bias) if not z_loss else naive(
    hidden, kernel, bias) - 3 * z_loss * cross_entropy(hidden, kernel, bias, targets, weights, cap=5.0, z_loss=0.0,
                                                       chunk=chunk)[1], rtol=1e-5)


@pytest.mark.parametrize("B, T, V, z_loss", [(2, 70, 384, 0.1), (1, 1, 128, 0.0), (3, 128, 128, 0.0)])
def test_logit_gradients_of_the_kernel_are_those_of_the_formula(B, T, V, z_loss):
  rng = np.random.default_rng(T)
  head, bias = 8 * rng.normal(size=(B, T, V)), rng.normal(size=V)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  weights = rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) > 0.2)

  def run(function, dtype, narrow):
    z = jnp.asarray(head + bias, dtype)
    log_partition = jax.nn.logsumexp(soft_cap(z, 15.0), axis=-1)
    return jax.jit(functools.partial(function, cap=15.0, z_loss=z_loss, dtype=narrow))(
      jnp.asarray(head, dtype), jnp.asarray(bias, dtype), log_partition, targets, jnp.asarray(weights, dtype))

  with jax.enable_x64(True):
    expected = [np.asarray(x) for x in run(logit_gradients, jnp.float64, jnp.float64)]
  kernel = functools.partial(cross_entropy_pallas_gpu.logit_gradients, interpret=True)
  for narrow, unit in ((jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-8)):
    dz, dbias = run(kernel, jnp.float32, narrow)
    again, _ = run(kernel, jnp.float32, narrow)
    assert dz.dtype == narrow and dbias.dtype == jnp.float32 and bool(jnp.all(dz == again))
    # An exponent of up to 30, rounded at 2^-24, moves p by 2^-20 of itself; the bias's gradient sums before the rounding.
    largest = np.abs(expected[0]).max()
    np.testing.assert_allclose(np.asarray(dz, np.float64), expected[0], rtol=0, atol=(unit + 2.0**-19) * largest)
    np.testing.assert_allclose(dbias, expected[1], rtol=0, atol=2.0**-19 * np.abs(expected[0]).sum((0, 1)).max())


@pytest.mark.parametrize("B, T, V, cap", [(2, 7, 384, 15.0), (1, 1, 128, 30.0), (3, 5, 640, 2.0)])
def test_log_partition_of_the_kernel_is_that_of_the_formula(monkeypatch, B, T, V, cap):
  monkeypatch.setattr(cross_entropy_pallas_gpu, "SUMMED_PIECES", 2)
  rng = np.random.default_rng(T)
  head, bias = 8 * rng.normal(size=(B, T, V)), rng.normal(size=V)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  with jax.enable_x64(True):
    expected = [np.asarray(x) for x in log_partition(jnp.asarray(head), jnp.asarray(bias), targets, cap)]
  kernel = functools.partial(cross_entropy_pallas_gpu.log_partition, cap=cap, interpret=True)
  first, second = (jax.jit(kernel)(jnp.asarray(head, jnp.float32), jnp.asarray(bias, jnp.float32), targets) for _ in range(2))
  for a, b, c in zip(first, expected, second, strict=True):
    assert a.dtype == jnp.float32 and bool(jnp.all(a == c))
    np.testing.assert_allclose(a, b, rtol=0, atol=2 * cap * 2.0**-22)  # exponents of up to twice the cap, rounded a few times
  monkeypatch.setattr(cross_entropy_pallas_gpu.kernels, "elsewhere", lambda device: None)
  refusal = functools.partial(cross_entropy_pallas_gpu.sums_exponentials, jnp.asarray(head, jnp.float32), jnp.zeros(V), targets)
  assert refusal(cap) is None and "capped" in refusal(50.0)


def test_full_logits_never_exist():
  B, T, C, V = 2, 96, 4, 131
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, T, C), (C, V), (V,))]
  targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
  call = jax.grad(lambda *a: cross_entropy(*a, targets, weights, cap=5.0, z_loss=0.0, chunk=16)[0], argnums=(0, 1, 2))
  text = jax.jit(call).lower(*shapes).as_text()
  assert "2x16x131xf32" in text and "2x96x131" not in text

"""Cross-entropy against its formula, its kernels in interpret mode included, and the memory it must not take."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import cross_entropy, soft_cap, token_losses, token_predictions
from atma_jax.ops.cross_entropy import pallas_gpu as cross_entropy_pallas_gpu
from atma_jax.ops.cross_entropy.xla import log_partition, logit_gradients


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
  monkeypatch.setattr(cross_entropy_pallas_gpu, "SUMMED_BLOCKS", 2)
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
  monkeypatch.setattr(cross_entropy_pallas_gpu.kernels, "device_refusal", lambda device: None)
  arguments = jnp.asarray(head, jnp.float32), jnp.zeros(V), targets
  refusal = functools.partial(cross_entropy_pallas_gpu.supports_log_partition, *arguments)
  assert refusal(cap) is None and "capped" in refusal(50.0)


def test_full_logits_never_exist():
  B, T, C, V = 2, 96, 4, 131
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, T, C), (C, V), (V,))]
  targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
  call = jax.grad(lambda *a: cross_entropy(*a, targets, weights, cap=5.0, z_loss=0.0, chunk=16)[0], argnums=(0, 1, 2))
  text = jax.jit(call).lower(*shapes).as_text()
  assert "2x16x131xf32" in text and "2x96x131" not in text


@pytest.mark.parametrize("T, shards, chunk", [(22, 2, 5), (12, 4, 8)])
def test_time_shards_change_no_result(T, shards, chunk):
  rng = np.random.default_rng(T)
  hidden, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, T, 6), (6, 11), (11,)))
  targets = jnp.asarray(rng.integers(0, 11, (2, T)))
  whole, split = (token_losses(hidden, kernel, bias, targets, cap=5.0, chunk=chunk, time_shards=n) for n in (1, shards))
  np.testing.assert_allclose(split, whole, rtol=1e-6)
  whole, split = (token_predictions(hidden, kernel, bias, cap=5.0, chunk=chunk, time_shards=n) for n in (1, shards))
  np.testing.assert_array_equal(split, whole)


def test_the_choice():
  """An implementation named is obeyed or refused."""
  hidden, kernel, bias = jnp.ones((1, 4, 8)), jnp.ones((8, 128)), jnp.zeros(128)
  targets, weights = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4))
  call = functools.partial(cross_entropy, hidden, kernel, bias, targets, weights, cap=5.0, z_loss=0.0, chunk=4)
  for name in ("pallas_gpu", "pallas_tpu"):
    with pytest.raises(NotImplementedError, match=f"needs a {name[-3:].upper()}"):
      call(implementation=name)
    with pytest.raises(NotImplementedError, match=f"needs a {name[-3:].upper()}"):
      token_losses(hidden, kernel, bias, targets, cap=5.0, chunk=4, implementation=name)
  with pytest.raises(ValueError, match="cuda"):
    call(implementation="cuda")
  for name in ("reference", "xla"):
    np.testing.assert_array_equal(call(implementation=name)[0], call()[0])

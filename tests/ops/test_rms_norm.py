"""Residual sum and RMS norm: every implementation against the plain formula in float64, with all gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops.rms_norm import pallas_gpu as rms_norm_pallas_gpu
from atma_jax.ops.rms_norm import reference
from atma_jax.ops.rms_norm.api import OP, sum_and_norm

KERNELS = functools.partial(rms_norm_pallas_gpu.sum_and_norm, interpret=True)
IMPLEMENTATIONS = {"reference": reference.sum_and_norm, "pallas_gpu": KERNELS}
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
EPS = 1e-6


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
  monkeypatch.setattr(rms_norm_pallas_gpu, "ROWS", {"forward": 4, "backward": 8})


def inputs(B, T, C, count):
  """x and its terms, bias and weight, and the cotangents of the sum and the norm, in float64."""
  rng = np.random.default_rng(T)
  return [rng.normal(size=shape) for shape in ((B, T, C),) * (1 + count) + ((C,),) * 2 + ((B, T, C),) * 2]


def run(op, arguments, dtype):
  """Both results and all gradients; bias and weight are float32 or wider."""
  wide = jnp.promote_types(dtype, jnp.float32)
  *terms, bias, weight, ds, dnormed = (jnp.asarray(z, dtype if z.ndim == 3 else wide) for z in arguments)

  @jax.jit
  def both(terms, bias, weight, cotangents):
    results, transpose = jax.vjp(lambda x, *rest: op(x, rest[:-2], *rest[-2:], EPS), *terms, bias, weight)
    return *results, *transpose(cotangents)

  return both(terms, bias, weight, (ds, dnormed))


@every
@pytest.mark.parametrize("B, T, C, count", [(1, 1, 64, 1), (3, 7, 192, 1), (1, 9, 128, 0), (2, 11, 64, 3)])
def test_results_and_gradients_equal_the_formula(implementation, B, T, C, count):
  arguments = inputs(B, T, C, count)
  for dtype, tolerance in {jnp.float32: 16 * 2.0**-24, jnp.bfloat16: 4 * 2.0**-8}.items():
    narrow = [np.asarray(jnp.asarray(z, dtype), np.float64) if z.ndim == 3 else z for z in arguments]
    with jax.enable_x64(True):
      expected = [np.asarray(z) for z in run(reference.sum_and_norm, narrow, jnp.float64)]
    actual = run(IMPLEMENTATIONS[implementation], narrow, dtype)
    assert len(actual) == len(expected) == 5 + count
    for a, b in zip(actual, expected, strict=True):
      assert a.dtype == (dtype if b.ndim == 3 else jnp.float32)
      np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-30))


def test_the_kernels_repeat_bitwise():
  first, second = (run(KERNELS, inputs(2, 19, 64, 1), jnp.bfloat16) for _ in range(2))
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_large_and_small_rows_keep_their_norms():
  """The mean of squares is taken in float32, and eps matters only for rows near zero."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 64)) * [[[1e-12], [1.0], [1e12]]], jnp.bfloat16)
  ones, zeros = jnp.ones(64), jnp.zeros(64)
  for op in IMPLEMENTATIONS.values():
    _, normed = op(x, (), zeros, ones, EPS)
    rms = np.sqrt(np.mean(np.square(np.asarray(normed, np.float32)), axis=-1))[0]
    np.testing.assert_allclose(rms, [0, 1, 1], atol=2.0**-8)


def test_the_choice(monkeypatch):
  x, v = jnp.zeros((1, 4, 64)), jnp.zeros(64)
  with pytest.raises(NotImplementedError, match="needs a GPU"):
    sum_and_norm(x, [x], v, v, eps=EPS, implementation="pallas_gpu")
  with pytest.raises(ValueError, match=r"terms \[\(1, 2, 64\)\]"):
    sum_and_norm(x, [x[:, :2]], v, v, eps=EPS)
  assert OP.choose(x, (x,), v, v, EPS) == "xla"  # on a CPU
  with pytest.raises(NotImplementedError, match="needs a TPU"):
    sum_and_norm(x, [x], v, v, eps=EPS, implementation="pallas_tpu")
  monkeypatch.setattr(rms_norm_pallas_gpu.kernels, "device_refusal", lambda device: None)

  def refusal(C, dtype=jnp.bfloat16):
    z, vector = jax.ShapeDtypeStruct((1, 4, C), dtype), jax.ShapeDtypeStruct((C,), jnp.float32)
    return rms_norm_pallas_gpu.supports(z, (z,), vector, vector, EPS)

  assert all(refusal(C) is None for C in (64, 640, 768, 1024, 1280, 2048, 4096))
  assert all("power of two" in refusal(C) for C in (32, 40, 1088, 8192))
  assert "float16" in refusal(64, jnp.float16)

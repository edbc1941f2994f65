"""The MLP's gate: its gradients in every implementation, and the gated projection, against autodiff in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.models import parallel
from atma_jax.ops.squared_gate import pallas_gpu as squared_gate_pallas_gpu
from atma_jax.ops.squared_gate import reference
from atma_jax.ops.squared_gate.api import CHECKPOINT_NAME, GRADIENTS, squared_gate, squared_gate_gradients

KERNEL = functools.partial(squared_gate_pallas_gpu.squared_gate_gradients, interpret=True)
IMPLEMENTATIONS = {"reference": reference.squared_gate_gradients, "pallas_gpu": KERNEL}
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
  monkeypatch.setattr(squared_gate_pallas_gpu, "STEPS", 8)


@pytest.fixture
def on_gpu(monkeypatch):
  """Traces programs as for a GPU, with the kernel interpreted; returns the list of shapes that the kernel gets."""
  seen = []

  class Entry(type(GRADIENTS.implementations["pallas_gpu"])):
    function = property(lambda self: lambda u, *args: seen.append(u.shape) or KERNEL(u, *args))

  monkeypatch.setitem(GRADIENTS.implementations, "pallas_gpu", Entry("", platforms=("gpu",)))
  monkeypatch.setattr(parallel.dispatch, "platform", lambda: "gpu")
  return seen


def inputs(B, T, F):
  rng = np.random.default_rng(T)
  return [rng.normal(size=shape) for shape in ((B, T, F),) * 3 + ((F,),)]


def close(actual, expected, tolerance):
  expected = np.asarray(expected, np.float64)
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


@every
@pytest.mark.parametrize("B, T, F", [(1, 1, 64), (2, 13, 192), (1, 24, 64)])
def test_gradients_equal_the_derivative(implementation, B, T, F):
  u, g, dh, bias = inputs(B, T, F)
  u[0, 0, :3] = -bias[:3]  # relu's corner, where both gradients are zero
  for dtype, tolerance in {jnp.float32: 8 * 2.0**-24, jnp.bfloat16: 6 * 2.0**-8}.items():
    narrow = [np.asarray(jnp.asarray(z, dtype), np.float64) for z in (u, g, dh, bias)]
    with jax.enable_x64(True):
      h, transpose = jax.vjp(lambda u, g, bias: squared_gate(u + bias, g), narrow[0], narrow[1], narrow[3])
      du, dg, dbias = transpose(jnp.asarray(narrow[2]))
    gradients, sums = jax.jit(IMPLEMENTATIONS[implementation])(*(jnp.asarray(z, dtype) for z in (narrow[0], h, *narrow[2:])))
    assert gradients.dtype == dtype and sums.dtype == jnp.float32
    close(gradients, np.concatenate([du, dg], axis=-1), tolerance)
    close(jnp.sum(sums, axis=(0, 1)), np.stack([dbias, np.sum(np.asarray(dg), axis=(0, 1))]), tolerance)


def test_the_kernel_repeats_bitwise_and_sums_in_float32():
  u, h, dh, bias = (jnp.asarray(z, jnp.bfloat16) for z in inputs(2, 19, 64))
  first, second = KERNEL(u, h, dh, bias), KERNEL(u, h, dh, bias)
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
  assert first[1].shape == (2, 3, 2, 64)


@pytest.mark.parametrize("T, dtype", [(1, jnp.float32), (11, jnp.float32), (11, jnp.bfloat16)])
def test_the_gated_projection(on_gpu, T, dtype):
  """Result and gradients are those of two products and the gate; the backward pass keeps u and the result, but not g."""
  rng, B, C, F = np.random.default_rng(T), 2, 32, 64
  arrays = [rng.normal(size=shape) for shape in ((B, T, C), (C, 2 * F), (2 * F,), (B, T, F))]

  def plain(x, kernel, bias):
    return squared_gate(*jnp.split(x @ kernel + bias, 2, axis=-1))

  def run(function, cast, arrays):
    *arguments, dh = (z.astype(t) for z, t in zip(arrays, cast, strict=True))
    y, transpose = jax.vjp(function, *arguments)
    return y, *transpose(dh)

  x, kernel, bias, dh = (jnp.asarray(z, dtype) for z in arrays)
  with jax.enable_x64(True):
    expected = run(plain, (jnp.float64,) * 4, (x, kernel, bias, dh))
  actual = run(functools.partial(parallel.gated_projection, implementation="auto"), (dtype, dtype, jnp.float32, dtype),
               (x, kernel, bias, dh))
  assert on_gpu == [(B, T, F)]
  for a, b in zip(actual, expected, strict=True):  # products of 32 and 128 terms, u squared
    close(a, b, {jnp.float32: 64 * 2.0**-24, jnp.bfloat16: 8 * 2.0**-8}[dtype])
  kept = jax.tree.leaves(jax.vjp(jax.checkpoint(
    functools.partial(parallel.gated_projection, implementation="auto"),
    policy=jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                                                           jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME))),
    x, kernel, bias)[1])
  assert sorted(z.shape for z in kept if z.ndim == 3) == sorted([(B, T, C), (B, T, F), (B, T, F)])


def test_the_choice(monkeypatch):
  u, bias = jnp.zeros((1, 4, 64)), jnp.zeros(64)
  with pytest.raises(NotImplementedError, match="needs a GPU"):
    squared_gate_gradients(u, u, u, bias, implementation="pallas_gpu")
  with pytest.raises(ValueError, match=r"bias \(32,\)"):
    squared_gate_gradients(u, u, u, bias[:32])
  assert GRADIENTS.choose(u, u, u, bias) == "xla" and not parallel.concatenates_gradients("auto")  # on a CPU
  monkeypatch.setattr(squared_gate_pallas_gpu.kernels, "device_refusal", lambda device: None)
  supports = squared_gate_pallas_gpu.supports
  assert supports(u, u, u, bias) is None
  assert "float16" in supports(u.astype(jnp.float16), u, u, bias)
  assert "columns" in supports(u[..., :40], u[..., :40], u[..., :40], bias[:40])

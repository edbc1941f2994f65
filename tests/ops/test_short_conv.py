"""Short convolutions: the plain one against its formula, and the gated one, in every implementation, against the plain one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import gated_short_conv, short_conv
from atma_jax.ops.short_conv import pallas_gpu as short_conv_pallas_gpu
from atma_jax.ops.short_conv import xla as short_conv_xla

GATED = {
  "xla": short_conv_xla.gated_short_conv,
  "pallas_gpu": functools.partial(short_conv_pallas_gpu.gated_short_conv, interpret=True),
}
every = pytest.mark.parametrize("implementation", GATED)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
  monkeypatch.setattr(short_conv_pallas_gpu, "STEPS", {"forward": 8, "backward": 8})


def test_short_conv_is_the_shifted_sum():
  x = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
  np.testing.assert_allclose(short_conv(x, jnp.asarray([[100.0], [10.0], [1.0]]))[0, :, 0], [1, 12, 123, 234, 345])


def composed(gate, output_gate, x, weight, bias):
  """The gated convolution as it is defined."""
  return (output_gate + bias[1]) * short_conv((gate + bias[0]) * (x + bias[2]), weight)


def inputs(B, T, C, taps):
  """Gate, output gate, x, weight, bias and a cotangent, in float64."""
  rng = np.random.default_rng(T)
  return [rng.normal(size=s) for s in ((B, T, C),) * 3 + ((taps, C), (3, C), (B, T, C))]


def separate(op):
  """`op` with gate, output gate and x in three arrays."""
  return lambda gate, output_gate, x, *vectors: op((gate, output_gate, x), *vectors)


def concatenated(op):
  """`op` with gate, output gate and x in one array."""
  return lambda gate, output_gate, x, *vectors: op((jnp.concatenate([gate, output_gate, x], axis=-1),), *vectors)


def run(op, arguments, dtype):
  """The result and all gradients; weight and bias are float32 or wider, all else is in `dtype`."""
  wide = jnp.promote_types(dtype, jnp.float32)
  *arrays, cotangent = (jnp.asarray(z, dtype if z.ndim == 3 else wide) for z in arguments)

  @jax.jit
  def both(arrays, cotangent):
    y, transpose = jax.vjp(op, *arrays)
    return y, *transpose(cotangent)

  return both(arrays, cotangent)


@every
@pytest.mark.parametrize("B, T, C, taps, arranged", [
  (1, 1, 64, 3, separate), (3, 2, 64, 4, concatenated), (2, 13, 192, 3, separate), (2, 13, 192, 3, concatenated),
  (1, 24, 64, 4, separate), (1, 9, 64, 1, separate)])
def test_gated_short_conv_equals_its_definition(implementation, B, T, C, taps, arranged):
  arguments = inputs(B, T, C, taps)
  with jax.enable_x64(True):
    expected = [np.asarray(z) for z in run(composed, arguments, jnp.float64)]
  # Each term is rounded a few times; weight and bias sum up B T of them.
  tolerances = {jnp.float32: 8 * 2.0**-24, jnp.bfloat16: 6 * 2.0**-8}
  for dtype, tolerance in tolerances.items():
    actual = run(arranged(GATED[implementation]), arguments, dtype)
    for a, b in zip(actual, expected, strict=True):
      assert a.dtype == (dtype if b.ndim == 3 else jnp.float32)
      np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def test_the_kernels_repeat_bitwise():
  first, second = (run(separate(GATED["pallas_gpu"]), inputs(2, 19, 64, 3), jnp.bfloat16) for _ in range(2))
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_no_bias_is_a_bias_of_zero_and_nothing_after_a_step_reaches_it():
  gate, output_gate, x, weight, _, _ = (jnp.asarray(z, jnp.float32) for z in inputs(1, 17, 64, 3))
  for op in GATED.values():
    whole = op((gate, output_gate, x), weight)
    np.testing.assert_allclose(whole, composed(gate, output_gate, x, weight, jnp.zeros((3, 64))), atol=1e-5)
    np.testing.assert_array_equal(op([z[:, :10] for z in (gate, output_gate, x)], weight), whole[:, :10])


def test_the_choice(monkeypatch):
  gate, weight = jnp.zeros((1, 4, 64)), jnp.zeros((3, 64))
  with pytest.raises(NotImplementedError, match="needs a GPU"):
    gated_short_conv([gate] * 3, weight, implementation="pallas_gpu")
  with pytest.raises(NotImplementedError, match="needs a TPU"):
    gated_short_conv([gate] * 3, weight, implementation="pallas_tpu")
  np.testing.assert_array_equal(gated_short_conv([gate + 1] * 3, weight + 1, implementation="reference"),
                                gated_short_conv([gate + 1] * 3, weight + 1, implementation="xla"))
  with pytest.raises(ValueError, match=r"projected .*\(1, 4, 64\)"):
    gated_short_conv([gate] * 2, weight)
  with pytest.raises(ValueError, match=r"bias \(2, 64\)"):
    gated_short_conv([gate] * 3, weight, weight[:2])
  monkeypatch.setattr(short_conv_pallas_gpu.kernels, "device_refusal", lambda device: None)
  supports = short_conv_pallas_gpu.supports
  assert supports([gate] * 3, weight, None) is None
  assert "float16" in supports([gate.astype(jnp.float16)], weight, None)
  assert "channels" in supports([gate[..., :40]] * 3, weight[:, :40], None)

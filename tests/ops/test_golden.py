"""Every implementation of polar attention and gated delta against float64 golden numbers, forward and every gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import gated_delta, polar_attention, polar_statistics
from atma_jax.ops.core.tiles import Tile, Tiles
from atma_jax.ops.gated_delta import pallas_gpu as delta_gpu
from atma_jax.ops.gated_delta import pallas_tpu as delta_tpu
from atma_jax.ops.polar_attention.gpu import pallas_gpu
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams
from atma_jax.ops.polar_attention.tpu import pallas_tpu

IMPLEMENTATIONS = ["reference", "xla"]
POLAR_KERNELS = {  # interpreted, in blocks that make several of the files
  "pallas_gpu": functools.partial(pallas_gpu.attend, tiles=Tiles(*(Tile(16, 16),) * 3), interpret=True),
  "pallas_tpu": functools.partial(pallas_tpu.attend, tiles=Tiles(*(Tile(128, 128),) * 3), interpret=True),
}
DELTA_KERNELS = {"pallas_gpu": delta_gpu.gated_delta, "pallas_tpu": delta_tpu.gated_delta}
POLAR = ["causal", "gqa", "odd", "one", "sharp", "window"]
DELTA = ["basic", "odd", "long_horizon"]
POLAR_NAMES = ("q", "k", "v", "v_null", "null_base", "null_slope", "len_gain", "mag_beta")
DELTA_NAMES = ("q", "k", "v", "gamma", "beta", "state")


def forward_and_gradients(call, file, dtype, names, cotangents):
  def both(arguments, cotangents):
    out, vjp = jax.vjp(call, *arguments)
    return out, vjp(cotangents)

  arrays = [tuple(jnp.asarray(file[name], dtype) for name in group) for group in (names, cotangents)]
  return jax.jit(both)(*arrays)


def run_polar(file, dtype, implementation):
  window = None if file["window"] < 0 else int(file["window"])

  def call(*args):
    raw = dict(zip(POLAR_NAMES[3:], args[3:]))
    if implementation in POLAR_KERNELS:
      return POLAR_KERNELS[implementation](*args[:3], PolarParams(**raw), AttentionSpec(window))
    return polar_attention(*args[:3], **raw, window=window, implementation=implementation)

  return forward_and_gradients(call, file, dtype, POLAR_NAMES, ("cot_direction", "cot_magnitude"))


def run_delta(file, dtype, implementation):
  def call(q, k, v, gamma, beta, state):
    if implementation not in DELTA_KERNELS:
      return gated_delta(q, k, v, log_gamma=jnp.log(gamma), beta=beta, initial_state=state, implementation=implementation)
    D = q.shape[-1]  # the files' heads are smaller than those the kernels take; zeros add nothing to a state
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, 64 - D),)) for x in (q, k, v))
    state = jnp.pad(state, ((0, 0), (0, 0), (0, 64 - D), (0, 64 - D)))
    readout, state = DELTA_KERNELS[implementation](q, k, v, log_gamma=jnp.log(gamma), beta=beta, initial_state=state,
                                                   interpret=True)
    return readout[..., :D], state[..., :D, :D]

  return forward_and_gradients(call, file, dtype, DELTA_NAMES, ("cot_readout", "cot_state"))


def assert_near(actual, expected, tolerance):
  """Errors relative to the largest entry of each array (or to 1, if that is smaller)."""
  for value, wanted in zip(actual, expected, strict=True):
    error = np.abs(np.asarray(value) - wanted).max() / max(1.0, np.abs(wanted).max())
    assert error < tolerance, error


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *POLAR_KERNELS])
@pytest.mark.parametrize("case", POLAR)
def test_polar_float32(golden, case, implementation):
  file = golden(f"polar_{case}.npz")
  with jax.default_matmul_precision("highest"):
    out, gradients = run_polar(file, jnp.float32, implementation)
  # Sharp logits reach |score| * temp of hundreds: exp turns their rounding, 2^-24 * 300, into 2e-5 of each weight. Kernels
  # round twice, the temperature in base 2 and its product with the score. The length gain's gradient multiplies by the score
  # again.
  assert_near(out, (file["direction"], file["magnitude"]), 4e-5 if case == "sharp" else 1e-5)
  assert_near(gradients, [file[f"grad_{n}"] for n in POLAR_NAMES], 5e-3 if case == "sharp" else 2e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", POLAR)
def test_polar_float64(golden, case, implementation, x64):
  file = golden(f"polar_{case}.npz")
  out, gradients = run_polar(file, jnp.float64, implementation)
  tolerance = 1e-5 if case == "sharp" else 1e-12  # the sharp file was rounded where a weight underflows
  assert_near(out, (file["direction"], file["magnitude"]), tolerance)
  assert_near(gradients, [file[f"grad_{n}"] for n in POLAR_NAMES], tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_polar_statistics(golden, implementation):
  file = golden("polar_window.npz")
  arguments = {n: jnp.asarray(file[n], jnp.float32) for n in POLAR_NAMES}
  with jax.default_matmul_precision("highest"):
    stats = polar_statistics(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments,
                             window=int(file["window"]), implementation=implementation)
  np.testing.assert_allclose(stats["n_eff"], file["n_eff"], rtol=1e-4)
  np.testing.assert_allclose(stats["w_null"], file["w_null"], atol=1e-5)


@pytest.mark.parametrize("implementation, dtype, tolerance", [
  *[(name, "float32", 1e-5) for name in (*IMPLEMENTATIONS, *DELTA_KERNELS)],
  *[(name, "float64", 1e-12) for name in IMPLEMENTATIONS]])
@pytest.mark.parametrize("case", DELTA)
def test_gated_delta(golden, case, implementation, dtype, tolerance):
  file = golden(f"gated_delta_{case}.npz")
  with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
    out, gradients = run_delta(file, dtype, implementation)
    assert_near(out, (file["readout"], file["final_state"]), tolerance)
    assert_near(gradients, [file[f"grad_{n}"] for n in DELTA_NAMES], tolerance)

"""Training as on a GPU, where norms compute the sums of the residual stream and the MLP keeps its gated product.

The gradients are those of other platforms.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest

from atma_jax.config import AuxiliaryConfig, ModelConfig
from atma_jax.models import Atma, parallel
from atma_jax.ops.rms_norm import api as rms_norm
from atma_jax.ops.rms_norm import pallas_gpu as rms_norm_pallas_gpu
from atma_jax.ops.squared_gate import api as squared_gate
from atma_jax.ops.squared_gate import pallas_gpu as squared_gate_pallas_gpu
from atma_jax.training.objective import auxiliary_loss

# With heads and a vocabulary of these sizes, no other GPU kernel can serve.
CONFIG = ModelConfig(vocab_size=61, num_layers=3, block_pattern=("global", "local"), width=32, num_heads=4, num_kv_heads=2,
                     head_dim=8, mlp_width=32, activation_dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 11)).astype(np.int32)
OPTIONS = {"plain": AuxiliaryConfig(), "tapped": AuxiliaryConfig(regularizer="weak", regularizer_weight=0.5)}


def gradients(options, **changes):
  """Loss and gradients for parameters none of which is zero."""
  graphdef, params = nnx.split(Atma(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)), nnx.Param)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype), params)

  def loss(params):
    return auxiliary_loss(nnx.merge(graphdef, params), TOKENS, jax.random.key(0), OPTIONS[options], z_loss=0.0, chunk=16)[0]

  with jax.default_matmul_precision("highest"):
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))


@pytest.fixture
def on_gpu(monkeypatch):
  """Traces programs as for a GPU, with the two kernels in interpret mode; counts how often each kernel is traced."""
  used = collections.Counter()

  def interpret(op, kernel):
    def run(*args):
      used[op.name] += 1
      return kernel(*args, interpret=True)

    class Entry(type(op.implementations["pallas_gpu"])):
      function = property(lambda self: run)

    monkeypatch.setitem(op.implementations, "pallas_gpu", Entry("", platforms=("gpu",)))

  interpret(rms_norm.OP, rms_norm_pallas_gpu.sum_and_norm)
  interpret(squared_gate.GRADIENTS, squared_gate_pallas_gpu.squared_gate_gradients)
  monkeypatch.setattr(rms_norm_pallas_gpu, "ROWS", {"forward": 8, "backward": 8})
  monkeypatch.setattr(parallel.dispatch, "platform", lambda: "gpu")
  return used


@functools.cache
def expected(options):
  return gradients(options)


@pytest.mark.parametrize("options, remat, scan", [
  ("plain", "dots", False), pytest.param("plain", "block", True, marks=pytest.mark.slow),
  pytest.param("tapped", "none", True, marks=pytest.mark.slow)])
def test_gradients_are_those_of_other_platforms(request, options, remat, scan):
  want = expected(options)  # before the platform is patched
  used = request.getfixturevalue("on_gpu")
  for a, b in zip(gradients(options, remat=remat, scan=scan), want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.max(np.abs(b)))))
  assert used["squared_gate_gradients"] >= 3 and used["sum_and_norm"] >= 2 * 3


@pytest.mark.slow
def test_a_width_without_a_kernel_takes_the_formula(monkeypatch):
  """Dispatch decides so for both ops."""
  want = expected("plain")
  monkeypatch.setattr(parallel.dispatch, "platform", lambda: "gpu")
  for a, b in zip(gradients("plain", remat="dots", scan=False), want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.max(np.abs(b)))))

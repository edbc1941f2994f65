"""One suite for all implementations of softmax attention: against the formula, in blocks of any size, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import softmax_attention
from atma_jax.ops.softmax_attention import reference, xla


def inputs(T=21, S=30, H=4, K=2, D=8, B=2):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, D))]


@pytest.mark.parametrize("implementation", ["xla", "reference", "auto"])
@pytest.mark.parametrize("window", [None, 6])
def test_softmax_equals_the_formula(implementation, window):
  q, k, v = inputs()
  scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)) * 0.2
  distance = jnp.arange(9, 30)[:, None] - jnp.arange(30)
  visible = (distance >= 0) & (distance < (window or 30))
  weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1)
  expected = jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 2, 2))
  np.testing.assert_allclose(softmax_attention(q, k, v, scale=0.2, window=window, implementation=implementation), expected,
                             atol=2e-6)


@pytest.mark.parametrize("window", [None, 11])
def test_gradients_equal_the_oracle_in_blocks_of_any_size(window):
  arrays = inputs(37, 37)

  def gradients(op, **options):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(op(*x, scale=0.2, window=window, **options))), argnums=(0, 1, 2))(*arrays)

  expected = gradients(reference.softmax_attention)
  for blocks in ({}, {"block_q": 16, "block_k": 8}):
    for a, b in zip(gradients(xla.softmax_attention, **blocks), expected, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_a_kernel_it_does_not_have_is_refused(name):
  with pytest.raises(NotImplementedError, match=f"softmax_attention has no '{name}' implementation, only xla, reference"):
    softmax_attention(*inputs(), scale=0.2, implementation=name)


def test_a_window_must_be_positive():
  with pytest.raises(ValueError, match="window=0 must be at least 1"):
    softmax_attention(*inputs(), scale=0.2, window=0)

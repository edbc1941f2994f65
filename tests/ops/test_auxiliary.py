"""Regularisers against the golden float64 numbers; distractor losses against the formula with every score in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.ops import distractors, softmax_attention
from atma_jax.ops.distractors import polar_distractor_loss, softmax_distractor_loss
from atma_jax.ops.regularizers import KINDS, draw_sketch, regularizer


@pytest.mark.parametrize("kind", KINDS)
def test_regularizers_equal_golden(golden, x64, kind):
  """Value and gradient in float64; float32 to its rounding."""
  file = golden("regularizers.npz")
  sketch = file["sketch_cols"] if kind == "strong" else file["sketch_rows"].T
  value, gradient = jax.jit(jax.value_and_grad(regularizer, argnums=1), static_argnums=0)(kind, file["x"], sketch)
  np.testing.assert_allclose(value, file[kind], rtol=1e-12)
  np.testing.assert_allclose(gradient, file[f"grad_{kind}"], rtol=1e-9, atol=1e-12)
  single = regularizer(kind, jnp.asarray(file["x"], jnp.float32), jnp.asarray(sketch, jnp.float32))
  assert single.dtype == jnp.float32
  np.testing.assert_allclose(single, file[kind], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_regularizers_at_the_edges(kind):
  """One row, rows of zeros, and fewer channels than sketched directions: finite, gradients too."""
  value_and_grad = jax.jit(jax.value_and_grad(regularizer, argnums=1), static_argnums=0)
  for x, width in ((jnp.ones((1, 12)), 12), (jnp.zeros((2, 3, 12)), 12), (jax.random.normal(jax.random.key(0), (9, 5)), 5)):
    value, gradient = value_and_grad(kind, x, draw_sketch(jax.random.key(1), width, 8))
    assert np.isfinite(value) and np.isfinite(gradient).all() and gradient.shape == x.shape


def draw(T):
  rng = np.random.default_rng(T)
  shapes = [(2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8), (5, 2, 8), (5, 2, 8), (T, 4), (T, 4)]
  q, k, v, random_k, random_v, temperature, null = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
  return q, k, v, random_k, random_v, 1 + temperature**2, null


def repeated(x):
  return jnp.repeat(x, 2, axis=-2)


def plain_polar(q, keys, temperature, null):
  scores = temperature[..., None] * jnp.einsum("bthd,rhd->bthr", q, repeated(keys))
  logits = jnp.concatenate([scores, jnp.broadcast_to(null[None, ..., None], (*scores.shape[:-1], 1))], -1)
  return jnp.mean(1 - jax.nn.softmax(logits, -1)[..., -1])


def plain_softmax(q, k, v, keys, values, window):
  T = q.shape[1]
  distance = jnp.arange(T)[:, None] - jnp.arange(T)
  visible = (distance >= 0) & (distance < (window or T))
  real = jnp.where(visible, 0.3 * jnp.einsum("bthd,bshd->bhts", q, repeated(k)), -jnp.inf)
  random = 0.3 * jnp.einsum("bthd,rhd->bhtr", q, repeated(keys))
  weights = jax.nn.softmax(jnp.concatenate([random, real], -1), -1)
  R = keys.shape[0]
  both = jnp.einsum("bhtr,rhd->bthd", weights[..., :R], repeated(values))
  both += jnp.einsum("bhts,bshd->bthd", weights[..., R:], repeated(v))
  return jnp.mean((both - softmax_attention(q, k, v, scale=0.3, window=window, implementation="reference")) ** 2)


@pytest.mark.parametrize("T", [1, 11])
def test_polar_distractor_is_the_formula(x64, monkeypatch, T):
  """Several blocks and a remainder; gradients of queries, temperature and null; none of the random keys."""
  monkeypatch.setattr(distractors, "BLOCK", 4)
  q, _, _, keys, _, temperature, null = draw(T)
  (value, gradients), (expected, wanted) = jax.jit(lambda *arrays: tuple(
    jax.value_and_grad(f, argnums=(0, 1, 2, 3))(*arrays) for f in (polar_distractor_loss, plain_polar)))(
      q, keys, temperature, null)
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  assert not np.any(gradients[1])
  for index in (0, 2, 3):
    np.testing.assert_allclose(gradients[index], wanted[index], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("T, window", [(1, None), (11, None), (11, 3)])
def test_softmax_distractor_is_the_formula(x64, monkeypatch, T, window):
  """The change of the output, with its gradient through both outputs; none of random keys and values."""
  monkeypatch.setattr(distractors, "BLOCK", 4)
  q, k, v, keys, values, _, _ = draw(T)

  def loss(*arrays):
    return softmax_distractor_loss(*arrays, scale=0.3, window=window)

  def plain(*arrays):
    return plain_softmax(*arrays, window)

  (value, gradients), (expected, wanted) = jax.jit(lambda *arrays: tuple(
    jax.value_and_grad(f, argnums=(0, 1, 2, 3, 4))(*arrays) for f in (loss, plain)))(q, k, v, keys, values)
  np.testing.assert_allclose(value, expected, rtol=1e-11)
  for a, b in zip(gradients[:3], wanted[:3]):
    np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-13)
  assert not np.any(gradients[3]) and not np.any(gradients[4])


def test_distractors_keep_no_scores():
  """Neither direction holds an array of queries times keys, for all queries at once."""
  T, R = 4096, 1024
  q, k = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32), jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
  keys = jnp.zeros((R, 1, 8))

  def loss(q, k):
    return (softmax_distractor_loss(q, k, k, keys, keys, scale=1.0)
            + polar_distractor_loss(q, keys, jnp.ones((T, 2)), jnp.ones((T, 2))))

  memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(q, k).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 2 * T * R  # one such array of two heads, float32

"""Representation regularisers: how far a cloud of token vectors is from a wanted shape (ATMA, arXiv 2606.25156).

All act on a random sketch of the rows and reduce in float32 or wider:

=============  =====================================================================================================
``weak``       Frobenius distance of the sketch's covariance from the identity
``discrete``   the same after scaling every row to radius sqrt(C)
``strong``     distance of the characteristic function of each sketched direction from a Gaussian's (the Epps-Pulley
               statistic of LeJEPA, arXiv 2511.08544), on 17 knots in [-5, 5]
``zipfian``    off-diagonal of the Gram matrix of the directions, and distance of the sorted norms from a 1/rank law
=============  =====================================================================================================
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

KINDS = ("weak", "strong", "discrete", "zipfian")
KNOTS, KNOT_LIMIT = 17, 5.0
_EPS = 1e-6


def draw_sketch(key: jax.Array, width: int, size: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """A sketch for `regularizer`: independent standard normal, (width, size)."""
  return jax.random.normal(key, (width, size), dtype)


def regularizer(kind: str, x: jax.Array, sketch: jax.Array) -> jax.Array:
  """The value of a regulariser, a scalar in float32 or wider.

  Args:
    kind: one of `KINDS`.
    x: (..., C), every leading index a row.
    sketch: (C, size) standard normal; its scale is set here. Where C is at most `size` only ``strong`` projects.
  """
  x = x.reshape(-1, x.shape[-1]).astype(jnp.promote_types(jnp.float32, x.dtype))
  return {"weak": _weak, "strong": _strong, "discrete": _discrete, "zipfian": _zipfian}[kind](x, sketch.astype(x.dtype))


def _sketched(x: jax.Array, sketch: jax.Array) -> jax.Array:
  """Centred rows, (N, min(C, size))."""
  width, size = sketch.shape
  x = x @ sketch / width**0.5 if width > size else x
  return x - jnp.mean(x, axis=0, keepdims=True)


def _weak(x: jax.Array, sketch: jax.Array) -> jax.Array:
  z = _sketched(x, sketch)
  covariance = z.T @ z / (z.shape[0] - 1 + _EPS)
  return jnp.linalg.norm(covariance - jnp.eye(z.shape[1], dtype=z.dtype))


def _discrete(x: jax.Array, sketch: jax.Array) -> jax.Array:
  radius = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
  return _weak(x * (x.shape[-1] ** 0.5 / radius), sketch)


def _strong(x: jax.Array, sketch: jax.Array) -> jax.Array:
  """The integrand is even and vanishes at 0, so the positive knots are enough; one is in memory at a time."""
  directions = sketch / (jnp.linalg.norm(sketch, axis=0, keepdims=True) + _EPS)
  z = x @ directions
  step = 2 * KNOT_LIMIT / (KNOTS - 1)
  knots = step * jnp.arange(1, KNOTS // 2 + 1, dtype=x.dtype)
  weights = jnp.full_like(knots, 2 * step).at[-1].set(step)  # trapezoid, both signs

  @jax.checkpoint
  def add(total: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    knot, weight = inputs
    gaussian = jnp.exp(-0.5 * knot**2)
    real, imaginary = jnp.mean(jnp.cos(knot * z), axis=0), jnp.mean(jnp.sin(knot * z), axis=0)
    return total + weight * gaussian * ((real - gaussian) ** 2 + imaginary**2), None

  per_direction, _ = jax.lax.scan(add, jnp.zeros(z.shape[1], z.dtype), (knots, weights))
  return z.shape[0] * jnp.mean(per_direction)


def _zipfian(x: jax.Array, sketch: jax.Array) -> jax.Array:
  z = _sketched(x, sketch)
  count = z.shape[0]
  norms = jnp.sqrt(jnp.maximum(jnp.sum(z * z, axis=-1), _EPS**2))
  directions = z / norms[:, None]
  gram = directions.T @ directions / (count - 1 + _EPS)
  angle = _norm(gram - jnp.diag(jnp.diag(gram)))
  target = 1 / jnp.arange(1, count + 1, dtype=z.dtype)
  ranked = jnp.sort(norms, descending=True)
  return angle + _norm(ranked / (jnp.sum(ranked) + _EPS) - target / (jnp.sum(target) + _EPS))


def _norm(x: jax.Array) -> jax.Array:
  """Euclidean norm of all entries, with a zero gradient at zero."""
  square = jnp.sum(x * x)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

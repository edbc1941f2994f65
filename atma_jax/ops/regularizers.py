"""Representation regularisers: how far the distribution of token vectors is from a wanted one (ATMA, arXiv 2606.25156).

Each is computed from a random projection of the token vectors, the sketch, and reduced in float32 or wider:

=============  ==========================================================================================================
``weak``       Frobenius distance of the sketch's covariance from the identity
``discrete``   ``weak`` of token vectors scaled to norm sqrt(C)
``strong``     distance of the characteristic function of each sketched direction from a Gaussian's (the Epps-Pulley
               statistic of LeJEPA, arXiv 2511.08544), on 17 knots in [-5, 5]
``zipfian``    norm of the off-diagonal of the unit rows' Gram matrix, plus distance of the sorted norms from a 1/rank law
=============  ==========================================================================================================
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = ("weak", "strong", "discrete", "zipfian")
KNOTS, KNOT_LIMIT = 17, 5.0
_EPS = 1e-6


def draw_sketch(key: jax.Array, width: int, size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "C size"]:
  """Draws the projection that `regularizer` takes: independent standard normal entries, C = `width`."""
  return jax.random.normal(key, (width, size), dtype)


def regularizer(kind: str, x: Float[Array, "*rows C"], sketch: Float[Array, "C size"]) -> Float[Array, ""]:
  """Computes a regulariser of token vectors.

  Args:
    kind: one of `KINDS`.
    x: token vectors.
    sketch: a projection from `draw_sketch`; it is scaled here. If C <= size, only ``strong`` projects.

  Returns:
    The value in float32 or wider; the smaller it is, the closer the vectors are to the wanted distribution.
  """
  x = x.reshape(-1, x.shape[-1]).astype(jnp.promote_types(jnp.float32, x.dtype))
  return {"weak": _weak, "strong": _strong, "discrete": _discrete, "zipfian": _zipfian}[kind](x, sketch.astype(x.dtype))


def _sketched(x: jax.Array, sketch: jax.Array) -> jax.Array:
  """Projects rows (N, C), if that makes them narrower, and centres them: (N, min(C, size))."""
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
  """Integrates over the positive knots, since the integrand is even and vanishes at 0, with one knot in memory at a time."""
  directions = sketch / (jnp.linalg.norm(sketch, axis=0, keepdims=True) + _EPS)
  z = x @ directions
  step = 2 * KNOT_LIMIT / (KNOTS - 1)
  knots = step * jnp.arange(1, KNOTS // 2 + 1, dtype=x.dtype)
  weights = jnp.full_like(knots, 2 * step).at[-1].set(step)  # trapezoidal rule, doubled for the negative knots

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
  correlation = _norm(gram - jnp.diag(jnp.diag(gram)))
  target = 1 / jnp.arange(1, count + 1, dtype=z.dtype)
  ranked = jnp.sort(norms, descending=True)
  return correlation + _norm(ranked / (jnp.sum(ranked) + _EPS) - target / (jnp.sum(target) + _EPS))


def _norm(x: jax.Array) -> jax.Array:
  """Returns the Euclidean norm of all entries, with a zero gradient at zero."""
  square = jnp.sum(x * x)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

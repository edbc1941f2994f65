"""The formula of polar attention (arXiv 2606.25156) around its scores: the one place that every implementation computes it from.

What depends on how many keys a query sees is a `PerQuery`; kernels compute it from the transformed scalars and `Counts`, XLA's
forms from parameters and positions. The rest folds the null into streamed statistics, and takes gradients back through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams, Scalars

NORM_FLOOR = 1e-6  # norm of the attended vector below which the direction shrinks with it


def accumulator(*arrays: jax.Array) -> jnp.dtype:
  """float32, or float64 where an input is."""
  return jnp.result_type(jnp.float32, *arrays)


class Counts(NamedTuple):
  """Functions of the number n of visible keys, of any shape; `AttentionSpec` says what the two lengths are for."""

  log: jax.Array  # ``log n``
  root: jax.Array  # ``sqrt(log(n + 1))`` of the smallest of n, null_length and count_length
  held: jax.Array  # ``log min(n, count_length)``
  share: jax.Array  # ``log(min(n, count_length) + 1) / log(n + 1)``, by which the magnitude's logarithm is multiplied


class Curve(NamedTuple):
  """What `magnitude` takes besides what a query found; a field that is equal for all queries lacks the axis T."""

  rate: Float[Array, "*B T H"]


class PerQuery(NamedTuple):
  """What depends on the number of visible keys, in float32 or wider."""

  temp: Float[Array, "*B T H"]  # factor of the scores: an inverse temperature
  null: Float[Array, "*B T H"]  # logit of the null, already times `temp`
  curve: Curve


def count_features(visible: Float[Array, "..."], spec: AttentionSpec) -> Counts:
  """`Counts` of the number of visible keys."""
  held = visible if spec.count_length is None else jnp.minimum(visible, spec.count_length)
  counted = held if spec.null_length is None else jnp.minimum(held, spec.null_length)
  return Counts(jnp.log(visible), jnp.sqrt(jnp.log(counted + 1)), jnp.log(held), jnp.log1p(held) / jnp.log1p(visible))


def _multiply_add(x: jax.Array, y: jax.Array, z: Any) -> jax.Array:
  return z + y * x


def per_query(scalars: Scalars, counts: Counts, spec: AttentionSpec, *,
              multiply_add: Callable[[Any, Any, Any], jax.Array] = _multiply_add) -> PerQuery:
  """Temperature, null logit and magnitude curve from transformed scalars and the counts that they broadcast against.

  ``multiply_add(x, y, z)`` is ``x * y + z``; kernels that must agree on the temperature to the last bit pass an instruction.
  """
  temp = multiply_add(counts.log, scalars.len_gain, 1)
  null = scalars.null_base + scalars.null_slope * counts.root
  if spec.count_length is None:
    return PerQuery(temp, temp * null, Curve(scalars.mag_beta))
  held = multiply_add(counts.held, scalars.len_gain, 1)
  return PerQuery(temp, held * null + (counts.log - counts.held), Curve(scalars.mag_beta * counts.share))


def of_positions(params: PolarParams, positions: Int[Array, "*B T"], spec: AttentionSpec,
                 dtype: jax.typing.DTypeLike | None = None) -> PerQuery:
  """`per_query` of queries at `positions`, from 0, computed in float32 or wider; cast to `dtype` where one is given."""
  wide = accumulator(params.null_base)
  counts = count_features(spec.visible_keys(positions).astype(wide)[..., None], spec)
  found = per_query(params.scalars(wide), counts, spec)
  return found if dtype is None else jax.tree.map(lambda x: x.astype(dtype), found)


def last_positions(queries: int, keys: int) -> Int[Array, " T"]:
  """Positions of the last `queries` of `keys` positions."""
  return jnp.arange(keys - queries, keys)


def normalize(x: jax.Array, floor: jax.Array | float) -> jax.Array:
  """``x / max(|x|, floor)`` over the last axis, with a zero gradient of the norm below the floor."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), floor**2))


def magnitude(n_eff: jax.Array, found: jax.Array, curve: Curve) -> jax.Array:
  """``tanh(rate log(1 + n_eff * found))`` of a participation ratio and the weight on real keys, (..., H) each."""
  return jnp.tanh(curve.rate * jnp.log1p(n_eff * found))


def finalise(statistics: Statistics, per_query: PerQuery,
             v_null: Float[Array, "H D"]) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """Folds the null into statistics over all visible keys and reads off the outputs.

  Every exponential is taken relative to the larger of M and the null logit, so neither can overflow the other; the participation
  ratio ``L^2 / Q`` needs no null and is taken before any rescaling can underflow.

  Returns:
    direction, ``(S + p_null v_null)`` over max(its norm, 1e-6 Z); and magnitude, of ``m = L^2 / Q * L / Z`` with
    ``Z = L + p_null``.
  """
  M, L, Q, S = statistics
  real, p_null = _shares(M, per_query.null)
  Z = real * L + p_null
  attended = real[..., None] * S + p_null[..., None] * v_null.astype(S.dtype)
  return normalize(attended, NORM_FLOOR * Z[..., None]), magnitude(L * L / Q, real * L / Z, per_query.curve)


def found_weight(statistics: Statistics, null: Float[Array, "*B T H"]) -> Float[Array, "B T H"]:
  """Weight of each query on real keys: one less the weight of the null."""
  real, p_null = _shares(statistics.M, null)
  return real * statistics.L / (real * statistics.L + p_null)


def _shares(M: jax.Array, null: jax.Array) -> tuple[jax.Array, jax.Array]:
  """exp(M) and exp(null) over the larger of the two; M is a constant of the streaming form."""
  M = jax.lax.stop_gradient(M)
  top = jax.lax.stop_gradient(jnp.maximum(M, null))
  return jnp.exp(M - top), jnp.exp(null - top)


class NullGradients(NamedTuple):
  """Gradients taken back through the null: what a kernel's backward pass takes, and what needs no kernel."""

  go: Float[Array, "B T H D"]  # cotangent of ``o = sum_j p_j v_j``, p being the softmax over real keys
  twice: Float[Array, "B T H"]  # twice the cotangent of ``sum_j p_j^2``
  delta: Float[Array, "B T H"]  # the gradient of logit j is ``p_j (go.v_j + twice p_j - delta)``
  d_lse: Float[Array, "B T H"]  # cotangent of the log-sum-exp, the null's share included: the sum of those gradients
  d_null: Float[Array, "*B T H"]  # gradient of the null's logit
  d_v_null: Float[Array, "*B H D"]


def through_null(cotangents: tuple[jax.Array, jax.Array, jax.Array], direction: Float[Array, "B T H D"],
                 log_odds: Float[Array, "B T H"], sum_p2: Float[Array, "B T H"], norm: Float[Array, "B T H"],
                 v_null: Float[Array, "H D"], *, shared_null: bool = True) -> NullGradients:
  """Backpropagates through the null: `through_null_of_rows` with d_v_null (H, D) summed up, and d_null (T, H) if `shared_null`
  says that all rows of the batch have the same nulls."""
  gradients = through_null_of_rows(cotangents, direction, log_odds, sum_p2, norm, v_null)
  d_null = jnp.sum(gradients.d_null, axis=0) if shared_null else gradients.d_null
  return gradients._replace(d_null=d_null, d_v_null=jnp.sum(gradients.d_v_null, axis=(0, 1)))


def through_null_of_rows(cotangents: tuple[jax.Array, jax.Array, jax.Array], direction: jax.Array, log_odds: jax.Array,
                         sum_p2: jax.Array, norm: jax.Array, v_null: jax.Array) -> NullGradients:
  """The gradient of ``direction = s / max(|s|, floor)``, ``s = w_key o + w_null v_null``, ``w_key = sigmoid(lse - null)``.

  With gs the cotangent of s, ``go = w_key gs`` and the log-sum-exp receives ``w_null (gs.s - gs.v_null)``; in delta =
  go.o + twice sum_p2 - (cotangent of lse) the products with v_null cancel. gs.s is zero above the norm's floor.

  Args:
    cotangents: of direction (..., D), and of the natural log-sum-exp over real keys and of ``sum_j p_j^2``, (...) each.
    direction: (..., D), as stored.
    log_odds: (...), log-sum-exp minus the null's logit.
    sum_p2: (...), ``sum_j p_j^2``.
    norm: (...), |s|.
    v_null: broadcasts against direction.

  Returns:
    The gradients, d_null (...) and d_v_null (..., D) being what each row contributes.
  """
  g_direction, g_lse, g_sum_p2 = cotangents
  w_key, w_null = jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)
  g, c = g_direction.astype(jnp.float32), direction.astype(jnp.float32)
  along, above, shrink = jnp.sum(g * c, axis=-1), norm > NORM_FLOOR, 1 / jnp.maximum(norm, NORM_FLOOR)
  across = g - jnp.where(above, along, 0)[..., None] * c  # gs over `shrink`
  gs_s, twice = jnp.where(above, 0, along), 2 * g_sum_p2
  d_null = w_null * (shrink * jnp.sum(across * v_null, axis=-1) - gs_s)
  return NullGradients((w_key * shrink)[..., None] * across, twice, w_key * gs_s + twice * sum_p2 - g_lse, g_lse - d_null, d_null,
                       (w_null * shrink)[..., None] * across)


def temperature_gradient(q_dq: jax.Array, total: jax.Array, d_lse: jax.Array, lse: jax.Array, sum_p2: jax.Array,
                         temp: jax.Array) -> jax.Array:
  """Gradient of temp, ``sum_j dlogit_j score_j``, for each query, from what a kernel found: all (B, T, H), temp (T, H).

  An error of delta gives every dlogit_j an error in proportion to p_j, which the score it is multiplied by makes large. So
  scores are taken from their mean under p, ``(lse - entropy) / temp`` with the entropy near -log(sum_p2).

  Args:
    q_dq: ``sum_j dlogit_j temp score_j``, read off the gradient of q.
    total: ``sum_j dlogit_j`` of the same rounded terms; `d_lse` but for their errors.
    d_lse: see `NullGradients`.
    lse: natural log-sum-exp.
    sum_p2: ``sum_j p_j^2``.
    temp: factor of the scores.
  """
  return (q_dq - (lse + jnp.log(sum_p2)) * (total - d_lse)) / temp

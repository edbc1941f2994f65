"""What polar attention computes around its scores: temperature, null logit, and the outputs from the statistics."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from atma_jax.ops.core.streaming import Statistics

NORM_FLOOR = 1e-6  # of the attended vector, below which the direction shrinks with it


def accumulator(*arrays: jax.Array) -> jnp.dtype:
  """float32, or float64 where an input is."""
  return jnp.result_type(jnp.float32, *arrays)


class PerQuery(NamedTuple):
  """What depends on how many keys a query sees: all (..., T, H), in float32 or wider."""

  temp: jax.Array  # factor of the scores
  null: jax.Array  # logit of the null, the temperature in it
  rate: jax.Array  # of the magnitude; (H,) where it is the same for all queries


class Counts(NamedTuple):
  """Features of the number n of visible keys; null_length and count_length as for `polar_attention`."""

  log: jax.Array  # ``log n``
  root: jax.Array  # ``sqrt(log(n + 1))``, n no more than null_length and count_length
  held: jax.Array  # ``log n``, n no more than count_length
  share: jax.Array  # ``log(n + 1)`` of that n over that of n itself, by which the magnitude's logarithm is multiplied


def per_query(null_base: jax.Array, null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, *, queries: int,
              keys: int, window: int | None, null_length: int | None, count_length: int | None) -> PerQuery:
  """Temperature, null logit and magnitude's rate of the last `queries` of `keys` positions (Polar Attention, arXiv 2606.25156).

  Args:
    null_base, null_slope, len_gain, mag_beta: (H,) raw parameters.
    queries: T.
    keys: S.
    window: how many keys a query may see; None is all up to its own.
    null_length, count_length: as for `polar_attention`.
  """
  visible = jnp.arange(keys - queries + 1, keys + 1)
  visible = visible if window is None else jnp.minimum(visible, window)
  return of_counts(null_base, null_slope, len_gain, mag_beta, visible, null_length, count_length)


def of_counts(null_base: jax.Array, null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, visible: jax.Array,
              null_length: int | None, count_length: int | None) -> PerQuery:
  """`per_query` of queries that see `visible` (..., T) keys."""
  dtype = accumulator(null_base)
  counts = count_features(visible.astype(dtype)[..., None], null_length, count_length)
  gain, slope, rate = (jax.nn.softplus(raw.astype(dtype)) for raw in (len_gain, null_slope, mag_beta))
  temp, null = 1 + gain * counts.log, null_base.astype(dtype) + slope * counts.root
  if count_length is None:
    return PerQuery(temp, temp * null, rate)
  return PerQuery(temp, (1 + gain * counts.held) * null + (counts.log - counts.held), rate * counts.share)


def count_features(visible: jax.Array, null_length: int | None, count_length: int | None) -> Counts:
  """`Counts` of the number of visible keys."""
  held = visible if count_length is None else jnp.minimum(visible, count_length)
  counted = held if null_length is None else jnp.minimum(held, null_length)
  return Counts(jnp.log(visible), jnp.sqrt(jnp.log(counted + 1)), jnp.log(held), jnp.log1p(held) / jnp.log1p(visible))


def normalize(x: jax.Array, floor: jax.Array | float) -> jax.Array:
  """``x / max(|x|, floor)`` over the last axis, with a zero gradient of the norm below the floor."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), floor**2))


def magnitude(n_eff: jax.Array, found: jax.Array, rate: jax.Array) -> jax.Array:
  """``tanh(rate log(1 + n_eff * found))``, `found` being the weight on real keys; all (..., H)."""
  return jnp.tanh(rate * jnp.log1p(n_eff * found))


def finalise(statistics: Statistics, null: jax.Array, v_null: jax.Array,
             rate: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Folds the null in and reads off the outputs.

  Every exponential is taken relative to the larger of M and the null logit, so neither can overflow the other; the
  participation ratio ``L^2 / Q`` needs no null and is taken before any rescaling can underflow.

  Args:
    statistics: over all visible keys.
    null: (T, H) null logits.
    v_null: (H, D).
    rate: (H,) or (T, H), of the magnitude.

  Returns:
    direction (B, T, H, D), ``(S + p_null v_null)`` over max(its norm, 1e-6 Z); magnitude (B, T, H), with
    ``m = L^2 / Q * L / Z`` and ``Z = L + p_null``.
  """
  M, L, Q, S = statistics
  real, p_null = _shares(M, null)
  Z = real * L + p_null
  attended = real[..., None] * S + p_null[..., None] * v_null.astype(S.dtype)
  return normalize(attended, NORM_FLOOR * Z[..., None]), magnitude(L * L / Q, real * L / Z, rate)


class ThroughNull(NamedTuple):
  """What a kernel's backward pass takes, and the gradients that need no kernel."""

  go: jax.Array  # (B, T, H, D) cotangent of ``o = sum_j p_j v_j``, p being the softmax over real keys
  twice: jax.Array  # (B, T, H) twice the cotangent of ``sum_j p_j^2``
  delta: jax.Array  # (B, T, H): the gradient of logit j is ``p_j (go.v_j + twice p_j - delta)``
  d_lse: jax.Array  # (B, T, H) cotangent of the log-sum-exp, the null's share included: the sum of those gradients
  d_null: jax.Array  # (T, H)
  d_v_null: jax.Array  # (H, D)


def through_null(cotangents: tuple[jax.Array, jax.Array, jax.Array], direction: jax.Array, log_odds: jax.Array,
                 crowding: jax.Array, norm: jax.Array, v_null: jax.Array) -> ThroughNull:
  """The gradient of ``direction = s / max(|s|, floor)``, ``s = w_key o + w_null v_null``, ``w_key = sigmoid(lse - null)``.

  With gs the cotangent of s, ``go = w_key gs`` and the log-sum-exp receives ``w_null (gs.s - gs.v_null)``; in delta =
  go.o + twice crowding - (cotangent of lse) the products with v_null cancel. gs.s is zero above the norm's floor.

  Args:
    cotangents: of direction (B, T, H, D), natural log-sum-exp over real keys and crowding ``sum p^2`` (B, T, H).
    direction: (B, T, H, D), as stored.
    log_odds: (B, T, H), log-sum-exp minus the null's logit.
    crowding: (B, T, H).
    norm: (B, T, H), |s|.
    v_null: (H, D).
  """
  through = through_null_of_rows(cotangents, direction, log_odds, crowding, norm, v_null)
  return through._replace(d_null=jnp.sum(through.d_null, axis=0), d_v_null=jnp.sum(through.d_v_null, axis=(0, 1)))


def through_null_of_rows(cotangents: tuple[jax.Array, jax.Array, jax.Array], direction: jax.Array, log_odds: jax.Array,
                         crowding: jax.Array, norm: jax.Array, v_null: jax.Array) -> ThroughNull:
  """`through_null` of rows of any shape, with what each adds to the gradients of the null's logit, (...), and value, (..., D)."""
  g_direction, g_lse, g_crowding = cotangents
  w_key, w_null = jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)
  g, c = g_direction.astype(jnp.float32), direction.astype(jnp.float32)
  along, above, shrink = jnp.sum(g * c, axis=-1), norm > NORM_FLOOR, 1 / jnp.maximum(norm, NORM_FLOOR)
  across = g - jnp.where(above, along, 0)[..., None] * c  # gs over `shrink`
  gs_s, twice = jnp.where(above, 0, along), 2 * g_crowding
  d_null = w_null * (shrink * jnp.sum(across * v_null, axis=-1) - gs_s)
  return ThroughNull((w_key * shrink)[..., None] * across, twice, w_key * gs_s + twice * crowding - g_lse, g_lse - d_null, d_null,
                     (w_null * shrink)[..., None] * across)


def temperature_gradient(q_dq: jax.Array, total: jax.Array, d_lse: jax.Array, lse: jax.Array, crowding: jax.Array,
                         temp: jax.Array) -> jax.Array:
  """Gradient of temp (B, T, H), ``sum_j dlogit_j score_j``, from what a kernel found: all (B, T, H), temp (T, H).

  An error of delta gives every dlogit_j an error in proportion to p_j, which the score it is multiplied by makes large. So
  scores are taken from their mean under p, ``(lse - entropy) / temp`` with the entropy near -log(crowding).

  Args:
    q_dq: ``sum_j dlogit_j temp score_j``, read off the gradient of q.
    total: ``sum_j dlogit_j`` of the same rounded terms; `d_lse` but for their errors.
    d_lse: see `ThroughNull`.
    lse: natural log-sum-exp.
    crowding: ``sum p^2``.
    temp: temperature.
  """
  return (q_dq - (lse + jnp.log(crowding)) * (total - d_lse)) / temp


def weight_found(statistics: Statistics, null: jax.Array) -> jax.Array:
  """(B, T, H) weight on real keys, which is one less that of the null."""
  real, p_null = _shares(statistics.M, null)
  return real * statistics.L / (real * statistics.L + p_null)


def _shares(M: jax.Array, null: jax.Array) -> tuple[jax.Array, jax.Array]:
  """exp(M) and exp(null) over the larger of the two; M is a constant of the streaming form."""
  M = jax.lax.stop_gradient(M)
  top = jax.lax.stop_gradient(jnp.maximum(M, null))
  return jnp.exp(M - top), jnp.exp(null - top)

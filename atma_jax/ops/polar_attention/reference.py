"""Polar attention as the paper writes it (arXiv 2606.25156), every score in memory: the oracle of all other implementations."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams


def attend(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], params: PolarParams,
           spec: AttentionSpec, *, starts: Int[Array, "B T"] | None = None
           ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """See `atma_jax.ops.polar_attention.api`; computed in float32 or wider, differentiable any number of times."""
  weights = _weights(q, k, params, spec, starts)
  v = _repeat(v.astype(weights.keys.dtype), q.shape[2])
  attended = jnp.einsum("bhts,bshd->bthd", weights.keys, v) + weights.null[..., None] * params.v_null.astype(weights.keys.dtype)
  direction = formula.normalize(attended, formula.NORM_FLOOR).astype(q.dtype)
  return direction, formula.magnitude(weights.n_eff, 1 - weights.null, weights.curve)


def attention_statistics(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"],
                         params: PolarParams, spec: AttentionSpec, *,
                         starts: Int[Array, "B T"] | None = None) -> dict[str, Float[Array, "B T H"]]:
  """See `atma_jax.ops.polar_attention.api`."""
  del v
  weights = _weights(q, k, params, spec, starts)
  return {"n_eff": weights.n_eff, "w_null": weights.null}


class _Weights(NamedTuple):
  keys: Float[Array, "B H T S"]
  null: Float[Array, "B T H"]
  n_eff: Float[Array, "B T H"]  # participation ratio of the keys
  curve: formula.Curve


def _weights(q: jax.Array, k: jax.Array, params: PolarParams, spec: AttentionSpec, starts: jax.Array | None) -> _Weights:
  """The softmax over keys and null, taken in two steps, keys first, so that nothing is 0/0 where the null takes all."""
  (_, T, H, D), S = q.shape, k.shape[1]
  dtype = formula.accumulator(q)
  positions = formula.last_positions(T, S)
  temp, null, curve = formula.of_positions(params, positions if starts is None else positions - starts, spec)
  temp, null = temp.mT.astype(dtype), null.mT.astype(dtype)  # (H, T), or (B, H, T) where rows pack documents
  scores = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), _repeat(k.astype(dtype), H)) * D**-0.5
  visible = spec.sees(positions[:, None] - jnp.arange(S))
  if starts is not None:
    visible &= (jnp.arange(S) >= starts[..., None])[:, None]
  logits = jnp.where(visible, temp[..., None] * scores, -jnp.inf)
  keys = jax.nn.softmax(logits, axis=-1)
  w_null = jax.nn.sigmoid(null - jax.nn.logsumexp(logits, axis=-1))
  n_eff = 1 / jnp.sum(keys * keys, axis=-1)
  return _Weights(keys * (1 - w_null)[..., None], jnp.swapaxes(w_null, 1, 2), jnp.swapaxes(n_eff, 1, 2), curve)


def _repeat(x: jax.Array, heads: int) -> jax.Array:
  return jnp.repeat(x, heads // x.shape[2], axis=2)

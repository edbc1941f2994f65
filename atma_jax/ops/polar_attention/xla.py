"""Polar attention in XLA: key blocks are streamed within query blocks, nothing of size T x S is kept."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import streaming
from atma_jax.ops.core.streaming import Statistics
from atma_jax.ops.polar_attention import formula
from atma_jax.ops.polar_attention.formula import PerQuery
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams


def attend(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], params: PolarParams,
           spec: AttentionSpec, *, starts: Int[Array, "B T"] | None = None, block_q: int | None = None,
           block_k: int | None = None) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """See `atma_jax.ops.polar_attention.api`; saves q, k, v and the statistics for the backward pass."""
  statistics, per_query = _statistics(q, k, v, params, spec, starts, block_q, block_k)
  direction, magnitude = jax.checkpoint(formula.finalise)(statistics, per_query, params.v_null)
  return direction.astype(q.dtype), magnitude


def attention_statistics(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"],
                         params: PolarParams, spec: AttentionSpec, *,
                         starts: Int[Array, "B T"] | None = None) -> dict[str, Float[Array, "B T H"]]:
  """See `atma_jax.ops.polar_attention.api`."""
  statistics, per_query = _statistics(q, k, v, params, spec, starts)
  return {"n_eff": statistics.L**2 / statistics.Q, "w_null": 1 - formula.found_weight(statistics, per_query.null)}


def _statistics(q: jax.Array, k: jax.Array, v: jax.Array, params: PolarParams, spec: AttentionSpec, starts: jax.Array | None,
                block_q: int | None = None, block_k: int | None = None) -> tuple[Statistics, PerQuery]:
  positions = formula.last_positions(q.shape[1], k.shape[1])
  if starts is not None:
    positions = positions - starts  # in the document
  per_query = formula.of_positions(params, positions, spec, formula.accumulator(q))
  scale = per_query.temp * q.shape[-1]**-0.5
  statistics = streaming.attention_statistics(q, k, v, scale, window=spec.window, starts=starts, block_q=block_q, block_k=block_k)
  return statistics, per_query

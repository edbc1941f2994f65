"""Gated-delta memory over sequences: the public function and its table of implementations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch, visibility

_PACKAGE = "atma_jax.ops.gated_delta"
OP = dispatch.Op("gated_delta", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:gated_delta", platforms=("gpu",), supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.pallas_tpu:gated_delta", platforms=("tpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:gated_delta"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:gated_delta", platforms=()),
})


def gated_delta(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], *,
                log_gamma: Float[Array, "B T H"], beta: Float[Array, "B T H"],
                initial_state: Float[Array, "B H Dv D"] | None = None, starts: Int[Array, "B T"] | None = None,
                implementation: str = "auto") -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Dv D"]]:
  """Runs the gated delta rule (arXiv 2606.25156) over a sequence: at every step decay, then write, then read.

  ``M_t = gamma_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`` and ``r_t = M_t q_t``.

  Args:
    q: queries of unit norm over D.
    k: keys of unit norm over D; with longer keys the state may grow without bound. H must be a multiple of K, and each group of
      H / K adjacent query heads shares one key and value head. The GPU kernels do not repeat shared heads in memory.
    v: values.
    log_gamma: natural logarithm of the decay, finite and at most 0.
    beta: write strength in [0, 1].
    initial_state: the state before the first step; None is zeros.
    starts: for rows that pack documents: the position at which each token's document starts (`document_starts`). The state is
      zero before the first token of a document; one that goes on from `initial_state` has a start below 0. None resets nothing.
    implementation: one of `dispatch.NAMES`.

  Returns:
    The readout in v's dtype, and the state after the last step in float32 (float64 if an input is float64). Both are
    differentiable in every array argument.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: the implementation asked for by name cannot serve the call.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 4, 64))
    >>> q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    >>> gates = {"log_gamma": jnp.full((1, 16, 4), -0.01), "beta": jnp.full((1, 16, 4), 0.5)}
    >>> readout, state = gated_delta(q, k, v, **gates)
    >>> readout, state = gated_delta(q, k, v, initial_state=state, **gates)  # the sequence goes on
    >>> readout.shape, state.shape
    ((1, 16, 4, 64), (1, 4, 64, 64))
  """
  (B, T, H, D), (K, Dv) = q.shape, v.shape[2:]
  if k.shape != (B, T, K, D) or v.shape[:2] != (B, T) or H % K or log_gamma.shape != (B, T, H) or beta.shape != (B, T, H):
    raise ValueError(f"gated_delta: q {q.shape}, k {k.shape}, v {v.shape}, log_gamma {log_gamma.shape}, beta {beta.shape} must "
                     "be (B, T, H, D), (B, T, K, D), (B, T, K, Dv), (B, T, H) and (B, T, H), with H a multiple of K")
  dtype = jnp.result_type(jnp.float32, q, k, v)
  if initial_state is None:
    initial_state = jnp.zeros((B, H, Dv, D), dtype)
  elif initial_state.shape != (B, H, Dv, D):
    raise ValueError(f"gated_delta: initial_state {initial_state.shape} must be (B, H, Dv, D) = {(B, H, Dv, D)}")
  gates: dict[str, Any] = {"log_gamma": log_gamma, "beta": beta, "initial_state": initial_state.astype(dtype)}
  gates |= visibility.check_starts("gated_delta", starts, (B, T))
  name = OP.resolve(implementation, q, k, v, **gates)
  if name != "pallas_gpu":
    k, v = repeat_heads(k, H), repeat_heads(v, H)
  return OP(name, q, k, v, **gates)


def repeat_heads(x: Float[Array, "B T K D"], heads: int) -> Float[Array, "B T H D"]:
  """Repeats each of the K heads for all query heads of its group, `heads` in total."""
  return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)

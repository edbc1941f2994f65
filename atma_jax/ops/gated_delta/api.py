"""Gated-delta memory: a matrix state per head, decayed, corrected and read at every step (arXiv 2606.25156)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

_PACKAGE = "atma_jax.ops.gated_delta"
OP = dispatch.Op("gated_delta", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.pallas_gpu:gated_delta", platforms=("gpu",), supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.pallas_tpu:gated_delta", platforms=("tpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:gated_delta"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:gated_delta", platforms=()),
})


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array | None = None,
                implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """The gated delta rule, decay first, then write, then read.

  ``M_t = gamma_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`` and ``r_t = M_t q_t``.

  Args:
    q: (B, T, H, D) of unit norm over D.
    k: (B, T, K, D) of unit norm, H a multiple of K; longer keys make the rule expansive.
    v: (B, T, K, Dv). H / K heads share a key and a value, which kernels for a GPU do not repeat in memory.
    log_gamma: (B, T, H) log of the decay, finite and at most 0.
    beta: (B, T, H) write strength in [0, 1].
    initial_state: (B, H, Dv, D); None is zeros.
    implementation: one of `dispatch.NAMES`.

  Returns:
    readout (B, T, H, Dv) in v's dtype and the final state (B, H, Dv, D) in float32, or float64 for such inputs. Both
    are differentiable in every array argument.

  Raises:
    ValueError: shapes do not fit together.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  (B, T, H, D), (K, Dv) = q.shape, v.shape[2:]
  if k.shape != (B, T, K, D) or v.shape[:2] != (B, T) or H % K or log_gamma.shape != (B, T, H) or beta.shape != (B, T, H):
    raise ValueError(f"gated_delta: q {q.shape}, k {k.shape}, v {v.shape}, log_gamma {log_gamma.shape}, beta "
                     f"{beta.shape} are not (B, T, H, D), (B, T, K, D), (B, T, K, Dv), (B, T, H) twice with H a multiple of K")
  dtype = jnp.result_type(jnp.float32, q, k, v)
  if initial_state is None:
    initial_state = jnp.zeros((B, H, Dv, D), dtype)
  elif initial_state.shape != (B, H, Dv, D):
    raise ValueError(f"gated_delta: initial_state {initial_state.shape} is not (B, H, Dv, D) = {(B, H, Dv, D)}")
  gates = {"log_gamma": log_gamma, "beta": beta, "initial_state": initial_state.astype(dtype)}
  name = OP.resolve(implementation, q, k, v, **gates)
  if name != "pallas_gpu":
    k, v = repeated(k, H), repeated(v, H)
  return OP(name, q, k, v, **gates)


def repeated(x: jax.Array, heads: int) -> jax.Array:
  """x (B, T, K, D) with each head as often as its group has query heads, (B, T, heads, D)."""
  return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)

"""Polar attention: attention whose output is a direction and how much was found (arXiv 2606.25156)."""

from __future__ import annotations

import dataclasses

import jax

from atma_jax.ops.core import dispatch
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

_PACKAGE = "atma_jax.ops.polar_attention"
ATTENTION = dispatch.Op("polar_attention", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.gpu.pallas_gpu:polar_attention", platforms=("gpu",),
                                        supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.tpu.pallas_tpu:polar_attention", platforms=("tpu",),
                                        supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:polar_attention"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:polar_attention", platforms=()),
})
STATISTICS = dispatch.Op("polar_statistics", {
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:polar_statistics"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:polar_statistics", platforms=()),
})


def polar_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                    null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                    null_length: int | None = None, count_length: int | None = None,
                    implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """Causal polar attention.

  Query i sees its n_i last keys, itself included, and a null key. With ``temp_i = 1 + softplus(len_gain) log n_i``
  and ``null_i = null_base + softplus(null_slope) sqrt(log(n_i + 1))`` the weights are the softmax of
  ``temp_i [q_i.k_j / sqrt(D), null_i]``; the attended vector takes `v_null` for the null.

  Args:
    q: (B, T, H, D) queries, the last T of the S positions.
    k: (B, S, K, D) keys; H is a multiple of K, and query head h reads key head ``h // (H // K)``.
    v: (B, S, K, D) values.
    v_null: (H, D) the null's value.
    null_base, null_slope, len_gain, mag_beta: (H,) raw parameters.
    window: keys a query may see, itself included; None is all up to its own.
    null_length: visible keys N at which the null's logit stops growing: ``sqrt(log(min(n_i, N) + 1))`` in its place; None is
      the paper's.
    count_length: visible keys N past which the null and the magnitude are told n_i relative to N, which changes nothing up to
      it. The null's logit is that of N keys, with the temperature of N keys, plus ``log(n_i / N)``: its share stands against
      n_i unmatched keys as it did against N. The magnitude's log(1 + m) is multiplied by ``log(1 + N) / log(1 + n_i)``, and so
      keeps within what N keys can make it. None is the paper's.
    implementation: one of `dispatch.NAMES`.

  Returns:
    direction (B, T, H, D) in q's dtype, the attended vector over max(its norm, 1e-6); and magnitude (B, T, H) in
    float32 or wider, ``tanh(softplus(mag_beta) log(1 + m))`` with m the participation ratio of the keys times their
    weight.

  Raises:
    ValueError: shapes, window, null_length or count_length do not fit together.
    NotImplementedError: an implementation asked for by name cannot serve the call.
  """
  check(q, k, v, window, null_length, count_length)
  return ATTENTION(implementation, q, k, v, v_null=v_null, null_base=null_base, null_slope=null_slope,
                   len_gain=len_gain, mag_beta=mag_beta, window=window, null_length=null_length, count_length=count_length)


def polar_statistics(q: jax.Array, k: jax.Array, v: jax.Array, *, v_null: jax.Array, null_base: jax.Array,
                     null_slope: jax.Array, len_gain: jax.Array, mag_beta: jax.Array, window: int | None = None,
                     null_length: int | None = None, count_length: int | None = None,
                     implementation: str = "auto") -> dict[str, jax.Array]:
  """Diagnostics of `polar_attention` for the same arguments, without gradients being meant.

  Returns:
    ``n_eff`` (B, T, H), the participation ratio ``(sum w)^2 / sum w^2`` over real keys, and ``w_null`` (B, T, H), the
    weight of the null; float32 or wider.
  """
  check(q, k, v, window, null_length, count_length)
  return STATISTICS(implementation, q, k, v, v_null=v_null, null_base=null_base, null_slope=null_slope,
                    len_gain=len_gain, mag_beta=mag_beta, window=window, null_length=null_length, count_length=count_length)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, params: PolarParams, spec: AttentionSpec, *,
           implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """`polar_attention` with its parameters and its specification as one argument each."""
  raw = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
  return polar_attention(q, k, v, **raw, **dataclasses.asdict(spec), implementation=implementation)


def attention_statistics(q: jax.Array, k: jax.Array, v: jax.Array, params: PolarParams, spec: AttentionSpec, *,
                         implementation: str = "auto") -> dict[str, jax.Array]:
  """`polar_statistics` with its parameters and its specification as one argument each."""
  raw = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
  return polar_statistics(q, k, v, **raw, **dataclasses.asdict(spec), implementation=implementation)


def check(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, null_length: int | None,
          count_length: int | None) -> None:
  """Raises ValueError unless these make a causal polar attention."""
  dispatch.check_attention("polar_attention", q, k, v, window)
  for name, length in (("null_length", null_length), ("count_length", count_length)):
    if length is not None and length < 1:
      raise ValueError(f"polar_attention: {name}={length} must be at least 1, or None")

"""Polar attention: attention whose output is a direction and how much was found (arXiv 2606.25156)."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from atma_jax.ops.core import dispatch, visibility
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

_PACKAGE = "atma_jax.ops.polar_attention"
ATTENTION = dispatch.Op("polar_attention", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.gpu.pallas_gpu:attend", platforms=("gpu",), supports="supports"),
  "pallas_tpu": dispatch.Implementation(f"{_PACKAGE}.tpu.pallas_tpu:attend", platforms=("tpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:attend"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:attend", platforms=()),
})
STATISTICS = dispatch.Op("polar_statistics", {
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:attention_statistics"),
  "reference": dispatch.Implementation(f"{_PACKAGE}.reference:attention_statistics", platforms=()),
})


def polar_attention(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], *,
                    v_null: Float[Array, "H D"], null_base: Float[Array, " H"], null_slope: Float[Array, " H"],
                    len_gain: Float[Array, " H"], mag_beta: Float[Array, " H"], window: int | None = None,
                    null_length: int | None = None, count_length: int | None = None, starts: Int[Array, "B T"] | None = None,
                    implementation: str = "auto") -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """Causal polar attention.

  Query i sees its n_i last keys, itself included, and a null key. With ``temp_i = 1 + softplus(len_gain) log n_i`` and
  ``null_i = null_base + softplus(null_slope) sqrt(log(n_i + 1))`` the weights are the softmax of
  ``temp_i [q_i.k_j / sqrt(D), null_i]``; the attended vector takes `v_null` for the null.

  Args:
    q: queries, the last T of the S positions.
    k, v: keys and values; H is a multiple of K, and query head h reads key head ``h // (H // K)``.
    v_null, null_base, null_slope, len_gain, mag_beta: raw parameters, see `PolarParams`.
    window, null_length, count_length: which keys are seen and counted, see `AttentionSpec`; None is the paper's.
    starts: for rows that pack documents, with T = S: the position at which each token's document starts (`document_starts`). A
      query sees and counts no key before it, as if its document were a row of its own. None is 0.
    implementation: one of `dispatch.NAMES`.

  Returns:
    direction in q's dtype, the attended vector over max(its norm, 1e-6); and magnitude in float32 or wider,
    ``tanh(softplus(mag_beta) log(1 + m))`` with m the participation ratio of the keys times their weight.

  Raises:
    ValueError: shapes do not fit together, or a length is below 1.
    NotImplementedError: an implementation asked for by name cannot serve the call.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 4, 64))
    >>> scalars = {name: jnp.zeros(4) for name in ("null_base", "null_slope", "len_gain", "mag_beta")}
    >>> direction, magnitude = polar_attention(q, k, v, v_null=jnp.zeros((4, 64)), **scalars)
    >>> direction.shape, magnitude.shape
    ((1, 16, 4, 64), (1, 16, 4))
  """
  params = PolarParams(v_null=v_null, null_base=null_base, null_slope=null_slope, len_gain=len_gain, mag_beta=mag_beta)
  return attend(q, k, v, params, AttentionSpec(window, null_length, count_length), starts=starts, implementation=implementation)


def polar_statistics(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], *,
                     v_null: Float[Array, "H D"], null_base: Float[Array, " H"], null_slope: Float[Array, " H"],
                     len_gain: Float[Array, " H"], mag_beta: Float[Array, " H"], window: int | None = None,
                     null_length: int | None = None, count_length: int | None = None, starts: Int[Array, "B T"] | None = None,
                     implementation: str = "auto") -> dict[str, Float[Array, "B T H"]]:
  """Diagnostics of `polar_attention` for the same arguments; see `attention_statistics`."""
  params = PolarParams(v_null=v_null, null_base=null_base, null_slope=null_slope, len_gain=len_gain, mag_beta=mag_beta)
  return attention_statistics(q, k, v, params, AttentionSpec(window, null_length, count_length), starts=starts,
                              implementation=implementation)


def attend(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], params: PolarParams,
           spec: AttentionSpec, *, starts: Int[Array, "B T"] | None = None,
           implementation: str = "auto") -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """`polar_attention` with its parameters and its specification as one argument each."""
  dispatch.check_attention("polar_attention", q, k, v)
  documents = visibility.check_starts("polar_attention", starts, q.shape[:2], k.shape[1])
  return ATTENTION(implementation, q, k, v, params, spec, **documents)


def attention_statistics(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"],
                         params: PolarParams, spec: AttentionSpec, *, starts: Int[Array, "B T"] | None = None,
                         implementation: str = "auto") -> dict[str, Float[Array, "B T H"]]:
  """What polar attention did, not meant to be differentiated; arguments as for `attend`.

  Returns:
    ``n_eff``, the participation ratio ``(sum w)^2 / sum w^2`` over real keys, and ``w_null``, the weight of the null; float32
    or wider.
  """
  dispatch.check_attention("polar_attention", q, k, v)
  documents = visibility.check_starts("polar_statistics", starts, q.shape[:2], k.shape[1])
  return STATISTICS(implementation, q, k, v, params, spec, **documents)

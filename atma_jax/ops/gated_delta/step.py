"""One step of gated-delta memory, for decoding: the public function and its table of implementations."""

from __future__ import annotations

from jaxtyping import Array, Float

from atma_jax.ops.core import dispatch

_PACKAGE = "atma_jax.ops.gated_delta"
OP = dispatch.Op("gated_delta_step", {
  "pallas_gpu": dispatch.Implementation(f"{_PACKAGE}.step_gpu:gated_delta_step", platforms=("gpu",), supports="supports"),
  "xla": dispatch.Implementation(f"{_PACKAGE}.xla:gated_delta_step"),
  **dispatch.served_by(f"{_PACKAGE}.xla:gated_delta_step", "reference", "pallas_tpu"),
})


def gated_delta_step(q: Float[Array, "B 1 H D"], k: Float[Array, "B 1 K D"], v: Float[Array, "B 1 K Dv"], *,
                     log_gamma: Float[Array, "B 1 H"], beta: Float[Array, "B 1 H"],
                     state: Float[Array, "B H Dv D"] | Float[Array, "L B H Dv D"], layer: int | None = None,
                     implementation: str = "auto") -> tuple[Float[Array, "B 1 H Dv"], Array]:
  """Runs `atma_jax.ops.gated_delta` for a single step, T = 1; not differentiable through the kernel.

  ``M k`` and ``M q`` are read off the old state together. The readout then needs no second look at the new state, since
  ``M' q = gamma M q + u (k.q)`` with ``u = beta (v - gamma M k)``. XLA reads the state twice and writes it once; the kernel reads
  and writes it once.

  Args:
    q, k, v, log_gamma, beta: as for `gated_delta`; H is a multiple of K.
    state: the state before the step, of one layer or of all L layers stacked.
    layer: which layer of a stacked state to advance; None if the state is of one layer.
    implementation: one of `dispatch.NAMES`.

  Returns:
    The readout in v's dtype, and the state after the step, whose shape and dtype do not change.

  Raises:
    NotImplementedError: the implementation asked for by name cannot serve the call.
  """
  return OP(implementation, q, k, v, log_gamma=log_gamma, beta=beta, state=state, layer=layer)

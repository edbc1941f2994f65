"""Gated-delta memory. Callers want `atma_jax.ops.gated_delta`."""

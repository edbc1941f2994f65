"""Polar attention. Callers want `atma_jax.ops.polar_attention`."""

"""Residual sum and RMS norm in one op. Callers want `atma_jax.ops.sum_and_norm`."""

"""The sum of the residual stream with what layers add to it, and the sum's RMS norm: `atma_jax.ops.sum_and_norm`."""

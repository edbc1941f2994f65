"""Next-token cross-entropy that never stores the logits. Callers want `atma_jax.ops.cross_entropy`."""

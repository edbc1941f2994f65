"""Causal softmax attention, the matched baseline. Callers want `atma_jax.ops.softmax_attention`."""

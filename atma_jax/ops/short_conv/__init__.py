"""Depthwise causal convolutions of a few taps. Callers want `atma_jax.ops.short_conv`."""

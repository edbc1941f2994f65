"""Depthwise causal convolutions of a few taps: `atma_jax.ops.short_conv` and `atma_jax.ops.gated_short_conv`."""

"""Gated-delta memory: a decaying matrix state per head that is corrected and read at every step.

Call `atma_jax.ops.gated_delta` on sequences and `atma_jax.ops.gated_delta.step.gated_delta_step` when decoding.
"""

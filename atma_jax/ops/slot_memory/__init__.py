"""Routed slot memory, the recurrence of the Raven baseline: call `atma_jax.ops.slot_memory.api.slot_memory`."""

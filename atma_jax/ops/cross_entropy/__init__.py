"""Next-token cross-entropy of a soft-capped linear head, without logits of a whole sequence in memory.

Call `atma_jax.ops.cross_entropy` in training; `token_losses` and `token_predictions` give per-token results.
"""

"""Tables of speed, memory and error, which ``python -m atma_jax.benchmark`` prints."""

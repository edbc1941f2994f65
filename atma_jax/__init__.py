"""ATMA: length-invariant language models in JAX/Flax."""

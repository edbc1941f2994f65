"""The Atma model in Flax NNX."""

from atma_jax.models.model import Atma, count_parameters, parameter_metadata

__all__ = ["Atma", "count_parameters", "parameter_metadata"]

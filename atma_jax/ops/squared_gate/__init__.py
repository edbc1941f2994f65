"""The gate of the MLP, ``g * relu(u)^2``."""

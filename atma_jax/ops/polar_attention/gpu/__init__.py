"""Polar attention as Pallas kernels for GPUs."""

"""Polar attention as Pallas kernels for TPUs."""

"""Figures, tables and pages of evaluations and sweeps, drawn from plain records; nothing here imports JAX."""

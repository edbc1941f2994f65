"""Sweeps: grids of training runs, workers that share them, and what the results say about each factor."""

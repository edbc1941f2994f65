"""Grids of matched runs: which cells there are, who runs them, what they show."""

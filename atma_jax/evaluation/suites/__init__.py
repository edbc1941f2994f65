"""Evaluation suites, one file each, found by name."""

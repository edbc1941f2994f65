"""Saving and restoring training states and models."""

"""Fixtures of the serving tests."""

from __future__ import annotations

from tests.small_model import checkpoint, lively

__all__ = ["checkpoint", "lively"]

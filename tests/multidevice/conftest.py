"""Tests on eight fake CPU devices. They run in a process of their own, as launch/test.sh starts it."""

from __future__ import annotations

import jax
import pytest

DEVICES = 8


@pytest.fixture(autouse=True)
def eight_devices():
  """Skips where the process was not given eight devices."""
  if jax.device_count() < DEVICES:
    pytest.skip(f"needs {DEVICES} devices: XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES}")

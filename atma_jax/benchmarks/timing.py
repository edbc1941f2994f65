"""Times functions on the default device, and measures what it does at best: a matrix product and a copy."""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp


def milliseconds(function: Callable[..., Any], *args: Any, repeats: int) -> float:
  """Returns the mean time of a call in the best of three rounds of `repeats` calls, after one call to compile it."""
  jax.block_until_ready(function(*args))
  rounds = []
  for _ in range(3):
    start = time.perf_counter()
    out = None
    for _ in range(repeats):
      out = function(*args)
    jax.block_until_ready(out)
    rounds.append((time.perf_counter() - start) / repeats * 1e3)
  return min(rounds)


def matmul_tflops(size: int, repeats: int) -> float:
  """Returns the TFLOP/s of a product of two square bfloat16 matrices of random numbers."""
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  return 2 * size**3 / milliseconds(jax.jit(jnp.matmul), a, a, repeats=repeats) / 1e9


def copy_bandwidth() -> float:
  """Returns the bytes per second that a large copy reads and writes."""
  size = 2**30 if jax.default_backend() != "cpu" else 2**26
  x, add = jnp.zeros(size // 4, jnp.float32), jax.jit(lambda x: x + 1)
  jax.block_until_ready(add(x))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(add(x))
    times.append(time.perf_counter() - start)
  return 2 * size / min(times)

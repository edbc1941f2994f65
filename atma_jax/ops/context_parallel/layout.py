"""How a sequence that is split over the devices of a mesh axis is dealt out, and how pieces travel; inside `jax.shard_map`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def zigzag(x: Shaped[Array, "B T *rest"], axis: str) -> Shaped[Array, "B T *rest"]:
  """Deals consecutive pieces out anew: from pieces 2i and 2i + 1 of 2n on device i to pieces i and 2n - 1 - i."""
  n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  even, odd = (jax.lax.ppermute(half, axis, _owners(n, parity)) for parity, half in enumerate(jnp.split(x, 2, axis=1)))
  return jnp.concatenate(_swap(i % 2, even, odd), axis=1)


def unzigzag(x: Shaped[Array, "B T *rest"], axis: str) -> Shaped[Array, "B T *rest"]:
  """The inverse of `zigzag`."""
  n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  halves = _swap(i % 2, *jnp.split(x, 2, axis=1))
  return jnp.concatenate([jax.lax.ppermute(half, axis, [(b, a) for a, b in _owners(n, parity)])
                          for parity, half in enumerate(halves)], axis=1)


def _owners(n: int, parity: int) -> list[tuple[int, int]]:
  """For each device i, the device that owns piece 2i + parity in the zigzag layout."""
  return [(i, min(2 * i + parity, 2 * n - 1 - 2 * i - parity)) for i in range(n)]


def _swap(swapped: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.where(swapped, b, a), jnp.where(swapped, a, b)


def halo(x: Shaped[Array, "B T *rest"], steps: int, axis: str) -> Shaped[Array, "B steps *rest"]:
  """The `steps` steps before the first of x, from as many devices as they lie on; zeros before the sequence's start."""
  T, pieces, hop = x.shape[1], [], 1
  while steps > 0:
    pieces.append(receive(x[:, -min(steps, T):], axis, hop))
    steps, hop = steps - T, hop + 1
  return jnp.concatenate(pieces[::-1], axis=1) if pieces else x[:, :0]


def receive(x: Any, axis: str, hop: int) -> Any:
  """The x of the device `hop` before this one (after it, if negative); zeros beyond the ends."""
  n = jax.lax.axis_size(axis)
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, [(i, i + hop) for i in range(n) if 0 <= i + hop < n]), x)


def rotate(x: Any, axis: str, hop: int) -> Any:
  """The x of the device `hop` before this one, in a ring."""
  n = jax.lax.axis_size(axis)
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, [(i, (i + hop) % n) for i in range(n)]), x)

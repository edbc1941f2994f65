"""The identity of a model's weights: which parameters a saved state belongs to."""

from __future__ import annotations

import hashlib
import json
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from atma_jax.models import Atma

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def weights_identity(model: Atma) -> str:
  """Returns a fingerprint of the names, shapes, dtypes and bits of all parameters.

  It costs one pass over the parameters where they are, at the speed of the device's memory, and the compilation of one program. A
  changed bit changes it. It tells weights apart that were mixed up; it is no protection from somebody who makes weights collide.
  """
  leaves = {".".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  sums = jax.device_get(_sums(leaves))
  described = sorted((name, leaves[name].shape, str(leaves[name].dtype), *map(int, sums[name])) for name in leaves)
  return hashlib.sha256(json.dumps(described).encode()).hexdigest()


@jax.jit
def _sums(leaves: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
  """Two sums modulo 2^32 over every array, of its bits mixed with their positions; in whatever order they are added up."""
  def sums(x: Array) -> tuple[Array, Array]:
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[min(x.dtype.itemsize, 4)]).astype(jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    for axis in range(bits.ndim):
      step = math.prod(bits.shape[axis + 1:]) % 2**32
      position = position + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(step)
    first = _mix(bits ^ _mix(position + jnp.uint32(0x9E3779B9)))
    second = _mix(first ^ _mix(position ^ jnp.uint32(0x85EBCA6B)))
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)

  return {name: sums(x) for name, x in leaves.items()}


def _mix(x: Array) -> Array:
  """A bijection of 32-bit words in which every bit of the input moves half of those of the output."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)

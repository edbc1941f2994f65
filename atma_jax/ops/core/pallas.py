"""What the Pallas kernels of all ops share: constants, the matrix product they are made of, and the calls they all refuse."""

from __future__ import annotations

import math

import jax
from jax import lax
import jax.numpy as jnp

from atma_jax.ops.core import dispatch

HEAD_SIZES = (64, 128)
LOG2_E = math.log2(math.e)
MASKED = -(2.0**100)  # a score; finite, so that a block without a visible key makes no NaN, and exact under any scale


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Product of two matrices over one axis of each, accumulated in float32; float32 operands are not rounded first."""
  precision = unrounded() if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def unrounded() -> lax.Precision | lax.DotAlgorithmPreset:
  """The precision at which a kernel multiplies float32 operands: on a GPU three products of tf32 parts, off by 2^-21."""
  return lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if dispatch.platform() == "gpu" else lax.Precision.HIGHEST


def columns_of(width: int, most: int) -> int:
  """The largest power of two that divides a width, no larger than `most`, a power of two itself."""
  return next(n for n in (most >> i for i in range(most.bit_length())) if width % n == 0)


def cdiv(x: jax.Array, y: int) -> jax.Array:
  """``ceil(x / y)`` of integers x >= 0, in two instructions; for a traced x `pl.cdiv` takes care of negative numbers, too."""
  return lax.div(x + (y - 1), y)


def refusal(device: str, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
  """Why the attention and memory kernels for `device`, "gpu" or "tpu", cannot take q, k and v, or None if they can."""
  dtypes = {x.dtype.name for x in (q, k, v)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"takes q, k and v all in bfloat16 or all in float32, not {', '.join(sorted(dtypes))}"
  return head_refusal(q, k, v) or device_refusal(device)


def head_refusal(*arrays: jax.Array) -> str | None:
  """Why no kernel takes the head sizes of these arrays, their last axes, or None if kernels do."""
  sizes = {x.shape[-1] for x in arrays}
  if sizes <= set(HEAD_SIZES):
    return None
  return f"takes head sizes {' and '.join(map(str, HEAD_SIZES))}, not {' and '.join(map(str, sorted(sizes)))}"


def device_refusal(device: str) -> str | None:
  """Why a kernel for one `device`, "gpu" or "tpu", cannot run in the program being traced, or None if it can."""
  if dispatch.platform() != device:
    return dispatch.needs(device)
  if dispatch.sees_whole_arrays():
    return "takes what lies on one device: on a mesh of several it must be called inside shard_map"
  return None

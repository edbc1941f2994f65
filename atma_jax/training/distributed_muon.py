"""Orthogonalisation shared out over a mesh: every device does whole matrices, and only its share of them.

Matrices of one shape and sharding, of all layers and parameters, form one stack. Devices that hold different pieces of them
trade pieces for whole matrices (all-to-all over fsdp and tensor), those that hold the same (data, context) each take a
share; afterwards all goes back the same way (all-to-all, all-gather). A device receives its share once, never the model:
for N matrices of m x n over P devices that split them, about ``max(N / P, 1) m n`` numbers each way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from atma_jax.sharding import active_mesh, spec

SMALL = 1 << 16  # numbers of a stack that every device holds whole and orthogonalises itself: moving them costs more

Transform = Callable[[jax.Array], jax.Array]


def transform_matrices(updates: Mapping[str, jax.Array], logical_axes: Mapping[str, tuple[str | None, ...]],
                       transform: Transform) -> dict[str, jax.Array]:
  """``transform`` of every matrix, on the mesh that is set or, without one, as it stands.

  Args:
    updates: arrays (..., m, n) by parameter name, with at most one leading axis, which is not sharded.
    logical_axes: of each parameter.
    transform: of arrays (count, m, n), each matrix by itself.
  """
  mesh = active_mesh()
  if mesh is None:
    return {name: transform(x) for name, x in updates.items()}
  stacks: dict[tuple, list[str]] = {}
  for name, x in updates.items():
    stacks.setdefault((*x.shape[-2:], x.dtype, *spec(logical_axes[name][-2:])), []).append(name)
  results = {}
  for (m, n, _, *axes), names in stacks.items():
    arrays = [updates[name].reshape(-1, m, n) for name in names]
    if not any(axes) and sum(x.size for x in arrays) < SMALL:
      done = [transform(x) for x in arrays]
    else:
      done = _shared_out(arrays, tuple(axes), transform, mesh)
    results |= {name: x.reshape(updates[name].shape) for name, x in zip(names, done, strict=True)}
  return results


def _shared_out(arrays: list[jax.Array], axes: tuple[str | None, str | None], transform: Transform,
                mesh: AbstractMesh) -> list[jax.Array]:
  counts = [len(x) for x in arrays]
  count = sum(counts)
  splitting = [(axis, dimension) for dimension, axis in enumerate(axes, start=1) if axis is not None]
  copies = tuple(axis for axis in mesh.axis_names if axis not in axes)  # along these every device holds the same
  split, copied = (math.prod(mesh.shape[axis] for axis in names) for names in ([axis for axis, _ in splitting], copies))
  # Of the devices that hold the same, groups of this many share the work; more of them than matrices would only idle.
  group = max(d for d in range(1, copied + 1) if copied % d == 0 and d <= max(1, -(-count // split)))
  share = -(-count // (split * group))
  groups = [list(range(first, first + group)) for first in range(0, copied, group)]

  def body(*pieces: jax.Array) -> tuple[jax.Array, ...]:
    x = jnp.concatenate(pieces)
    x = jnp.pad(x, ((0, share * split * group - count), (0, 0), (0, 0)))
    if group > 1:
      x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(copies) % group * share * split, share * split)
    for axis, dimension in splitting:
      x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dimension, tiled=True)
    x = transform(x)
    for axis, dimension in reversed(splitting):
      x = jax.lax.all_to_all(x, axis, split_axis=dimension, concat_axis=0, tiled=True)
    if group > 1:
      x = jax.lax.all_gather(x, copies, axis_index_groups=groups, tiled=True)
    return tuple(jnp.split(x[:count], [sum(counts[:i]) for i in range(1, len(counts))]))

  specs = (PartitionSpec(None, *axes),) * len(arrays)
  return list(jax.shard_map(body, in_specs=specs, out_specs=specs, check_vma=False)(*arrays))

"""Orthogonalisation distributed over a mesh: every device transforms whole matrices, and only its share of them.

Matrices of the same shape and sharding, from all layers and parameters, form one stack. Devices that hold different shards of the
matrices exchange them for whole matrices (all-to-all over fsdp and tensor); devices that hold the same (data, context) each take
a share of the stack. Afterwards everything goes back the same way (all-to-all, all-gather). A device receives its share once,
never the model: for N matrices of m x n over P devices that split them, about ``max(N / P, 1) m n`` numbers each way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from atma_jax.sharding import active_mesh, spec

SMALL = 1 << 16  # a replicated stack of fewer numbers is transformed by every device: moving it would cost more

Transform = Callable[[Float[Array, "count m n"]], Float[Array, "count m n"]]


def transform_matrices(updates: Mapping[str, Float[Array, "*stack m n"]], logical_axes: Mapping[str, tuple[str | None, ...]],
                       transform: Transform) -> dict[str, Float[Array, "*stack m n"]]:
  """Applies `transform` to every matrix, distributed over the current mesh, if there is one.

  Args:
    updates: matrices or stacks of matrices by parameter name; the axis of a stack is not sharded.
    logical_axes: the logical axes of every parameter.
    transform: maps a stack of matrices to a stack of the same shape, each matrix on its own.
  """
  mesh = active_mesh()
  if mesh is None:
    return {name: transform(x) for name, x in updates.items()}
  stacks: dict[tuple, list[str]] = {}
  for name, x in updates.items():
    chex.assert_rank(x, {2, 3})
    stacks.setdefault((*x.shape[-2:], x.dtype, *spec(logical_axes[name][-2:])), []).append(name)
  results = {}
  for (m, n, _, *axes), names in stacks.items():
    arrays = [updates[name].reshape(-1, m, n) for name in names]
    if not any(axes) and sum(x.size for x in arrays) < SMALL:
      done = [transform(x) for x in arrays]
    else:
      done = _distributed(arrays, (axes[0], axes[1]), transform, mesh)
    results |= {name: x.reshape(updates[name].shape) for name, x in zip(names, done, strict=True)}
  return results


def _distributed(arrays: list[Float[Array, "count m n"]], axes: tuple[str | None, str | None], transform: Transform,
                 mesh: AbstractMesh) -> list[Float[Array, "count m n"]]:
  """`transform` of arrays whose last two axes are sharded over the mesh axes `axes`."""
  counts = [len(x) for x in arrays]
  count = sum(counts)
  splitting = [(axis, dimension) for dimension, axis in enumerate(axes, start=1) if axis is not None]
  copies = tuple(axis for axis in mesh.axis_names if axis not in axes)  # along these every device holds the same
  split, copied = (math.prod(mesh.shape[axis] for axis in names) for names in ([axis for axis, _ in splitting], copies))
  # The devices that hold the same shard work in groups of this size; in larger groups there would be no matrix for some.
  group = max(d for d in range(1, copied + 1) if copied % d == 0 and d <= max(1, -(-count // split)))
  share = -(-count // (split * group))
  groups = [list(range(first, first + group)) for first in range(0, copied, group)]

  def body(*shards: Float[Array, "count m_shard n_shard"]) -> tuple[Float[Array, "count m_shard n_shard"], ...]:
    x = jnp.concatenate(shards)
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

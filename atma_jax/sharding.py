"""The device mesh and the one table from logical axes to mesh axes.

Layer 1. Parameters and activations name *logical* axes ("embed", "mlp", "batch", ...); only this file knows the mesh.
Mesh axes: ``data`` replicates parameters and splits the batch; ``fsdp`` splits both; ``tensor`` splits heads, hidden units
and the vocabulary; ``context`` splits time.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    "features": (),  # the residual stream's width
    # Parameters.
    "layers": (),  # the stacked groups of a scanned model
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),  # query heads, flattened with what belongs to a head
    "kv_heads": (),  # grouped key/value heads are few: every device holds them
    "vocab": ("tensor",),
    "vector": (),  # biases, norm weights, per-head scalars, filter taps
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over all (or the given) devices; -1 on one axis takes what is left.

  TPU slices lie one after the other along the data axis: only its collectives cross the data-centre network.

  Raises:
    ValueError: the axes do not multiply to the number of devices, or the data axis is no multiple of the slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor, context)))
  fixed = math.prod(n for n in sizes.values() if n != -1)
  free = [name for name, n in sizes.items() if n == -1]
  if len(free) > 1:
    raise ValueError(f"only one mesh axis may be -1, not {' and '.join(free)}")
  if free and len(devices) % fixed == 0:
    sizes[free[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    asked = " x ".join(f"{name}={n}" for name, n in sizes.items())
    raise ValueError(f"mesh {asked} does not fit {len(devices)} device{'s' * (len(devices) > 1)}: the product must equal it")
  if devices[0].platform != "tpu":
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if sizes["data"] % slices:
    raise ValueError(f"mesh data={sizes['data']} must be a multiple of the {slices} slices")
  grid = mesh_utils.create_hybrid_device_mesh(
    (sizes["data"] // slices, *list(sizes.values())[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
  ) if slices > 1 else mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
  """PartitionSpec of an array whose dimensions have these logical names (None: not split).

  Raises:
    ValueError: a name is not in the table, or two dimensions would use one mesh axis.
  """
  entries, owner = [], {}
  for name in logical_axes:
    if name is not None and name not in LOGICAL_AXES:
      raise ValueError(f"logical axis {name!r} is not in the table: {', '.join(LOGICAL_AXES)}")
    mesh_axes = LOGICAL_AXES[name] if name is not None else ()
    for axis in mesh_axes:
      if axis in owner:
        raise ValueError(f"logical axes {owner[axis]!r} and {name!r} of one array both map to mesh axis {axis!r}")
      owner[axis] = name
    entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
  return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
  """Sharding over `mesh`; with `shape`, sizes that do not divide are refused with the numbers."""
  partition = spec(logical_axes)
  if shape is not None:
    for size, name, entry in zip(shape, logical_axes, partition, strict=True):
      axes = (entry,) if isinstance(entry, str) else entry or ()
      parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % parts:
        raise ValueError(f"axis {name!r} of size {size} does not divide over mesh {'*'.join(axes)}={parts}")
  return NamedSharding(mesh, partition)


def active_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh that is set (`jax.set_mesh`), or None where there is none or only one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def parts(logical_axis: str) -> int:
  """Over how many devices of the mesh that is set the logical axis is split."""
  mesh = active_mesh()
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES[logical_axis])


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
  """Pins the sharding of `x` inside jit; does nothing where no mesh is set (`jax.set_mesh`)."""
  if active_mesh() is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(logical_axes))

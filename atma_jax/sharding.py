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
from jaxtyping import Array, Shaped

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
    "heads": ("tensor",),  # query heads, flattened with the entries of each head
    "kv_heads": (),  # grouped key/value heads are few, so every device holds all of them
    "vocab": ("tensor",),
    "vector": (),  # biases, norm weights, per-head scalars, filter taps
}


def mesh_sizes(wanted: Sequence[int], devices: int, slices: int = 1) -> dict[str, int]:
  """The size of every mesh axis over a number of devices; arithmetic alone, so that the devices need not be there.

  Args:
    wanted: the sizes of `MESH_AXES`; -1 on one axis takes what is left.
    devices: how many there are.
    slices: TPU slices that they belong to.

  Raises:
    ValueError: the sizes do not multiply to `devices`, or the data axis is no multiple of `slices`.
  """
  sizes: dict[str, int] = dict(zip(MESH_AXES, wanted))
  fixed = math.prod(n for n in sizes.values() if n != -1)
  free = [name for name, n in sizes.items() if n == -1]
  if len(free) > 1:
    raise ValueError(f"only one mesh axis may be -1, not {' and '.join(free)}")
  if free and devices % fixed == 0:
    sizes[free[0]] = devices // fixed
  if math.prod(sizes.values()) != devices:
    asked = " x ".join(f"{name}={n}" for name, n in sizes.items())
    raise ValueError(f"mesh {asked} does not fit {devices} device{'s' * (devices > 1)}: the product must equal it")
  if sizes["data"] % slices:
    raise ValueError(f"mesh data={sizes['data']} must be a multiple of the {slices} slices")
  return sizes


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes a mesh with the axes `MESH_AXES`.

  TPU slices follow one another along the data axis, so only its collectives cross the data-centre network.

  Args:
    data: devices that split the batch and replicate the parameters. -1 on one axis, not more, takes what is left.
    fsdp: devices that split the batch and the parameters.
    tensor: devices that split heads, hidden units and the vocabulary.
    context: devices that split time.
    devices: what the mesh is laid over; None is every device.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
  sizes = mesh_sizes((data, fsdp, tensor, context), len(devices), slices)
  if devices[0].platform != "tpu":
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)
  grid = mesh_utils.create_hybrid_device_mesh(
    (sizes["data"] // slices, *list(sizes.values())[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
  ) if slices > 1 else mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
  """The PartitionSpec of an array whose dimensions have these logical names; a dimension named None is not split.

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
  """The sharding over `mesh` of an array whose dimensions have these logical names.

  Raises:
    ValueError: as `spec`; or `shape` is given and one of its sizes does not divide over its mesh axes.
  """
  partition = spec(logical_axes)
  if shape is not None:
    for size, name, entry in zip(shape, logical_axes, partition, strict=True):
      axes = (entry,) if isinstance(entry, str) else entry or ()
      shards = math.prod(mesh.shape[axis] for axis in axes)
      if size % shards:
        raise ValueError(f"axis {name!r} of size {size} does not divide over mesh {'*'.join(axes)}={shards}")
  return NamedSharding(mesh, partition)


def active_mesh() -> jax.sharding.AbstractMesh | None:
  """The current mesh (`jax.set_mesh`), or None if none is set or it has only one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def shard_count(logical_axis: str) -> int:
  """The number of shards that the current mesh splits a logical axis into; 1 without a mesh."""
  mesh = active_mesh()
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES[logical_axis])


def constrain(x: Shaped[Array, "*shape"], logical_axes: Sequence[str | None]) -> Shaped[Array, "*shape"]:
  """Pins the sharding of `x` inside jit; without a current mesh, returns `x` as it is."""
  if active_mesh() is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(logical_axes))

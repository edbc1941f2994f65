"""The accelerators this package knows: the one table of what they can do, and which of them a program is traced for."""

from __future__ import annotations

import dataclasses
import math

from atma_jax.ops.core import dispatch


@dataclasses.dataclass(frozen=True)
class Device:
  """One accelerator as JAX counts devices; gigabytes are 1e9 bytes, NaN is what nothing here has needed yet.

  Attributes:
    name: how topologies and tables call it.
    kinds: parts of `jax.Device.device_kind` by which it is recognised.
    generation: key of the measured tables in `atma_jax.ops.core.tiles`, shared by devices whose cores are the same.
    tflops: dense bfloat16, from the vendor's datasheet.
    memory_gib: what a program may use of the HBM, as the compiler enforces it.
    memory_gbps: bandwidth of the HBM.
    link_gbps: into the chip over all of its inter-chip links: half the bidirectional rate of the datasheet.
    network_gbps: a chip's share of the data-centre network, between slices.
    vmem_mib: on-chip memory of a TPU core, as Pallas knows it; 32 is assumed where it is not known.
  """

  name: str
  kinds: tuple[str, ...]
  generation: str
  tflops: float
  memory_gib: float = math.nan
  memory_gbps: float = math.nan
  link_gbps: float = math.nan
  network_gbps: float = math.nan
  vmem_mib: int = 32


# TPU rates are from their pages of cloud.google.com/tpu/docs. The first device with a matching kind is taken.
DEVICES = (
  Device("H200", ("H200",), "hopper", 989),  # GH200 too
  Device("H100", ("H100",), "hopper", 989),
  Device("A100", ("A100",), "ampere", 312),
  Device("L40S", ("L40S",), "ada", 362),
  # 300 GB/s of links; 25 Gbit/s a chip between slices
  Device("v4", ("TPU v4",), "v4", 275, 30.75, 1228, 150, 3.1, 16),
  # 400 GB/s of links; 6.4 Tbit/s a pod of 256
  Device("v5e", ("TPU v5 lite", "TPU v5e"), "v5e", 197, 15.75, 819, 200, 3.1, 128),
  # 1200 GB/s of links; 50 Gbit/s a chip
  Device("v5p", ("TPU v5",), "v5p", 459, 95.73, 2765, 600, 6.2, 64),
  # 800 GB/s of links; 25.6 Tbit/s a pod of 256
  Device("v6e", ("TPU v6",), "v6e", 918, 31.24, 1638, 400, 12.5, 128),
  Device("v7", ("TPU7",), "v7", 2307, vmem_mib=64),
)
PLANNED = {device.name: device for device in DEVICES if not math.isnan(device.network_gbps)}  # those with every rate known


def of_kind(kind: str) -> Device | None:
  """The device that JAX calls `kind`, or None for one that is not in the table."""
  return next((device for device in DEVICES if any(part in kind for part in device.kinds)), None)


def current() -> Device | None:
  """The device that the program being traced will run on, or None for one that is not in the table."""
  return of_kind(dispatch.device_kind())


def generation() -> str:
  """Generation of the current device, such as ``hopper`` or ``v5e``; for an unknown one the kind that JAX gives it."""
  device = current()
  return device.generation if device else dispatch.device_kind()


def vmem_mib() -> int:
  """On-chip memory of a core of the current device, in MiB."""
  device = current()
  return device.vmem_mib if device else 32


def vmem_budget() -> int:
  """Bytes of on-chip memory that a TPU kernel may use on the current device: half of it, the rest is the compiler's.

  All of the 16 MiB of a v4: half of that would be too little for any tile.
  """
  return vmem_mib() * (2**19 if vmem_mib() > 16 else 2**20)

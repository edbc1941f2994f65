"""Compiles the actual training or evaluation step for TPUs that are not there, and estimates its memory and its time.

Needs only libtpu's compiler (extra ``[tpu]``). Memory is what the compiler reports for one device. The operations that are run
(with rematerialisation, the optimizer and what every device repeats), the bytes through memory and the collectives are read from
the compiled program (`atma_jax.planning.hlo`); the useful operations, on which MFU is based, are counted by
`atma_jax.models.operations`. The step time is a roofline: the longest of arithmetic, memory traffic, inter-chip links and the
network between slices, each at its full rate and all overlapping. No real step is faster; many are slower.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from atma_jax.config import Config, check_context_divides
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.models.operations import training_flops_per_token
from atma_jax.ops.core.devices import PLANNED, Device
from atma_jax.planning.hlo import Traffic, traffic
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.state import abstract_state, optimizer_for
from atma_jax.training.train_step import make_train_step

MODES = ("train", "evaluate")
GIB = 2.0**30


ENVIRONMENT = {  # keeps libtpu from looking for a TPU machine: no metadata server, no other workers, no chip to lock
  "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step takes; bytes are those of one device.

  Attributes:
    topology: generation, shape and number of slices.
    devices: number of devices.
    mesh: devices along every mesh axis.
    mode: one of `MODES`.
    tokens: target tokens in a step, of all devices.
    compile_seconds: how long tracing and compiling took.
    parameter_bytes, optimizer_bytes, batch_bytes: what the step is given.
    temporary_bytes: activations and other temporaries.
    output_bytes: results, including those that reuse the memory of arguments.
    peak_bytes: all of it.
    flops: useful operations in a step, of all devices together.
    traffic: what the compiled program does.
    chip: the rates of a device.
  """

  topology: str
  devices: int
  mesh: dict[str, int]
  mode: str
  tokens: int
  compile_seconds: float
  parameter_bytes: int
  optimizer_bytes: int
  batch_bytes: int
  temporary_bytes: int
  output_bytes: int
  peak_bytes: int
  flops: float
  traffic: Traffic
  chip: Device

  @property
  def seconds(self) -> dict[str, float]:
    """The time that each part would take by itself at the full rate of the chip."""
    links = sum(moved for _, moved in self.traffic.collectives.values())
    ran = max(self.traffic.flops, self.flops / self.devices)  # a loop of unknown length was counted as one round
    return {"arithmetic": ran / (self.chip.tflops * 1e12),
            "memory": self.traffic.memory_bytes / (self.chip.memory_gbps * 1e9),
            "links": links / (self.chip.link_gbps * 1e9),
            "network": self.traffic.network_bytes / (self.chip.network_gbps * 1e9)}

  @property
  def step_seconds(self) -> float:
    """The roofline: the time of the longest part."""
    return max(self.seconds.values())

  @property
  def mfu(self) -> float:
    """Useful operations as a share of what all devices could do in the time of a step."""
    return self.flops / self.devices / (self.chip.tflops * 1e12) / self.step_seconds

  def lines(self) -> list[str]:
    """The plan as text, line by line."""
    seconds = self.seconds
    mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
    ran = self.traffic.flops * self.devices
    lines = [
      f"{self.mode} on {self.topology}: {self.devices} devices, {mesh}; {self.tokens:,} tokens a step; compiled in "
      f"{self.compile_seconds:.0f} s",
      f"memory of a device   parameters {_gib(self.parameter_bytes)}, optimizer {_gib(self.optimizer_bytes)}, batch "
      f"{_gib(self.batch_bytes)}, activations and temporaries {_gib(self.temporary_bytes)}; peak {_gib(self.peak_bytes)} of "
      f"{self.chip.memory_gib:.2f} GiB: fits",
      f"useful operations    {self.flops:.3e} a step, {self.flops / self.tokens:.3e} a token",
      f"operations run       {ran:.3e} a step, {ran / self.flops:.2f} times the useful ones",
      "roofline             " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items() if value)
      + f"; limit: {max(seconds, key=lambda name: seconds[name])}",
      f"estimate             step {1e3 * self.step_seconds:.1f} ms or more, {self.tokens / self.step_seconds:,.0f} tokens/s or "
      f"less, MFU {100 * self.mfu:.0f} % or less",
    ]
    if self.traffic.kernels:
      lines.append(f"Pallas kernels       {self.traffic.kernels} a step")
    for kind, (count, moved) in sorted(self.traffic.collectives.items(), key=lambda item: -item[1][1]):
      lines.append(f"{kind:<20} {count:>6} a step, {moved / 2**20:,.1f} MiB a device")
    if self.traffic.network_bytes:
      lines.append(f"between slices       {self.traffic.network_bytes / 2**20:,.1f} MiB sent a device")
    if self.traffic.unknown_loops:
      lines.append(f"note                 {self.traffic.unknown_loops} loops of a length known only at run time are counted as "
                   "one round")
    return lines


def plan(config: Config, topology: str, *, slices: int = 1, mode: str = "train", length: int | None = None,
         batch: int | None = None) -> Plan:
  """Compiles a step of a recipe for a TPU topology.

  Args:
    config: a validated recipe; ``config.mesh`` is laid over the topology.
    topology: generation and shape, such as ``v5e:16x16``.
    slices: number of such slices, joined by the data-centre network along the data axis.
    mode: ``train``, the step of `atma_jax.training.train_step`; or ``evaluate``, the losses of (batch, length) tokens.
    length: tokens of a sequence in mode ``evaluate``; None is the training length.
    batch: sequences in mode ``evaluate``; None is one for each shard of the batch axes.

  Raises:
    UserError: no such topology, no libtpu, sizes that do not divide, or a program that does not fit the memory.
  """
  if mode not in MODES:
    raise UserError(f"--mode={mode}: must be one of {', '.join(MODES)}")
  chip = PLANNED.get(topology.partition(":")[0])
  if chip is None:
    raise UserError(f"--topology={topology}: must be one of {', '.join(PLANNED)} and a shape, such as v5e:16x16 or v5p:4x4x8")
  mesh = _mesh(config, topology, slices)
  definition = ModelDefinition(config.model)
  started = time.perf_counter()
  with jax.set_mesh(mesh):
    if mode == "train":
      step = _lower_training(config, definition, mesh)
    else:
      step = _lower_evaluation(config, definition, mesh, length, batch)
    compiled = _compile(step.lowered, topology, chip)
  seconds = time.perf_counter() - started
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None, "the TPU compiler reports both"
  rows, columns = step.batch.shape
  tokens = rows * (columns - 1)
  flops = training_flops_per_token(definition, columns - 1) * tokens
  return Plan(
    topology=topology if slices == 1 else f"{slices} x {topology}", devices=mesh.size, mesh=dict(mesh.shape), mode=mode,
    tokens=tokens, compile_seconds=seconds, parameter_bytes=_bytes(step.params), optimizer_bytes=_bytes(step.opt_state),
    batch_bytes=_bytes(step.batch), temporary_bytes=memory.temp_size_in_bytes, output_bytes=memory.output_size_in_bytes,
    peak_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
    flops=flops if mode == "train" else flops / 3, traffic=traffic(text), chip=chip)


class _Lowered(NamedTuple):
  """A step that is ready to be compiled, and the shapes of its arguments."""

  lowered: jax.stages.Lowered
  params: Any
  opt_state: Any
  batch: jax.ShapeDtypeStruct  # (rows, tokens of a row + 1)


def _mesh(config: Config, topology: str, slices: int) -> Mesh:
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(re.findall(r"\d+", topology.partition(":")[2])) == {"1"}:
      options["chips_per_host_bounds"] = (1, 1, 1)  # unless one is asked for, a host has several chips
    description = topologies.get_topology_desc(topology, "tpu", **options)
  except Exception as error:  # libtpu raises its own RuntimeErrors and ValueErrors for a bad shape and for not being there
    reason = re.sub(r"\s+", " ", str(error))[:160]
    if "libtpu" in reason or "Unable to initialize backend" in reason:
      raise UserError(f"--topology={topology}: needs libtpu, install atma_jax[tpu] or [dev]: {reason}") from error
    raise UserError(f"--topology={topology}: not a shape this libtpu knows, such as v5e:16x16, v5p:4x4x8 or v6e:8x8: "
                    f"{reason}") from error
  try:
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context, description.devices)
  except ValueError as error:
    raise UserError(f"config.mesh on {topology}: {error}") from error


def _lower_training(config: Config, definition: ModelDefinition, mesh: Mesh) -> _Lowered:
  optimizer = optimizer_for(config, definition)
  state = abstract_state(config, definition, optimizer, mesh)
  tokens = _tokens(config.data.batch_size, config.data.sequence_length, mesh, "config.data.batch_size")
  step = make_train_step(config, definition, optimizer, mesh, state, end_of_text=0)
  return _Lowered(step.lower(state, tokens), state.params, state.opt_state, tokens)


def _lower_evaluation(config: Config, definition: ModelDefinition, mesh: Mesh, length: int | None,
                      batch: int | None) -> _Lowered:
  params = definition.abstract_params(mesh)
  length = length or config.data.sequence_length
  shape = _tokens(batch or mesh.shape["data"] * mesh.shape["fsdp"], length, mesh, "--batch")
  check_context_divides("--length", length, mesh.shape["context"])

  def losses(params: Params, tokens: Int[Array, "B T+1"]) -> Float[Array, "B T"]:
    model = definition.merge(params)
    return model.token_losses(model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk=config.train.loss_chunk)

  lowered = jax.jit(losses, out_shardings=named_sharding(mesh, ("batch", "sequence"))).lower(params, shape)
  return _Lowered(lowered, params, {}, shape)


def _tokens(batch: int, length: int, mesh: Mesh, name: str) -> jax.ShapeDtypeStruct:
  try:
    sharding = named_sharding(mesh, ("batch", None), (batch, length + 1))
  except ValueError as error:
    raise UserError(f"{name}={batch}: {error}") from error
  return jax.ShapeDtypeStruct((batch, length + 1), jnp.int32, sharding=sharding)


def _compile(lowered: jax.stages.Lowered, topology: str, chip: Device) -> jax.stages.Compiled:
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = re.sub(r"\s+", " ", str(error))
    used = (re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", text)
            or re.search(r"required for [\w ]+ \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", text))
    if used is None and "RESOURCE_EXHAUSTED" not in text:
      raise
    what = f"needs {used[1]} of {used[2]}" if used else text[:200]
    raise UserError(f"--topology={topology}: the step does not fit the {chip.memory_gib} GiB of a device: {what}; shard more "
                    "(config.mesh.fsdp, config.mesh.context), accumulate (config.train.accumulation) or recompute "
                    "(config.model.remat=block)") from error


def _bytes(tree: Any) -> int:
  """The bytes that one device holds of a tree of `jax.ShapeDtypeStruct` with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gib(size: float) -> str:
  return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"

"""What a configuration needs of the memory, from sizes alone, and whether this machine has it.

Nothing is built and nothing is traced: every figure is plain arithmetic, so that a model of any size is judged at once. Figures
leave out what depends on the compiler, and are therefore never more than what is really taken; `check_training_fits` refuses only
what cannot fit. Parameters and the optimizer's state are within 10 % of the arrays; a whole step takes 1.6 to 2.5 times its
estimate for the recipes whose memory is known (tests/faults/test_numbers_config.py).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib

import jax

from atma_jax.config import Config, ModelConfig
from atma_jax.errors import UserError

GIB = 2.0**30
_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_LIMITS = (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True)
class Needs:
  """Bytes by what they are for, the largest first when they are shown.

  Attributes:
    parts: such as {"parameters": 1024}.
  """

  parts: dict[str, float]

  @property
  def total(self) -> float:
    """All of them."""
    return sum(self.parts.values())

  def __str__(self) -> str:
    shown = sorted(((size, name) for name, size in self.parts.items() if size), reverse=True)
    return ", ".join(f"{name} {shown_bytes(size)}" for size, name in shown)


def parameter_counts(model: ModelConfig) -> dict[str, int]:
  """Numbers of parameters: ``matrices`` inside blocks, ``embedding`` and ``head``; vectors and filters are left out.

  Of a mixer that was added without being counted here, only the MLP beside it is.
  """
  inner, inner_kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  memory = 2 * model.width * (inner + model.num_heads) if model.memory.enabled else 0
  mixers = {
    "local": 4 * model.width**2,
    "global": model.width * (3 * inner + 2 * inner_kv) + memory,
    "raven": model.width * (2 * inner + 2 * inner_kv + model.num_heads * (model.raven.slots + 1)) + memory,
  }
  matrices = sum(layers * (mixers.get(kind, 0) + 3 * model.width * model.mlp_width) for kind, layers in _layers(model).items())
  return {"matrices": matrices, "embedding": model.vocab_size * model.width, "head": model.vocab_size * model.width}


def state_needs(config: Config, shards: int = 1) -> Needs:
  """What a training state holds, and with it a checkpoint: parameters, their average, and the moments of the optimizer.

  Args:
    config: a validated recipe.
    shards: parts that every parameter is divided into; the bytes are those of one.
  """
  counts = parameter_counts(config.model)
  total = sum(counts.values())
  size = _BYTES[config.model.param_dtype] / shards
  moments = 2 * total if config.optimizer.kind == "adamw" else counts["matrices"] + 2 * (counts["embedding"] + counts["head"])
  return Needs({"parameters": total * size, "average of parameters": total * size * (config.train.ema_decay is not None),
                "optimizer": moments * size})


def training_needs(config: Config, devices: int = 1) -> Needs:
  """What one of several devices must hold during a training step.

  Args:
    config: a validated recipe.
    devices: that the mesh is laid over, all of them together.
  """
  model, train = config.model, config.train
  mesh = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor", "context")}
  fixed = math.prod(max(size, 1) for size in mesh.values())
  mesh = {axis: max(devices // fixed, 1) if size == -1 else size for axis, size in mesh.items()}

  state = state_needs(config, mesh["fsdp"] * mesh["tensor"]).parts
  gradients = {"gradients": state["parameters"]}
  rows = config.data.batch_size / train.accumulation / (mesh["data"] * mesh["fsdp"])
  time = config.data.sequence_length / mesh["context"]
  steps = time / math.ceil(time / train.loss_chunk)
  number = rows * time * _BYTES[model.activation_dtype] / mesh["tensor"]
  kept, again = _saved(model)
  logits, recomputed = rows * steps * model.vocab_size / mesh["tensor"] * 4, number * again
  working = {"activations": number * kept,
             **({"logits": logits} if logits > recomputed else {"recomputed activations": recomputed})}
  return Needs({
    **state, "sums of gradients": state["parameters"] * (train.accumulation > 1),
    "batch": config.data.batch_size * (config.data.sequence_length + 1) * 4 / (mesh["data"] * mesh["fsdp"]),
    **max(working, gradients, key=lambda parts: sum(parts.values())),  # gradients replace activations in the backward pass
  })


def _saved(model: ModelConfig) -> tuple[float, float]:
  """Numbers of every token, at least: that the forward pass keeps for the backward pass, and that this computes again at once."""
  if model.remat == "block":
    group = dataclasses.replace(model, remat="none", num_layers=min(len(model.block_pattern), model.num_layers))
    return model.width * (model.num_layers // len(model.block_pattern)), _saved(group)[0]
  inner = model.num_heads * model.head_dim
  mixers = {"local": 3 * model.width, "global": 2 * inner, "raven": inner + model.num_heads * model.raven.slots}
  stream = 2 * model.width if model.remat == "none" else 0
  return sum(layers * (stream + 2 * model.mlp_width + mixers.get(kind, 0)) for kind, layers in _layers(model).items()), 0


def generation_needs(model: ModelConfig, rows: int, capacity: int, cache_dtype: str | None = None) -> Needs:
  """What a model and the states of its requests take: parameters, cache, and the logits of one token.

  Args:
    model: the network.
    rows: requests decoded at once.
    capacity: most tokens of a request.
    cache_dtype: of keys and values; None is the activation dtype.
  """
  layers, size = _layers(model), _BYTES[cache_dtype or model.activation_dtype]
  slots = capacity if model.window is None else min(capacity, model.window)
  scale = 4 if cache_dtype == "int8" else 0
  keys = 2 * layers["global"] * model.num_kv_heads * slots * (model.head_dim * size + scale)
  state = (layers["global"] + layers["raven"]) * model.num_heads * model.head_dim**2 * 4 if model.memory.enabled else 0
  state += 2 * layers["raven"] * model.num_heads * model.raven.slots * model.head_dim * 4
  return Needs({"parameters": sum(parameter_counts(model).values()) * _BYTES[model.param_dtype],
                "cache": float(rows * (keys + state)), "logits": float(rows * model.vocab_size * 4)})


def host_bytes() -> int | None:
  """Memory of this machine, or of the container that this process runs in if that is less; None where the system says neither."""
  try:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError, AttributeError):
    return None
  for path in _LIMITS:
    try:
      total = min(total, int(path.read_text()))
    except (OSError, ValueError):  # not there, or "max"
      continue
  return total


def free_host_bytes() -> int | None:
  """Memory that this machine, or the container of this process, has left; None where the system does not say."""
  try:
    lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024  # with the caches that the kernel gives back
  except (OSError, KeyError, ValueError):
    return None
  try:  # a container may be limited to less; its inactive file pages are reclaimed on demand and count as free
    limit, used, statistics = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
    cached = int(dict(line.split() for line in statistics.splitlines())["inactive_file"])
    return min(free, int(limit) - int(used) + cached) if limit.strip() != "max" else free
  except (OSError, KeyError, ValueError):
    return free


def device_bytes() -> tuple[int | None, str]:
  """Memory that one device of this process can use, and what to call it; CPU devices share that of the host."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    total = host_bytes()
    return (None if total is None else total // jax.local_device_count()), "this machine"
  statistics = device.memory_stats() or {}
  return statistics.get("bytes_limit"), f"a device ({device.device_kind})"


def check_training_fits(config: Config, stated: tuple[int, float | None, str] | None = None) -> Needs:
  """Holds a recipe against this machine, or against devices that are not there, before anything is built.

  Args:
    config: a validated recipe.
    stated: how many devices there will be, the bytes that one has (None if not known) and what to call one; None is the devices
      of this machine, whose own memory is then looked at too.

  Returns:
    What a device needs.

  Raises:
    UserError: a device cannot hold the training state and one microbatch, or the host cannot hold the batches that are read
      ahead; the message says how many GiB are needed at least and how many there are.
  """
  devices, available, name = stated or (jax.device_count(), *device_bytes())
  needs = training_needs(config, devices)
  _check("config: training", needs, available, name,
         "lower config.model sizes, config.data.batch_size or config.data.sequence_length, or raise config.train.accumulation or "
         "config.mesh.fsdp")
  if stated:
    return needs
  rows = config.data.batch_size / jax.process_count()
  ahead = Needs({"batches read ahead": (config.data.prefetch + 1) * rows * (config.data.sequence_length + 1) * 4})
  _check(f"config.data.prefetch={config.data.prefetch}: reading ahead", ahead, host_bytes(), "this machine",
         "lower it, config.data.batch_size or config.data.sequence_length")
  return needs


def check_model_fits(model: ModelConfig, tokens: int = 0) -> None:
  """Holds the parameters of a model, and the residual stream of a forward pass, against one device; see `check_training_fits`."""
  available, name = device_bytes()
  needs = Needs({"parameters": generation_needs(model, 0, 0).parts["parameters"],
                 f"{tokens} tokens": float(tokens * model.width * _BYTES[model.activation_dtype])})
  _check("config.model", needs, available, name, "lower its sizes, or the number of tokens")


def check_generation_fits(model: ModelConfig, rows: int, capacity: int, cache_dtype: str | None = None) -> None:
  """Holds a model and its cache against one device, as `check_training_fits` does; arguments are those of `generation_needs`."""
  available, name = device_bytes()
  _check(f"{rows} rows of {capacity} tokens", generation_needs(model, rows, capacity, cache_dtype), available, name,
         "ask for fewer rows or tokens")


def _check(what: str, needs: Needs, available: float | None, name: str, remedy: str) -> None:
  if available is not None and needs.total > available:
    raise UserError(f"{what} needs at least {shown_bytes(needs.total)} ({needs}), but {name} has {shown_bytes(available)}: "
                    f"{remedy}")


def _layers(model: ModelConfig) -> collections.Counter[str]:
  """How many layers there are of each kind."""
  repeats, rest = divmod(model.num_layers, len(model.block_pattern))
  counts: collections.Counter[str] = collections.Counter()
  for index, kind in enumerate(model.block_pattern):
    counts[kind] += repeats + (index < rest)
  return counts


def shown_bytes(size: float) -> str:
  """A number of bytes in GiB, or in MiB if it is small."""
  return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"

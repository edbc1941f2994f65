"""The one place where an op's implementation is chosen.

An op is a table of implementations in order of preference. A module is imported when its implementation is first
considered, so a CPU run never imports an accelerator's kernels. To add a kernel: write
``KERNEL_MODULE:FUNCTION`` with the op's signature and a ``supports(*args, **kwargs) -> str | None`` beside it (the
reason it cannot serve such a call, or None), and put one `Implementation` line in the op's table.

``implementation="auto"`` takes the first entry allowed on the platform that is computed for whose predicate agrees, and
logs the choice once. A name given explicitly is obeyed or refused with `NotImplementedError`; it never falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib
import logging
from typing import Any

import jax

# Names of what a backward pass would otherwise run a kernel again for.
KERNEL_OUTPUTS = POLAR_ATTENTION, GATED_DELTA, GATED_SHORT_CONV, SUM_AND_NORM = (
  "polar_attention", "gated_delta", "gated_short_conv", "sum_and_norm")
NAMES = ("auto", "reference", "xla", "pallas_gpu", "pallas_tpu")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Implementation:
  """Where an implementation lives and when it may be chosen."""

  target: str  # "module:function"
  platforms: tuple[str, ...] | None = None  # on which "auto" may take it; None is all of them
  supports: str | None = None  # predicate in the same module; None serves every call

  @property
  def function(self) -> Callable[..., Any]:
    module, _, name = self.target.partition(":")
    return getattr(importlib.import_module(module), name)

  def refusal(self, *args, **kwargs) -> str | None:
    """Why this implementation cannot serve the call, or None if it can."""
    if self.supports is None:
      return None
    module, _, _ = self.target.partition(":")
    return getattr(importlib.import_module(module), self.supports)(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Op:
  """A named operation and its implementations, the preferred first."""

  name: str
  implementations: Mapping[str, Implementation]

  def __call__(self, implementation: str, *args, **kwargs) -> Any:
    """Runs the op with `implementation`, one of `NAMES`; raises what `resolve` does."""
    return self.implementations[self.resolve(implementation, *args, **kwargs)].function(*args, **kwargs)

  def resolve(self, implementation: str, *args, **kwargs) -> str:
    """The implementation that serves this call; `args` may be shapes.

    Raises:
      ValueError: `implementation` is not a name.
      NotImplementedError: the implementation named does not exist for this op or cannot serve this call.
    """
    if implementation == "auto":
      return self.choose(*args, **kwargs)
    if implementation not in NAMES:
      raise ValueError(f"{self.name}: implementation={implementation!r} is none of {', '.join(NAMES)}")
    if implementation not in self.implementations:
      raise NotImplementedError(f"{self.name} has no {implementation!r} implementation, only "
                                + ", ".join(self.implementations))
    if (reason := self.implementations[implementation].refusal(*args, **kwargs)) is not None:
      raise NotImplementedError(f"{self.name}: {implementation!r} {reason}")
    return implementation

  def choose(self, *args, **kwargs) -> str:
    """What "auto" means for this call on the platform that is computed for."""
    where = platform()
    for name, entry in self.implementations.items():
      if entry.platforms is not None and where not in entry.platforms:
        continue
      if (reason := entry.refusal(*args, **kwargs)) is None:
        _log_once(f"{self.name}: {name!r} chosen on {where}")
        return name
      _log_once(f"{self.name}: {name!r} passed over: it {reason}")
    raise NotImplementedError(f"{self.name}: no implementation serves this call on {where}")


def fitting_implementation(implementation: str) -> str:
  """What a model's choice means for ops that have implementations of their own, as those on a cache: no kernels, or what fits."""
  return "xla" if implementation in ("reference", "xla") else "auto"


def platform() -> str:
  """Where the program being traced will run: the devices of the mesh in context, else the default backend.

  They differ when a program is compiled for a machine that is not there (`atma_jax.planning.ahead`).
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def device_kind() -> str:
  """What the makers call a device of `platform`, such as ``NVIDIA H200`` or ``TPU v5 lite``."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else jax.devices()[0].device_kind


def undivided() -> bool:
  """Whether a program sees whole arrays of a mesh of several devices, which a kernel cannot be cut into."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(mesh.shape[axis] > 1 for axis in mesh.axis_names if axis not in mesh.manual_axes)


@functools.cache
def _log_once(message: str) -> None:
  _log.info(message)


def check_attention(name: str, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> None:
  """Raises ValueError unless q (B, T, H, D), k and v (B, S, K, D) and the window make a causal attention."""
  (B, T, H, D), (_, S, K, _) = q.shape, k.shape
  if k.shape != (B, S, K, D) or v.shape != k.shape or H % K or T > S:
    raise ValueError(f"{name}: q {q.shape}, k {k.shape}, v {v.shape} are not (B, T, H, D), (B, S, K, D), (B, S, K, D) "
                     "with T <= S and H a multiple of K")
  if window is not None and window < 1:
    raise ValueError(f"{name}: window={window} must be at least 1, or None")

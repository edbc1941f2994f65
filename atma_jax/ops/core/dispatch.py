"""The one place where an op's implementation is chosen.

An op is a table of implementations in order of preference. A module is imported when its implementation is first considered, so
a CPU run never imports an accelerator's kernels. To add a kernel: write ``KERNEL_MODULE:FUNCTION`` with the op's signature and
a ``supports(*args, **kwargs) -> str | None`` beside it (the reason it cannot serve such a call, or None), and put one
`Implementation` line in the op's table.

``"auto"`` takes the first entry allowed on the platform that is computed for whose predicate agrees, and logs the choice once.
Any other name is obeyed or refused with `NotImplementedError`, for every op of a model alike: it never falls back. A model hands
its ``implementation`` to each op that has more than one; where an op has no kernel on purpose, its table says so with
`served_by`: the plain form then is what ``"reference"``, or ``"pallas_tpu"`` on a TPU, means for that op.
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
_DEVICE_OF = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}

LOGGER = __name__  # name of the logger that the choices of "auto" go to
_log = logging.getLogger(LOGGER)


@dataclasses.dataclass(frozen=True)
class Implementation:
  """Where an implementation lives and when it may be chosen."""

  target: str  # "module:function"
  platforms: tuple[str, ...] | None = None  # on which "auto" may take it; None is all of them
  supports: str | None = None  # predicate in the same module; None serves every call
  device: str | None = None  # "gpu" or "tpu", which the program must run on; None leaves that to the predicate

  @property
  def function(self) -> Callable[..., Any]:
    """The implementation, imported now if it has not been."""
    module, _, name = self.target.partition(":")
    return getattr(importlib.import_module(module), name)

  def refusal(self, *args: Any, **kwargs: Any) -> str | None:
    """Why this implementation cannot serve the call, or None if it can."""
    if self.device is not None and platform() != self.device:
      return needs(self.device)
    if self.supports is None:
      return None
    module, _, _ = self.target.partition(":")
    return getattr(importlib.import_module(module), self.supports)(*args, **kwargs)


def served_by(target: str, *names: str) -> dict[str, Implementation]:
  """Table entries for `names` that stand for the plain form at `target`, because no other is wanted under them.

  ``"reference"``: the plain form is simple enough to be the oracle. A kernel's name: on its device XLA's program for the plain
  form is as good, or a kernel has nothing to add; elsewhere the name is refused.
  """
  return {name: Implementation(target, platforms=(), device=_DEVICE_OF.get(name)) for name in names}


@dataclasses.dataclass(frozen=True)
class Op:
  """A named operation and its implementations, the preferred first."""

  name: str
  implementations: Mapping[str, Implementation]

  def __call__(self, implementation: str, *args: Any, **kwargs: Any) -> Any:
    """Runs the op with `implementation`, one of `NAMES`; raises what `resolve` does."""
    return self.implementations[self.resolve(implementation, *args, **kwargs)].function(*args, **kwargs)

  def resolve(self, implementation: str, *args: Any, **kwargs: Any) -> str:
    """Name of the implementation that serves this call; `args` may be shapes.

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

  def choose(self, *args: Any, **kwargs: Any) -> str:
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


def may_run_kernels(implementation: str, device: str) -> bool:
  """Whether a program that runs on `device`, "gpu" or "tpu", is allowed its kernels by an implementation's name."""
  return platform() == device and implementation in ("auto", f"pallas_{device}")


def needs(device: str) -> str:
  """The refusal of a program that runs elsewhere than on `device`, "gpu" or "tpu"."""
  return f"needs a {device.upper()}, and this runs on {platform()}"


def platform() -> str:
  """Where the program being traced will run, "cpu", "gpu" or "tpu": the devices of the mesh in context, else the default backend.

  They differ when a program is compiled for a machine that is not there (`atma_jax.planning.ahead`).
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def device_kind() -> str:
  """The maker's name of the device that the program being traced will run on, such as ``NVIDIA H200`` or ``TPU v5 lite``."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else jax.devices()[0].device_kind


def sees_whole_arrays() -> bool:
  """Whether the program being traced sees whole arrays of a mesh of several devices, where a kernel cannot be partitioned."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(mesh.shape[axis] > 1 for axis in mesh.axis_names if axis not in mesh.manual_axes)


@functools.cache
def _log_once(message: str) -> None:
  _log.info(message)


def check_attention(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """Raises ValueError unless q (B, T, H, D), k and v (B, S, K, D) make a causal attention; `name` is the op's."""
  (B, T, H, D), (_, S, K, _) = q.shape, k.shape
  if k.shape != (B, S, K, D) or v.shape != k.shape or H % K or T > S:
    raise ValueError(f"{name}: q {q.shape}, k {k.shape}, v {v.shape} are not (B, T, H, D), (B, S, K, D), (B, S, K, D) "
                     "with T <= S and H a multiple of K")

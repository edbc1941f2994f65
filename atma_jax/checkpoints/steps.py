"""Reading one step of a checkpoint directory, and finding the newest step that is whole.

A step has three items: ``state`` (arrays), ``data`` (the iterator's state) and ``meta`` (configuration, tokenizer, checksums).
A read verifies a position-dependent checksum of every array, so a truncated or altered step is reported and the one before
it is used.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import re
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from atma_jax import distributed
from atma_jax.errors import UserError

FOLDER = "checkpoints"


class LoadedStep(NamedTuple):
  """What was read of one step.

  Attributes:
    arrays: the restored arrays, a tree.
    rest: whatever else the caller read along with them.
    checksums: the checksum of every array by its path, as stored when the step was written.
  """

  arrays: Any
  rest: Any
  checksums: dict[str, int]


def is_remote(path: str | os.PathLike) -> bool:
  """True for ``gs://...`` and the like, which only Orbax and etils read and write."""
  return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
  """The absolute path, which Orbax insists on; a remote one is absolute already."""
  return epath.Path(path if is_remote(path) else os.path.abspath(path))


def read_json(item: epath.Path) -> dict[str, Any]:
  """The content of an item that was saved as JSON, such as ``STEP/meta``."""
  return dict(ocp.JsonCheckpointHandler().restore(item))


def read_arrays(step: epath.Path, target: Any, *, partial: bool = False) -> Any:
  """The arrays of the item ``state``, without a barrier at the end, which the manager's own `restore` would wait in.

  Args:
    step: the folder of the step.
    target: a tree of `jax.ShapeDtypeStruct` with shardings, or of arrays.
    partial: leave out what is stored and not in `target`.
  """
  arguments = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                                     partial_restore=partial)
  return ocp.PyTreeCheckpointHandler().restore(step / "state", args=arguments)


def newest_good_step(directory: epath.Path, steps: list[int],
                     load: Callable[[epath.Path], LoadedStep]) -> tuple[int, LoadedStep] | None:
  """The first of `steps` that every process can load and whose checksums are right; None without any step.

  Args:
    directory: the folder that holds the steps.
    steps: candidates, the preferred one first; those of process 0 count.
    load: reads one step's folder; it must not wait for another process.

  Raises:
    UserError: none of the steps is good, or `load` raised it.
  """
  steps = json.loads(distributed.from_first(json.dumps(steps)))
  for step in steps:
    loaded, reason = None, ""
    with distributed.agreed():
      try:
        loaded = load(directory / str(step))
      except UserError:
        raise
      except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or a decoder raise
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    reason = next(filter(None, distributed.exchange(reason)), "")
    if loaded is not None and not reason:
      values = checksums(loaded.arrays)
      reason = next((f"checksum of {path} differs" for path, value in values.items() if loaded.checksums.get(path) != value), "")
      if not reason:
        return step, loaded
    if jax.process_index() == 0:
      logging.warning("checkpoint %s is damaged and was passed over: %s", directory / str(step), reason)
  if steps:
    raise UserError(f"{directory}: none of the steps {', '.join(map(str, reversed(steps)))} can be restored")
  return None


def checksums(tree: Any) -> dict[str, int]:
  """A 32-bit checksum of every array by its path: the sum over elements of their bits times an odd weight of the position.

  Computed on the devices that hold the arrays; it does not depend on the sharding.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  values = jax.device_get(_checksums([leaf for _, leaf in flat]))
  return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(flat, values, strict=True)}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
  def checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    weights, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
      weights += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
      stride *= x.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * weights + 1), dtype=jnp.uint32)

  return [checksum(leaf) for leaf in leaves]

"""Reading one step of a checkpoint directory, and finding the newest step that is whole.

A step has three items: ``state`` (arrays), ``data`` (the iterator's state) and ``meta`` (configuration, tokenizer, number of the
step, checksums). A read verifies a position-dependent checksum of every array, and digests of ``data`` and of ``meta`` itself, so
that a truncated, altered or exchanged step is reported and the one before it is used. The first version, which is still read, had
no digests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import logging as std_logging
import os
import re
import sys
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from atma_jax import distributed
from atma_jax.errors import UserError
from atma_jax.json_input import json_digest

FOLDER = "checkpoints"
SCHEMA = 2
_WITHOUT_DIGESTS = {"schema", "config", "tokenizer", "checksums"}  # entries of ``meta`` in version 1


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
  """The absolute path, which Orbax insists on; a remote one is absolute already.

  Raises:
    UserError: the path begins like ``foo://``, of which nothing here knows how to read and write it.
  """
  try:
    return epath.Path(path if is_remote(path) else os.path.abspath(path))
  except (KeyError, ValueError) as error:
    raise UserError(f"{os.fspath(path)}: cannot be used as a directory; legal: a path, or gs://BUCKET/PATH") from error


def make_meta(step: int, config: dict[str, Any], tokenizer: dict[str, Any], arrays: dict[str, int],
              data: dict[str, Any]) -> dict[str, Any]:
  """The content of ``STEP/meta``.

  Args:
    step: the number of the step.
    config: the configuration.
    tokenizer: the tokenizer.
    arrays: the `checksums` of the state.
    data: the content of ``STEP/data``.
  """
  meta = {"schema": SCHEMA, "step": step, "config": config, "tokenizer": tokenizer, "checksums": arrays,
          "data": json_digest(data)}
  return meta | {"digest": json_digest(meta)}


def read_meta(step: epath.Path) -> dict[str, Any]:
  """The content of ``STEP/meta``, whose digest is right. Raises an error of any kind if it is damaged or of another step."""
  meta = _read_json(step / "meta")
  if meta.get("schema") == 1 and meta.keys() == _WITHOUT_DIGESTS:
    _say_once(step.parent)
    return meta
  if meta.get("schema") != SCHEMA or meta.pop("digest", None) != json_digest(meta):
    raise ValueError("the digest of its meta differs")
  if str(meta["step"]) != step.name:
    raise ValueError(f"its meta is of step {meta['step']}")
  return meta


def read_data(step: epath.Path, meta: dict[str, Any]) -> dict[str, Any]:
  """The content of ``STEP/data``, whose digest is the one in `meta`. Raises an error of any kind if it is damaged."""
  data = _read_json(step / "data")
  if "data" in meta and meta["data"] != json_digest(data):
    raise ValueError("the digest of its data differs")
  return data


def _read_json(item: epath.Path) -> dict[str, Any]:
  return dict(ocp.JsonCheckpointHandler().restore(item))


@functools.cache
def _say_once(directory: epath.Path) -> None:
  if jax.process_index() == 0:
    logging.warning("%s holds steps of an older version: their arrays have checksums, but configuration, tokenizer and position "
                    "in the data have none and are taken as they are", directory)


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
    with distributed.agreed(), _quietly():
      try:
        loaded = load(directory / str(step))
      except UserError:
        raise
      except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or a decoder raise
        if _is_of_this_machine(error):
          raise
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


def without_traceback(record: std_logging.LogRecord) -> bool:
  """A filter that takes the traceback off what Orbax logs about a read or a write that failed; ours is one line."""
  if "/orbax/" in record.pathname:
    record.exc_info = record.exc_text = None
  return True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Keeps the tracebacks of a failed read out of the log: Orbax's own, and those of reads that end after it has given up."""
  logger, hook = logging.get_absl_logger(), sys.unraisablehook

  def unraisable(raised: sys.UnraisableHookArgs) -> None:
    if str(raised.exc_value) != "Event loop is closed":
      hook(raised)

  known = without_traceback in logger.filters
  logger.addFilter(without_traceback)
  sys.unraisablehook = unraisable
  try:
    yield
  finally:
    sys.unraisablehook = hook
    if not known:
      logger.removeFilter(without_traceback)


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


def _is_of_this_machine(error: Exception) -> bool:
  """Whether an error speaks of the installation or of a device's free memory, and not of the file that was read."""
  return isinstance(error, ImportError) or (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))

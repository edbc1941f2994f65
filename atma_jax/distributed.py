"""Several processes as one JAX program: `jax.distributed`, from flags (`atma_jax.distributed_flags`) or the environment.

These are looked at in order; if none applies, the process stays alone:

1. the flags --coordinator_address, --num_processes and --process_id;
2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the same three as environment variables;
3. --distributed=cloud_tpu: the metadata server of Cloud TPU VMs, slices included;
4. GKE: TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, and MEGASCALE_NUM_SLICES, which are set for TPU pods;
5. Slurm: the variables that srun sets, if its step has several tasks, one for each GPU.

Heartbeats reveal a process that dies: after --heartbeat_seconds without one (at once, if process 0 died) the others end with a
message instead of waiting in a collective for ever. A process that ends alone, with an error that the others do not share, waits
for them as long, and then all end. A process whose peers do not appear within `START_SECONDS` ends too. In each case jaxlib
aborts (exit code 134), so that a launcher tries again. Errors that a single process may meet, such as a directory that only this
process cannot read, go through `agreed`, so that all processes end with the same message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import os
import sys
from typing import Any

from absl import logging
import jax
from jax._src.distributed import global_state  # its key-value store has no public name; Orbax takes it from here too

from atma_jax.config import HEARTBEAT_SECONDS
from atma_jax.errors import RunError, UserError, described

START_SECONDS = 300
_AGREE_MILLISECONDS = 7 * 24 * 3_600_000  # process 0 may prepare data for long; if a process dies, the wait ends anyway

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def initialize(mode: str = "auto", coordinator_address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
  """Joins this process to the others, if there are any, and returns when all have joined.

  Args:
    mode: "auto" looks at the arguments, then at the environment; "cloud_tpu" asks the metadata server; "off" stays alone.
    coordinator_address: HOST:PORT on which process 0 listens.
    num_processes: the number of processes.
    process_id: the index of this process.
    heartbeat_seconds: how long another process may be silent before this one ends.

  Raises:
    UserError: some but not all of the three, or values that do not fit; the message names the flag or variable.
    SystemExit: the cluster cannot be found; exit code 1, so that a launcher tries again.
  """
  explicit: dict[str, str | int | None] = {
    "--coordinator_address": coordinator_address, "--num_processes": num_processes, "--process_id": process_id}
  given = [name for name, value in explicit.items() if value is not None]
  if mode != "auto" and given:
    raise UserError(f"{given[0]}: not together with --distributed={mode}")
  if mode == "off":
    return
  if mode == "cloud_tpu":
    options: dict[str, Any] | None = {"cluster_detection_method": "gcetpu"}
  elif given:
    options = _checked(explicit)
  else:
    options = from_environment(os.environ)
  if options is None:
    return
  try:
    jax.distributed.initialize(
      initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=heartbeat_seconds, **options)
  except (ImportError, OSError, RuntimeError, ValueError) as error:
    print("error: the processes cannot find each other:", " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(1) from error
  logging.info("process %d of %d", jax.process_index(), jax.process_count())
  if jax.process_index():
    logging.set_verbosity(logging.WARNING)  # process 0 logs what all of them do


_rounds = itertools.count()


def exchange(message: str) -> list[str]:
  """Exchanges a message with all processes, and returns theirs by process index.

  A barrier: it returns once every process has called it, so that all processes must call it equally often.
  """
  if jax.process_count() == 1:
    return [message]
  client, number = global_state.client, next(_rounds)
  assert client is not None, "several processes have joined"
  client.key_value_set(f"atma_jax/{number}/{jax.process_index():08}", message)
  client.wait_at_barrier(f"atma_jax/{number}", _AGREE_MILLISECONDS)
  if jax.process_index() == 0 and number:
    client.key_value_delete(f"atma_jax/{number - 1}/")  # every process that has come to this round has read the one before
  return [text for _, text in sorted(client.key_value_dir_get(f"atma_jax/{number}/"))]


def from_first(message: str) -> str:
  """The message of process 0; a barrier, as `exchange`."""
  return exchange(message)[0]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
  """A block that each process runs by itself, and that either all processes leave or all processes raise in.

  An error of this process is raised as it is. An error of another process is raised as `UserError` if it was one, otherwise as
  `RunError`. Nothing in the block may wait for another process.
  """
  own = None
  try:
    yield
  except Exception as error:
    own = error
  message = "" if own is None else f"{'input' if isinstance(own, UserError) else 'run'} {own or type(own).__name__}"
  messages = exchange(message)
  if own is not None:
    raise own
  for index, other in enumerate(messages):
    if other:
      kind, _, text = other.partition(" ")
      raise (UserError if kind == "input" else RunError)(f"process {index}: {text}")


def attempt(work: Callable[[], object]) -> str:
  """Runs `work` in every process, and returns what went wrong in which of them.

  Unlike `agreed`, it lets the program go on after any exception. `work` may wait for other processes if it gives up in time.

  Returns:
    One line; "" if `work` succeeded in all processes.
  """
  message = ""
  try:
    work()
  except Exception as error:
    message = described(error)
  messages = exchange(message)
  if len(messages) == 1:
    return messages[0]
  return "; ".join(f"process {index}: {text}" for index, text in enumerate(messages) if text)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """The arguments for `jax.distributed.initialize` that the environment asks for; None if it describes a single process.

  Raises:
    UserError: some but not all of the variables of a cluster, or values that do not fit.
  """
  if any(name in environ for name in VARIABLES):
    return _checked({name: environ.get(name) for name in VARIABLES})
  several = any("," in environ.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
  if several or _number(environ, "MEGASCALE_NUM_SLICES", default=1) > 1:
    return {"cluster_detection_method": "gketpu"}
  if all(name in environ for name in _SLURM_STEP) and _number(environ, "SLURM_NTASKS") > 1:
    return {"cluster_detection_method": "slurm"}
  return None


def _checked(values: Mapping[str, str | int | None]) -> dict[str, Any]:
  """The arguments for `jax.distributed.initialize`, from address, count and index, in that order, as the user named them."""
  missing = [name for name, value in values.items() if value is None]
  if missing:
    raise UserError(f"{missing[0]} is required: {', '.join(values)} go together")
  address, count, index = values
  host, _, port = str(values[address]).rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise UserError(f"{address}={values[address]}: must be HOST:PORT")
  number, which = _number(values, count), _number(values, index)
  if number < 1:
    raise UserError(f"{count}={number}: must be 1 or more")
  if which >= number:
    raise UserError(f"{index}={which}: must be less than {count}={number}")
  return {"coordinator_address": values[address], "num_processes": number, "process_id": which}


def _number(values: Mapping[str, str | int | None], name: str, default: int | None = None) -> int:
  if default is not None and name not in values:
    return default
  text = str(values[name])
  if not text.isdigit():
    raise UserError(f"{name}={text}: must be a whole number")
  return int(text)

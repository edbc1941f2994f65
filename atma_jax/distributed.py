"""Several processes as one JAX program: `jax.distributed`, initialised from the environment or from flags.

What is looked at, in this order; without any of it the process stays alone:

1. the flags --coordinator_address, --num_processes and --process_id;
2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the same three as environment variables;
3. --distributed=cloud_tpu: the metadata server of Cloud TPU VMs, slices included;
4. GKE: TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, and MEGASCALE_NUM_SLICES, which are set for TPU pods;
5. Slurm: the variables that srun sets, where its step has several tasks, one for each GPU.

A process that dies is noticed through its missing heartbeats: after --heartbeat_seconds the others end with a message
instead of waiting in a collective for ever; at once where it was process 0. One that ends alone, with an error that the
others do not share, waits as long for them, then all end. One whose peers do not appear within `START_SECONDS` ends too. In
each case jaxlib aborts (exit code 134), so that a launcher tries again. What one process can find out alone, such as a
directory that only it cannot read, goes through `agreed`: then all end with that message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import os
import sys

from absl import flags, logging
import jax
from jax._src.distributed import global_state  # its key-value store has no public name; Orbax takes it from here too

from atma_jax.errors import RunError, UserError

HEARTBEAT_SECONDS = 100
START_SECONDS = 300
_AGREE_MILLISECONDS = 7 * 24 * 3_600_000  # preparing data may take long; a process that dies meanwhile ends the wait
MODES = ("auto", "cloud_tpu", "off")

flags.disclaim_key_flags()  # --help lists them among the flags of the main that defines them

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class DistributedFlags:
  """The five flags; `initialize()` acts on them and must come before anything that touches a device."""

  def __init__(self) -> None:
    self._mode = flags.DEFINE_enum(
      "distributed", "auto", MODES, "Several processes: as the environment says, by Cloud TPU VM metadata, or not.")
    self._address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same for all.")
    self._count = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
    self._id = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
    self._heartbeat = flags.DEFINE_integer(
      "heartbeat_seconds", HEARTBEAT_SECONDS, "A process not heard of for so long is dead, and the others end.", lower_bound=1)

  def initialize(self) -> None:
    """See `initialize`."""
    initialize(self._mode.value, self._address.value, self._count.value, self._id.value, self._heartbeat.value)

  @property
  def first(self) -> bool:
    """True in the process that writes what all have found out."""
    return jax.process_index() == 0


def initialize(mode: str = "auto", coordinator_address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
  """Joins this process to the others, if there are any; returns when all have joined.

  Args:
    mode: "auto" looks at the arguments, then at the environment; "cloud_tpu" asks the metadata server; "off": alone.
    coordinator_address: HOST:PORT on which process 0 listens.
    num_processes: how many processes there are.
    process_id: which one this is.
    heartbeat_seconds: how long another process may be silent before this one ends.

  Raises:
    UserError: some but not all of the three, or values that do not fit; the message names the flag or variable.
    SystemExit: there is no such cluster around this process; exit code 1, so that a launcher tries again.
  """
  explicit = dict(zip(("--coordinator_address", "--num_processes", "--process_id"),
                      (coordinator_address, num_processes, process_id)))
  given = [name for name, value in explicit.items() if value is not None]
  if mode != "auto" and given:
    raise UserError(f"{given[0]}: not together with --distributed={mode}")
  if mode == "off":
    return
  if mode == "cloud_tpu":
    options = {"cluster_detection_method": "gcetpu"}
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
    logging.set_verbosity(logging.WARNING)  # process 0 tells what all do


_rounds = itertools.count()


def exchange(message: str) -> list[str]:
  """What every process said, by index. Each must call this as often as the others; it returns when all have."""
  if jax.process_count() == 1:
    return [message]
  client, number = global_state.client, next(_rounds)
  client.key_value_set(f"atma_jax/{number}/{jax.process_index():08}", message)
  client.wait_at_barrier(f"atma_jax/{number}", _AGREE_MILLISECONDS)
  if jax.process_index() == 0 and number:
    client.key_value_delete(f"atma_jax/{number - 1}/")  # every process has read it: it came to this round
  return [said for _, said in sorted(client.key_value_dir_get(f"atma_jax/{number}/"))]


def from_first(message: str) -> str:
  """What process 0 said."""
  return exchange(message)[0]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
  """Work that each process does by itself and in which one alone may fail: all leave the block, or all raise.

  An error of this process comes out as it is; one of another as `UserError` where it was one, else as `RunError`.
  Nothing in the block may wait for another process.
  """
  own = None
  try:
    yield
  except Exception as error:
    own = error
  said = "" if own is None else f"{'input' if isinstance(own, UserError) else 'run'} {own or type(own).__name__}"
  heard = exchange(said)
  if own is not None:
    raise own
  for index, other in enumerate(heard):
    if other:
      kind, _, text = other.partition(" ")
      raise (UserError if kind == "input" else RunError)(f"process {index}: {text}")


def attempt(work: Callable[[], object]) -> str:
  """Runs `work` in every process: "" where it succeeded in all, else one line that says what went wrong where.

  Unlike with `agreed` the program goes on, so any exception counts; `work` may wait for others if it gives up in time.
  """
  said = ""
  try:
    work()
  except Exception as error:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
  heard = exchange(said)
  if len(heard) == 1:
    return heard[0]
  return "; ".join(f"process {index}: {text}" for index, text in enumerate(heard) if text)


def from_environment(environ: Mapping[str, str]) -> dict[str, str | int] | None:
  """What `jax.distributed.initialize` needs to be told, or None where the environment speaks of one process only."""
  if any(name in environ for name in _VARIABLES):
    return _checked({name: environ.get(name) for name in _VARIABLES})
  several = any("," in environ.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
  if several or _number(environ, "MEGASCALE_NUM_SLICES", absent=1) > 1:
    return {"cluster_detection_method": "gketpu"}
  if all(name in environ for name in _SLURM_STEP) and _number(environ, "SLURM_NTASKS") > 1:
    return {"cluster_detection_method": "slurm"}
  return None


def _checked(values: dict[str, str | int | None]) -> dict[str, str | int]:
  """Address, count and index under the names of `jax.distributed.initialize`; `values` is in that order."""
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


def _number(values: Mapping[str, str | int], name: str, absent: int | None = None) -> int:
  if absent is not None and name not in values:
    return absent
  if not str(values[name]).isdigit():
    raise UserError(f"{name}={values[name]}: must be a whole number")
  return int(values[name])

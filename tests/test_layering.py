"""The rules of the house, read off the syntax trees: layers, file names, docstrings, annotations, private names."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "atma_jax"

MAINS = ("ablate", "benchmark", "compile_ahead", "convert", "evaluate", "fetch_data", "generate", "lm_eval", "prepare_data",
         "scaling", "serve", "train")
ORDER = (  # a unit, that is a folder or module right under atma_jax, imports only from lines above its own, and from itself
  ("__init__", "console_scripts", "errors"),
  ("config", "json_input"),
  ("recipe_files",),
  ("claims", "compilation_cache", "dataclass_flags", "distributed", "memory_needs", "ops", "progress", "sharding"),
  ("data", "distributed_flags", "models"),
  ("pytorch",),
  ("checkpoints",),
  ("inference", "training"),
  ("planning", "serving"),
  ("evaluation",),
  ("ablation", "benchmarks"),
  ("cli",),
  MAINS,
)
LAYERS = {unit: layer for layer, units in enumerate(ORDER) for unit in units}
STANDARD_LIBRARY_ONLY = ("__init__", "config", "console_scripts", "errors", "json_input", "recipe_files")
OPS_THIRD_PARTY = {"jax", "jaxlib", "jaxtyping", "numpy"}
MAIN_LINES = 80
FILE_LINES = 600
SHARED_NAMES = {"__init__", "api", "formula", "pallas_gpu", "pallas_tpu", "reference", "spec", "xla"}  # that recur in every op
RIDDLES = re.compile(r"(The same of|Those of|Of an? |A \w+ a \w+)")  # openings of docstrings that have to be read twice
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace"}  # of named tuples and of `os`, public in spite of their names
TOP_LEVEL = {"LICENSE", "README.md", "atma_jax", "configs", "launch", "pyproject.toml", "tests"}

FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


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
      target = "__init__" if target.startswith("__") else target  # such as __version__
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


def files_of(unit: str) -> list[pathlib.Path]:
  """The files of a folder or module right under atma_jax."""
  return [path for path in FILES if unit_of(path) == unit]


def test_no_file_name_twice():
  """A file is found by its name; only the parts that every op has are named alike."""
  folders: dict[str, list[str]] = {}
  for path in FILES:
    folders.setdefault(path.stem, []).append(str(path.relative_to(PACKAGE)))
  assert {name: paths for name, paths in folders.items() if len(paths) > 1 and name not in SHARED_NAMES} == {}


def riddles(source: str) -> list[str]:
  """First lines of the docstrings that open with one of `RIDDLES`."""
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
  return [text.partition("\n")[0] for text in docstrings if RIDDLES.match(text)]


@pytest.mark.parametrize("unit", LAYERS)
def test_docstrings_say_what_a_thing_does(unit):
  """Plain sentences, not fragments that lean on something else."""
  found = {str(path.relative_to(PACKAGE)): riddles(path.read_text()) for path in files_of(unit)}
  assert {name: lines for name, lines in found.items() if lines} == {}


def bare_parameters(source: str) -> list[str]:
  """Parameters without an annotation, as ``line function(parameter)``; `self` and `cls` of methods need none."""
  tree, methods = ast.parse(source), set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef):
      methods |= {function for function in node.body if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
                  and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)}
  found = []
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      parameters = [*node.args.posonlyargs, *node.args.args][node in methods:]
      parameters += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
      found += [f"{node.lineno} {node.name}({parameter.arg})" for parameter in parameters if parameter.annotation is None]
  return found


@pytest.mark.parametrize("unit", LAYERS)
def test_every_parameter_is_annotated(unit):
  """Those of kernels too."""
  found = {str(path.relative_to(PACKAGE)): bare_parameters(path.read_text()) for path in files_of(unit)}
  assert {name: parameters for name, parameters in found.items() if parameters} == {}


def is_private(name: str) -> bool:
  return name.startswith("_") and not name.endswith("__") and name not in PUBLIC


def defined_names(tree: ast.AST) -> set[str]:
  """Every name that a file gives to a function, class, variable or attribute."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      names.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      names.add(node.id)
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
      names.add(node.attr)
  return names


def foreign_private_names(source: str) -> list[str]:
  """Private names of other modules that a file reads, as ``line expression``."""
  tree = ast.parse(source)
  own, found = defined_names(tree), []
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
      if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
        found.append(f"{node.lineno} {ast.unparse(node)}")
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atma_jax"):
      found += [f"{node.lineno} {node.module}.{alias.name}" for alias in node.names if is_private(alias.name)]
  return found


@pytest.mark.parametrize("unit", LAYERS)
def test_private_names_stay_in_their_file(unit):
  """What another file needs is public."""
  found = {str(path.relative_to(PACKAGE)): foreign_private_names(path.read_text()) for path in files_of(unit)}
  assert {name: names for name, names in found.items() if names} == {}


def private_names_tested(source: str) -> list[str]:
  """Private names of atma_jax that a test reads, as ``line expression``."""
  tree = ast.parse(source)
  imported = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
              and (node.module or "").startswith("atma_jax") for alias in node.names}
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and is_private(node.attr):
      owner = node.value
      while isinstance(owner, ast.Attribute):
        owner = owner.value
      if isinstance(owner, ast.Name) and owner.id in imported:
        found.append(f"{node.lineno} {ast.unparse(node)}")
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atma_jax"):
      found += [f"{node.lineno} {node.module}.{alias.name}" for alias in node.names if is_private(alias.name)]
  return found


def test_tests_read_public_names():
  """What is tested is public."""
  found = {str(path.relative_to(REPOSITORY)): private_names_tested(path.read_text()) for path in TESTS}
  assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(("check", "source", "found"), [
  (riddles, 'def f():\n  """The same of a sum."""', ["The same of a sum."]),
  (riddles, '"""A row a checkpoint and measure."""', ["A row a checkpoint and measure."]),
  (riddles, '"""A table with a row per checkpoint."""', []),
  (bare_parameters, "def f(x, *y, z=1, **w: int): pass", ["1 f(x)", "1 f(z)", "1 f(y)"]),
  (bare_parameters, "class A:\n  def f(self, x: int): pass\n  @staticmethod\n  def g(y): pass", ["4 g(y)"]),
  (foreign_private_names, "def f(self):\n  self._x = other._x", []),
  (foreign_private_names, "other._x\nself._y\npoint._replace(x=1)\nx.__doc__", ["1 other._x"]),
  (foreign_private_names, "from atma_jax.ops import _f", ["1 atma_jax.ops._f"]),
  (private_names_tested, "from atma_jax.training import loop\nloop.Loop._save\nstep._cache_size()", ["2 loop.Loop._save"]),
])
def test_the_checks_themselves(check, source, found):
  """Each finds what it looks for, and nothing else."""
  assert check(source) == found


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

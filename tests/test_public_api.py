"""What ``import atma_jax`` gives: names, laziness, complete help, and functions that no submodule hides."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import atma_jax
from atma_jax.checkpoints.load import load_model
from atma_jax.checkpoints.store import save_model
from atma_jax.config import Config, DataConfig, ModelConfig
from atma_jax.data.prepare import prepare
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
NAMES = ["Atma", "Config", "evaluate", "gated_delta", "generate", "language_model_loss", "load_model", "load_pytorch",
         "polar_attention", "register_mixer", "save_model"]
# Runs each script in a child of a process that has the libraries, and nothing of atma_jax, imported.
IN_FRESH_PACKAGES = """
import os, sys
import absl.flags, flax.nnx, grain, jax, matplotlib.pyplot, optax, orbax.checkpoint
for script in sys.argv[1:]:
  child = os.fork()
  if not child:
    try:
      exec(script, {})
      os._exit(0)
    except BaseException:
      import traceback
      traceback.print_exc()
      os._exit(1)
  if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
    sys.exit("failed: " + script)
"""


CONFIG = Config(
  name="small",
  model=ModelConfig(vocab_size=272, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
                    block_pattern=("local", "global"), activation_dtype="float32"),
  data=DataConfig(tokenizer="bytes", sequence_length=64, batch_size=2, validation_documents=8, heldout_documents=8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The working directory of a small model, beside the data it was to be trained on."""
  corpus, workdir = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("trained")
  for i in range(40):
    (corpus / f"{i:02}.txt").write_text(f"Document {i}. " + "The quick brown fox jumps over the lazy dog. " * (8 + i))
  data = dataclasses.replace(CONFIG.data, sources=(f"text:{corpus}/*.txt",), directory=str(workdir / "data"))
  prepare(data, data.directory, workers=1)
  save_model(workdir, dataclasses.replace(CONFIG, data=data), Atma(CONFIG.model, rngs=nnx.Rngs(0)), ByteTokenizer(), 1)
  return workdir


def test_names():
  """The public names are those of the contract, and `dir` shows them before any is used."""
  assert sorted(atma_jax.__all__) == sorted([*NAMES, "__version__"])
  assert set(atma_jax.__all__) <= set(dir(atma_jax))
  for name in NAMES:
    value = getattr(atma_jax, name)
    assert callable(value)
    assert value.__name__ == name
  with pytest.raises(AttributeError, match="module 'atma_jax' has no attribute 'polar_atention'"):
    _ = atma_jax.polar_atention


def test_importing_is_light():
  """`import atma_jax` loads the standard library alone, however often names are listed."""
  code = ("import sys; before = set(sys.modules); import atma_jax; dir(atma_jax); atma_jax.__version__; "
          "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))")
  done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["atma_jax"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_a_command_never_hides_the_function_of_its_name(name):
  """In every order of imports `atma_jax.NAME` is the function, and the module of that name can still be had."""
  is_function = f"assert type(atma_jax.{name}).__name__ == 'function', atma_jax.{name}\n"
  orders = [
    f"import atma_jax\n{is_function}import atma_jax.{name}\n{is_function}",
    f"import atma_jax.{name}\n{is_function}",
    f"import atma_jax.{name}\nfrom atma_jax import {name}\nimport atma_jax\nassert {name} is atma_jax.{name}\n{is_function}",
    f"from atma_jax import {name}\nimport atma_jax.{name}\nassert {name} is atma_jax.{name}\n{is_function}",
    f"from atma_jax.{name} import main\nimport atma_jax\n{is_function}assert main.__module__ == 'atma_jax.{name}'",
    f"import atma_jax.{ {'generate': 'inference', 'evaluate': 'evaluation'}[name]}.api\nimport atma_jax\n{is_function}",
    f"import importlib\nmain = importlib.import_module('atma_jax.{name}').main\nimport atma_jax\n{is_function}",
    f"import runpy, sys\nsys.argv[1:] = []\ntry:\n  runpy.run_module('atma_jax.{name}', run_name='__main__', alter_sys=True)\n"
    f"except SystemExit as end:\n  assert end.code == 2\nimport atma_jax\n{is_function}",
  ]
  done = subprocess.run([sys.executable, "-c", IN_FRESH_PACKAGES, *orders], cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_the_commands_still_run(main, name):
  """`python -m atma_jax.NAME` is the command."""
  done = main(name)
  assert done.returncode == 2
  assert done.stderr.startswith("error: --")


def test_the_package_can_be_patched(monkeypatch):
  """Only the import system is kept from replacing a function; a test or a user may."""
  monkeypatch.setattr(atma_jax, "generate", len)
  assert atma_jax.generate([1, 2]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_help_is_complete(name):
  """`help` of each name describes every argument, what comes back, what is raised, and how it is called."""
  value = getattr(atma_jax, name)
  text = inspect.cleandoc(value.__doc__)
  for section in ("Attributes:", "Example:") if inspect.isclass(value) else ("Args:", "Returns:", "Raises:", "Example:"):
    assert f"\n{section}\n" in text, section
  if inspect.isclass(value):
    return
  described = text[text.index("Args:"):text.index("Returns:")]
  for argument in inspect.signature(value).parameters:
    assert re.search(rf"^\s+[\w*, ]*\b{argument}\b[\w*, ]*:", described, flags=re.MULTILINE), argument


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("evaluate", "generate"))) for n in NAMES])
def test_the_examples_run(name, trained, golden, tmp_path):
  """The examples in the help, with a small model in the place of the quickstart's and of the published one."""
  names = {"atma_jax": atma_jax, "jax": jax, "jnp": jnp, "nnx": nnx, **{n: getattr(atma_jax, n) for n in NAMES},
           "Config": lambda: copy.deepcopy(CONFIG)}
  examples = doctest.DocTestParser().get_examples(getattr(atma_jax, name).__doc__)
  assert examples
  for example in examples:
    source = example.source.replace("runs/quickstart", str(trained)).replace("runs/needles", str(tmp_path)).replace(
      "published/atma_378m", str(golden.folder / "checkpoint_polar_mem1_win0"))
    if example.want:
      assert repr(eval(source, names)) == example.want.strip()
    else:
      exec(source, names)


def test_version():
  """One literal, which the build and the citation take."""
  assert re.fullmatch(r"\d+\.\d+\.\d+", atma_jax.__version__)
  project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
  assert project["project"]["dynamic"] == ["version"]
  assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "atma_jax.__version__"}
  assert f"version: {atma_jax.__version__}\n" in (REPOSITORY / ".github" / "CITATION.cff").read_text()
  assert importlib.metadata.version("atma_jax") == atma_jax.__version__


@pytest.mark.slow
def test_generate(trained):
  """A directory and a loaded model give what the engine gives; one prompt gives a text, several a list."""
  _, model, tokenizer, _ = load_model(trained)
  sampling = Sampling(max_tokens=8, seed=3, ignore_end=True)
  engine = Engine(model, tokenizer, rows=2, capacity=64)
  expected = [engine.generate([prompt], Sampling(max_tokens=8, seed=3 + i, ignore_end=True))[0].text
              for i, prompt in enumerate(("The quick", "Document 7"))]
  options = {"max_tokens": sampling.max_tokens, "seed": sampling.seed, "ignore_end": True}
  assert atma_jax.generate(trained, ["The quick", "Document 7"], **options) == expected
  assert atma_jax.generate(model, "The quick", tokenizer=tokenizer, **options) == expected[0]
  assert atma_jax.generate(model, [], tokenizer=tokenizer) == []
  stop = expected[0][3]
  assert atma_jax.generate(model, "The quick", tokenizer=tokenizer, stop=stop, **options) == expected[0][:expected[0].index(stop)]


def test_generate_says_what_is_wrong(trained):
  """One line that names the argument."""
  with pytest.raises(UserError, match="temperature=-1"):
    atma_jax.generate(trained, "x", temperature=-1)
  with pytest.raises(TypeError, match="temprature"):
    atma_jax.generate(trained, "x", temprature=0)
  with pytest.raises(ValueError, match="tokenizer=None"):
    atma_jax.generate(load_model(trained)[1], "x")
  with pytest.raises(UserError, match="no such directory"):
    atma_jax.generate(trained / "absent", "x")


@pytest.mark.slow
def test_evaluate(trained, tmp_path):
  """Options of the evaluation and of a suite go by name; lists and single suites are taken; numbers are written down, too."""
  records = atma_jax.evaluate(trained, tmp_path, suite="needle", multiples=[1, 2], trials=3)
  accuracy = {record["length"]: record for record in records if record["measure"] == "needle_accuracy"}
  assert accuracy.keys() == {64, 128}
  assert all(record["n"] == 15 and 0 <= record["value"] <= 1 for record in accuracy.values())
  assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(records)


def test_evaluate_says_what_is_wrong(trained, tmp_path):
  """One line that names the option."""
  for options, said in (({"trails": 3}, "trails"), ({"trials": 0}, "--trials=0"), ({"suite": "neddle"}, "neddle")):
    with pytest.raises(UserError, match=said):
      atma_jax.evaluate(trained, tmp_path, **options)


@pytest.mark.slow
def test_the_readme_runs(trained, tmp_path, capsys):
  """The Python of the first page, with a model of one step in the place of the quickstart's."""
  (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
  assert len(block.splitlines()) <= 12
  code = block.replace("runs/quickstart", str(trained)).replace("runs/needles", str(tmp_path / "needles"))
  assert code != block
  exec(compile(textwrap.dedent(code), "README.md", "exec"), {})
  assert capsys.readouterr().out

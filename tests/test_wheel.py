"""The package as it is built and installed: in a folder of its own, away from the repository, it has recipes and commands."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
RECIPES = "atma_jax.recipes"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_every_package_is_listed():
  """What has an ``__init__.py`` is shipped, and the recipes are."""
  found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in (REPOSITORY / "atma_jax").rglob("__init__.py")}
  options = PYPROJECT["tool"]["setuptools"]
  assert options["packages"] == sorted(found | {RECIPES})
  assert options["package-dir"] == {RECIPES: "configs"}


def test_every_main_is_a_command():
  """``atma-NAME`` runs ``python -m atma_jax.NAME`` for each main."""
  mains = [path.stem for path in (REPOSITORY / "atma_jax").glob("*.py") if 'if __name__ == "__main__":' in path.read_text()]
  assert PYPROJECT["project"]["scripts"] == {f"atma-{name.replace('_', '-')}": f"atma_jax.console_scripts:{name}"
                                             for name in sorted(mains)}


def test_the_citation_names_the_same_authors():
  citation = (REPOSITORY / ".github" / "CITATION.cff").read_text()
  assert all(f"name: {author['name']}\n" in citation for author in PYPROJECT["project"]["authors"])


@pytest.mark.parametrize(("image", "extra"), [("cuda", []), ("tpu", PYPROJECT["project"]["optional-dependencies"]["tpu"])])
def test_images_install_what_the_package_needs(tmp_path, image, extra):
  """The layer of an image that precedes the code reads the dependencies from pyproject.toml."""
  lines = re.sub(r"\\\n\s*", "", (REPOSITORY / "launch" / f"Dockerfile.{image}").read_text()).splitlines()
  (command,) = (line.removeprefix("RUN ").partition(" && pip install")[0] for line in lines if line.startswith("RUN python -c"))
  shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
  path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
  subprocess.run(["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
  assert (tmp_path / "requirements.txt").read_text().splitlines() == [*PYPROJECT["project"]["dependencies"], *extra]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with the wheel of this repository installed, without its dependencies."""
  folder = tmp_path_factory.mktemp("wheel")
  source, site = folder / "source", folder / "site"
  source.mkdir()
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(REPOSITORY / name, source)
  for name in ("atma_jax", "configs"):
    shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, check=True, capture_output=True, text=True)
  (wheel,) = folder.glob("*.whl")
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
                  "--no-compile", f"--target={site}", str(wheel)], check=True, capture_output=True, text=True)
  shutil.rmtree(source)
  return site


def run(site: pathlib.Path, folder: pathlib.Path, *command: str) -> subprocess.CompletedProcess[str]:
  """Runs a command in `folder` with the installed package before all others."""
  environ = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
  return subprocess.run(command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def test_recipes_travel_with_the_package(installed, tmp_path):
  """By name, from the console script, in an empty folder; results of experiments stay at home."""
  assert sorted(path.name for path in (installed / "atma_jax" / "recipes").glob("*")) == sorted(
    path.name for path in (REPOSITORY / "configs").glob("*.py"))
  where = run(installed, tmp_path, sys.executable, "-c", "import atma_jax; print(atma_jax.__file__)")
  assert pathlib.Path(where.stdout.strip()) == installed / "atma_jax" / "__init__.py"
  done = run(installed, tmp_path, str(installed / "bin" / "atma-train"), "--config=atma_378m_nope", "--print_config")
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["model"]["attention"] == "nope"
  (tmp_path / "mine.json").write_text(done.stdout)
  again = run(installed, tmp_path, sys.executable, "-m", "atma_jax.train", "--config=mine.json", "--print_config")
  assert again.stdout == done.stdout
  assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_commands_speak_as_mains_do(installed, tmp_path):
  """The same flags in --help, the same exit code and line for bad input."""
  script, module = [str(installed / "bin" / "atma-prepare-data")], [sys.executable, "-m", "atma_jax.prepare_data"]
  for arguments in (["--help"], ["--config=quickstrt"]):
    one, other = (run(installed, tmp_path, *command, *arguments) for command in (script, module))
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
  assert "--config.model.width" in run(installed, tmp_path, *script, "--help").stdout

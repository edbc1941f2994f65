"""The pages that people read: short where they must be, links that lead somewhere, tables that are computed, flags that exist."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", "launch/README.md", "configs/results/README.md", "atma_jax/ops/README.md", "atma_jax/benchmarks/README.md",
         ".github/CONTRIBUTING.md", ".github/CHANGELOG.md"]
WORDS_OF_THE_FIRST_PAGE = 900
MACHINE = re.compile(r"(?<![\w.])/(home|root|work|Users|usr|opt)/|pypi|registry\.|localhost|api_key|token=", re.IGNORECASE)


def commands() -> dict[str, set[str]]:
  """The flags that the pages and recipes give to each ``python -m atma_jax.NAME``."""
  found: dict[str, set[str]] = {}
  paths = [*(REPOSITORY / page for page in PAGES), *(REPOSITORY / "configs").glob("*.py")]
  for path in paths:
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    for name, line in re.findall(r"python -m atma_jax\.(\w+)([^\n`]*)", text):
      found.setdefault(name, set()).update(re.findall(r"(?<![\w=-])--([a-z][\w.]*)", line.partition(" #")[0]))
  return found


def test_every_flag_in_the_pages_exists(main):
  """Every command of the pages is a main, and every flag in it one of its flags."""
  for name, flags in commands().items():
    if name == "lm_eval":  # the harness's own command line
      continue
    legal = set(re.findall(r"^\s*-{1,2}(?:\[no\])?([a-z][\w.]*)", main(name, "--helpfull").stdout, flags=re.MULTILINE))
    assert flags <= legal | {"help"}, (name, flags - legal)


@pytest.mark.parametrize("path", PAGES)
def test_no_machine_is_named(path):
  """No path, address or secret of the machine on which a page was written."""
  assert MACHINE.findall((REPOSITORY / path).read_text()) == []


def test_the_first_page_is_short():
  """The evidence, the speeds, the formulas and the commands have pages of their own, to which links lead."""
  page = (REPOSITORY / "README.md").read_text()
  assert len(page.split()) <= WORDS_OF_THE_FIRST_PAGE


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
  """Every relative link of a page names a file of the repository, and every anchor a heading."""
  page = REPOSITORY / path
  for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if "://" in target:
      continue
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    assert file.exists(), target
    headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE) if anchor else []
    assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_tables_are_those_of_the_result_files():
  """Every table with a name is what the command computes from the files."""
  command = [sys.executable, REPOSITORY / "configs" / "results" / "tables.py", "--check"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pictures_are_those_of_the_result_files():
  """Every picture of the results page is what the command draws from the files."""
  command = [sys.executable, REPOSITORY / "configs" / "results" / "figures.py", "--check"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

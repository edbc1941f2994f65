"""A sweep on disk: a folder a cell, which holds everything about it.

    DIR/data/HASH/               prepared data, one for all cells with the same data options
    DIR/cells/ID/cell.json       labels, configuration, what to evaluate; written once, never changed
    DIR/cells/ID/recipe.py       the same as a recipe: python -m atma_jax.train --config=recipe.py --workdir=ELSEWHERE
    DIR/cells/ID/claim.N         who runs it (`atma_jax.ablation.claims`)
    DIR/cells/ID/log.txt         what its process said
    DIR/cells/ID/checkpoints, metrics.jsonl, evaluation/    what training and evaluation wrote
    DIR/cells/ID/result.json     written last: the cell is done
    DIR/cells/ID/failed.json     the error of a cell that failed, until it is retried
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from atma_jax.ablation.grid import Cell
from atma_jax.config import Config
from atma_jax.data.manifest import settings_of
from atma_jax.errors import UserError, unknown_name
from atma_jax.evaluation.options import Options

SCHEMA = 1
_RECIPE = '''"""Cell {id} of a sweep of atma_jax.ablate.

  python -m atma_jax.train --config=recipe.py --workdir=DIR
"""

from atma_jax.config import Config


def get_config() -> Config:
  """The cell's whole configuration."""
  return Config.from_dict({config})
'''


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is measured after training; the fields of `Options` that a grid sets."""

  suite: tuple[str, ...] = Options.suite
  multiples: tuple[int, ...] = Options.multiples
  trials: int = Options.trials
  batch_tokens: int = Options.batch_tokens
  min_documents: int = Options.min_documents


class CellFolder:
  """One cell's folder."""

  def __init__(self, path: pathlib.Path):
    self.path, self.id = path, path.name

  def describe(self) -> dict[str, Any]:
    """What `cell.json` says."""
    try:
      return json.loads((self.path / "cell.json").read_text())
    except (OSError, ValueError) as error:
      raise UserError(f"{self.path / 'cell.json'} cannot be read: {error}") from error

  def config(self) -> Config:
    """The configuration, with the sweep's shared data directory where it names none."""
    config = Config.from_dict(self.describe()["config"])
    if not config.data.directory:
      settings = json.dumps(settings_of(config.data), sort_keys=True)
      name = hashlib.sha256(settings.encode()).hexdigest()[:12]
      config.data.directory = str((self.path.parent.parent / "data" / name).absolute())
    return config

  @property
  def done(self) -> bool:
    return (self.path / "result.json").is_file()

  def result(self) -> dict[str, Any] | None:
    """What `result.json` says, or None."""
    return json.loads((self.path / "result.json").read_text()) if self.done else None

  def progress(self) -> tuple[float, float | None]:
    """The share of the training that is done, and the seconds that all of it takes at the last speed, if known."""
    try:
      with (self.path / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        lines = file.read().splitlines()
    except FileNotFoundError:
      return 0.0, None
    steps = self.describe()["config"]["train"]["steps"]
    for line in reversed(lines):
      try:
        record = json.loads(line)
        return record["step"] / steps, record["seconds_per_step"] * steps
      except (ValueError, KeyError):  # being written, or a record of validation
        continue
    return 0.0, None

  def failure(self) -> dict[str, Any] | None:
    """What `failed.json` says, or None."""
    try:
      return json.loads((self.path / "failed.json").read_text())
    except (OSError, ValueError):
      return None

  def fail(self, error: str, code: int) -> None:
    """Keeps the error of an attempt."""
    attempts = len(list(self.path.glob("failed-*.json"))) + 1
    write_json(self.path / "failed.json", {"error": error, "exit_code": code, "attempt": attempts})

  def forget_failure(self) -> None:
    """Puts the error aside as ``failed-N.json``."""
    failure = self.failure()
    if failure is not None:
      os.replace(self.path / "failed.json", self.path / f"failed-{failure['attempt']}.json")


def create(directory: pathlib.Path, cells: Sequence[Cell], evaluation: Evaluation) -> list[CellFolder]:
  """Makes the folders of `cells`, or finds them as they are.

  Raises:
    UserError: a cell of that id exists with another configuration or evaluation; the first difference is named.
  """
  folders = []
  for cell in cells:
    folder = CellFolder(directory / "cells" / cell.id)
    description = json.loads(json.dumps({"schema": SCHEMA, "id": cell.id, "labels": cell.labels, "config": cell.config.to_dict(),
                                         "evaluation": dataclasses.asdict(evaluation)}))
    try:
      folder.path.mkdir(parents=True, exist_ok=True)
      if not (folder.path / "cell.json").exists():
        recipe = _RECIPE.format(id=cell.id, config=repr(description["config"]))
        _write(folder.path / "recipe.py", recipe)
        write_json(folder.path / "cell.json", description)
    except OSError as error:
      raise UserError(f"--output={directory}: cannot write {folder.path}: {error.strerror or error}") from error
    stored = folder.describe()
    stored["config"] = json.loads(json.dumps(Config.from_dict(stored["config"]).to_dict()))
    difference = _difference(description, stored, "")
    if difference:
      raise UserError(f"{folder.path} exists with another setting, {difference}: use another --output, or the stored value")
    folders.append(folder)
  return folders


def find(directory: pathlib.Path) -> list[CellFolder]:
  """Every cell of a sweep, by id."""
  return [CellFolder(path.parent) for path in sorted((directory / "cells").glob("*/cell.json"))]


def chosen(cells: Sequence[Any], ids: Sequence[str], directory: pathlib.Path) -> list[Any]:
  """The cells (of a grid, or their folders) of these ids, or all where none is named; `UserError` where there is no such cell."""
  known = {cell.id: cell for cell in cells}
  if not known:
    raise UserError(f"--output={directory}: holds no cells; give a grid: --config=RECIPE with --preset or --axis")
  for name in ids:
    if name not in known:
      raise UserError(unknown_name("--cells: cell", name, known))
  return [known[name] for name in ids] or list(known.values())


def exit_code(cells: Sequence[CellFolder]) -> int:
  """Of a worker whose cells failed: 2 where every failure is bad input, which trying again does not mend, else 1."""
  return 2 if all(failure["exit_code"] == 2 for cell in cells if (failure := cell.failure())) else 1


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a whole file or nothing."""
  _write(path, json.dumps(value, indent=1) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _difference(ours: Any, theirs: Any, path: str) -> str | None:
  if isinstance(ours, dict) and isinstance(theirs, dict):
    for name in ours:
      found = _difference(ours[name], theirs.get(name), f"{path}.{name}" if path else name)
      if found:
        return found
    return None
  return None if ours == theirs else f"{path}={theirs!r} there, {ours!r} here"

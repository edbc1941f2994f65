"""A sweep on disk: one folder per cell, which holds everything about it.

    DIR/data/HASH/               prepared data, shared by all cells with equal data options
    DIR/cells/ID/cell.json       labels, configuration and evaluation; written once, never changed
    DIR/cells/ID/recipe.py       the configuration as a recipe: python -m atma_jax.train --config=recipe.py --workdir=ELSEWHERE
    DIR/cells/ID/claim.N         the process that runs the cell (see `atma_jax.claims`)
    DIR/cells/ID/log.txt         output of the cell's process
    DIR/cells/ID/checkpoints, metrics.jsonl, evaluation/    output of training and evaluation
    DIR/cells/ID/result.json     written last; the cell is done
    DIR/cells/ID/failed.json     the error of a failed cell, until it is retried
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple, TypeVar

from atma_jax.ablation.grid import Cell
from atma_jax.config import Config
from atma_jax.data.manifest import COUNT, settings_of
from atma_jax.errors import UserError, unknown_name
from atma_jax.evaluation.options import Options
from atma_jax.evaluation.suites import check_names
from atma_jax.json_input import json_digest, mismatch, read_json

SCHEMA = 1
_CellT = TypeVar("_CellT", Cell, "CellFolder")
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
  """The evaluation after training: the options that a sweep sets, by the names that `evaluate` knows them under."""

  suite: tuple[str, ...] = Options.suite
  multiples: tuple[int, ...] = Options.multiples
  trials: int = Options.trials
  batch_tokens: int = Options.batch_tokens
  min_documents: int = Options.min_documents

  def __post_init__(self) -> None:
    check_names(self.suite)
    if not self.suite:
      raise UserError("--suite=: must name at least one evaluation suite")
    common = {field.name for field in dataclasses.fields(Options)}
    values = dataclasses.asdict(self)
    Options(**{name: value for name, value in values.items() if name in common})  # checks each against its rule


class LastRecord(NamedTuple):
  """How far the training of a cell is.

  Attributes:
    step: the last one that was recorded.
    steps: of the whole training.
    seconds_per_step: at the last record.
    loss: in nats per token; None if it was not finite.
  """

  step: int
  steps: int
  seconds_per_step: float
  loss: float | None

  def __str__(self) -> str:
    return f"step {self.step}/{self.steps}, loss " + ("not finite" if self.loss is None else f"{self.loss:.3f}")


class CellFolder:
  """The folder of one cell, whose name is the cell's id."""

  def __init__(self, path: pathlib.Path):
    self.path, self.id = path, path.name

  def describe(self) -> dict[str, Any]:
    """The content of ``cell.json``.

    Raises:
      UserError: it cannot be read, or does not describe the cell of this folder.
    """
    path = self.path / "cell.json"
    values = read_json(path)
    problem = mismatch(values, {"schema": COUNT, "id": str, "labels": {}, "config": {}, "evaluation": {}})
    if not problem and (values["schema"], values["id"]) != (SCHEMA, self.id):
      problem = f"it is of cell {str(values['id'])[:80]!r}, schema {values['schema']}; legal: {self.id!r}, {SCHEMA}"
    if not problem and not all(isinstance(label, str) for label in values["labels"].values()):
      problem = "labels are no texts"
    if problem:
      raise UserError(f"{path} describes no cell: {problem}")
    return values

  def config(self) -> Config:
    """The cell's configuration, with the sweep's shared data directory unless it names one itself.

    Raises:
      UserError: ``cell.json`` cannot be read, or holds no legal configuration.
    """
    stored = self.describe()["config"]
    try:
      config = Config.from_dict(stored).validate()
    except (AttributeError, TypeError, ValueError, LookupError, RecursionError) as error:
      raise UserError(f"{self.path / 'cell.json'} holds no configuration: {' '.join(str(error).split())[:200]}") from error
    except UserError as error:
      raise UserError(f"{self.path / 'cell.json'}: {error}") from error
    if not config.data.directory:
      name = json_digest(settings_of(config.data))[:12]
      config.data.directory = str((self.path.parent.parent / "data" / name).absolute())
    return config

  def evaluation(self) -> Evaluation:
    """What is evaluated after training. Raises `UserError` if ``cell.json`` does not say that."""
    stored = self.describe()["evaluation"]
    known = {field.name for field in dataclasses.fields(Evaluation)}
    for name in stored.keys() - known:
      raise UserError(f"{self.path / 'cell.json'}: " + unknown_name("evaluation option", name, known))
    try:
      values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
      return Evaluation(**values)
    except (TypeError, ValueError) as error:
      raise UserError(f"{self.path / 'cell.json'} holds no evaluation: {' '.join(str(error).split())[:200]}") from error
    except UserError as error:
      raise UserError(f"{self.path / 'cell.json'}: {error}") from error

  def check(self) -> None:
    """Raises `UserError` if ``cell.json`` is not such that the cell can be run."""
    self.config()
    self.evaluation()

  @property
  def done(self) -> bool:
    """Whether the cell has a result."""
    return (self.path / "result.json").is_file()

  def result(self) -> dict[str, Any] | None:
    """The content of ``result.json``, or None if the cell is not done.

    Raises:
      UserError: the file is no JSON object.
    """
    if not self.done:
      return None
    values = read_json(self.path / "result.json")
    if not isinstance(values, dict):
      raise UserError(f"{self.path / 'result.json'} is no object")
    return values

  def progress(self) -> tuple[float, float | None]:
    """The fraction of the training that is done, and the seconds that all of it takes at the latest speed, if known."""
    found = self.last_record()
    return (0.0, None) if found is None else (found.step / found.steps, found.seconds_per_step * found.steps)

  def last_record(self) -> LastRecord | None:
    """The last record of training in ``metrics.jsonl``; None if there is none yet."""
    try:
      with (self.path / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        lines = file.read().splitlines()
      steps = self.config().train.steps
    except (OSError, UserError):
      return None
    for line in reversed(lines):
      try:
        record = json.loads(line)
        loss = record.get("loss")  # null if it was not finite
        return LastRecord(int(record["step"]), steps, float(record["seconds_per_step"]), None if loss is None else float(loss))
      except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # being written, of a validation, or none
        continue
    return None

  def failure(self) -> dict[str, Any] | None:
    """The content of ``failed.json``, or None if the last attempt did not fail."""
    path = self.path / "failed.json"
    if not path.exists():
      return None
    try:
      values = read_json(path)
    except UserError as error:
      return {"error": str(error), "exit_code": 1, "attempt": 0}
    problem = mismatch(values, {"error": str, "attempt": COUNT, "exit_code": int})
    if problem:
      return {"error": f"{path} is damaged: {problem}", "exit_code": 1, "attempt": 0}
    return values

  def fail(self, error: str, code: int) -> None:
    """Records the error and the exit code of an attempt."""
    attempts = len(list(self.path.glob("failed-*.json"))) + 1
    write_json(self.path / "failed.json", {"error": error, "exit_code": code, "attempt": attempts})

  def forget_failure(self) -> None:
    """Renames the error of the last attempt to ``failed-N.json``."""
    failure = self.failure()
    if failure is not None:
      os.replace(self.path / "failed.json", self.path / f"failed-{failure['attempt']}.json")


def create(directory: pathlib.Path, cells: Sequence[Cell], evaluation: Evaluation) -> list[CellFolder]:
  """Creates the folders of `cells`, or finds those that exist.

  Raises:
    UserError: a cell exists with another configuration or evaluation (the message names the first difference), or its folder
      cannot be written.
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
        write_file(folder.path / "recipe.py", recipe.encode())
        write_json(folder.path / "cell.json", description)
    except OSError as error:
      raise UserError(f"--output={directory}: cannot write {folder.path}: {error.strerror or error}") from error
    stored = folder.describe()
    folder.config()
    stored["config"] = json.loads(json.dumps(Config.from_dict(stored["config"]).to_dict()))
    difference = _difference(description, stored, "")
    if difference:
      raise UserError(f"{folder.path} exists with another setting, {difference}: use another --output, or the stored value")
    folders.append(folder)
  return folders


def find(directory: pathlib.Path) -> list[CellFolder]:
  """All cells of a sweep, in the order of their ids."""
  return [CellFolder(path.parent) for path in sorted((directory / "cells").glob("*/cell.json"))]


def select_cells(cells: Sequence[_CellT], ids: Sequence[str], directory: pathlib.Path) -> list[_CellT]:
  """The cells with these ids, or all cells if no id is given.

  Raises:
    UserError: there are no cells at all, or none with one of the ids.
  """
  known = {cell.id: cell for cell in cells}
  if not known:
    raise UserError(f"--output={directory}: holds no cells; give a grid: --config=RECIPE with --preset or --axis")
  for name in ids:
    if name not in known:
      raise UserError(unknown_name("--cells: cell", name, known))
  return [known[name] for name in ids] or list(known.values())


def failure_exit_code(cells: Sequence[CellFolder]) -> int:
  """The exit code of a worker whose cells failed: 2 if all failed for bad input, which a retry cannot mend, else 1."""
  return 2 if all(failure["exit_code"] == 2 for cell in cells if (failure := cell.failure())) else 1


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as JSON, atomically."""
  write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def write_file(path: pathlib.Path, content: bytes) -> None:
  """Writes a whole file or nothing, through a temporary file of this process; several processes may write the same file."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with temporary.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _difference(ours: Any, theirs: Any, path: str) -> str | None:
  """The first entry of two nested dicts that differs, in words, or None."""
  if isinstance(ours, dict) and isinstance(theirs, dict):
    for name in ours:
      found = _difference(ours[name], theirs.get(name), f"{path}.{name}" if path else name)
      if found:
        return found
    return None
  return None if ours == theirs else f"{path}={theirs!r} there, {ours!r} here"

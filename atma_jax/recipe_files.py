"""Recipes by name or path: Python files whose ``get_config()`` returns a `Config`, and JSON as ``--print_config`` writes it."""

from __future__ import annotations

import json
import pathlib
import types

from atma_jax.config import Config
from atma_jax.errors import UserError, unknown_name
from atma_jax.json_input import MalformedJSON, check_regular, parse_json, read_bytes

_MOST_NAMED = 20  # files of a folder that a message lists


def recipe_folder() -> pathlib.Path:
  """Where the recipes are: in the package ``atma_jax.recipes`` once it is installed, in ``configs`` beside a checkout."""
  package = pathlib.Path(__file__).parent
  return package / "recipes" if (package / "recipes").is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
  """The recipes that ``--config=NAME`` finds, in order."""
  return sorted(path.stem for path in recipe_folder().glob("[!_]*.py"))


def load_recipe(recipe: str) -> Config:
  """The `Config` of a recipe; it is not validated.

  Args:
    recipe: the name of a recipe that comes with the package, such as "quickstart"; or a path: of a Python file whose
      ``get_config()`` returns a `Config`, or of a ``.json`` file as `to_json` writes it.

  Raises:
    UserError: there is no such recipe, it does not run, or it gives something else; what a recipe raises is named with its line.
  """
  if _is_name(recipe) and not pathlib.Path(recipe).is_file():
    if recipe not in recipe_names():
      raise UserError(unknown_name("--config: the recipe", recipe, recipe_names()) + "; or the path of a .py or .json file")
    return _run(str(recipe_folder() / f"{recipe}.py"))
  check_regular(recipe, lambda problem: UserError(f"--config={problem}"))
  if not pathlib.Path(recipe).is_file():
    raise UserError(f"--config={recipe}: no such file{_elsewhere(pathlib.Path(recipe))}")
  return _read(recipe) if recipe.endswith(".json") else _run(recipe)


def to_json(config: Config) -> str:
  """The JSON text of a configuration, with every field; `load_recipe` reads it back as an equal one."""
  return json.dumps(config.to_dict(), indent=2, allow_nan=False)


def _is_name(recipe: str) -> bool:
  """Whether a text is a name, with neither a folder nor a suffix; a file of just that name in the current folder still counts."""
  return recipe.isidentifier()


def _elsewhere(path: pathlib.Path) -> str:
  """What may have been meant by the path of a file that is not there."""
  if path.stem in recipe_names():
    return f"; --config={path.stem} is the recipe of that name that comes with the package"
  near = sorted(str(file) for file in path.parent.glob("*.py"))
  more = f" and {len(near) - _MOST_NAMED} more" if len(near) > _MOST_NAMED else ""
  return f"; Python files there: {', '.join(near[:_MOST_NAMED])}{more}" if near else ""


def _read(path: str) -> Config:
  """The configuration in a JSON file."""
  try:
    return Config.from_dict(parse_json(read_bytes(path)))
  except OSError as error:
    raise UserError(f"--config={path}: cannot be read: {error.strerror or error}") from error
  except MalformedJSON as error:
    raise UserError(f"--config={path}: is not valid JSON: {error}") from error
  except UserError as error:
    raise UserError(f"--config={path}: {str(error).removeprefix(f'{path}: ')}") from error


def _run(path: str) -> Config:
  """The configuration that ``get_config()`` of a Python file returns.

  The file is compiled each time. An import would keep bytecode beside it and take that for the file's own as long as its size and
  the second of its last change are the same.
  """
  module = types.ModuleType("recipe")
  module.__file__ = path
  try:
    exec(compile(pathlib.Path(path).read_bytes(), path, "exec"), vars(module))
    config = module.get_config()
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # a recipe is code of the user's and may raise anything, SystemExit too
    raise UserError(f"--config={path}: {_place_in(path, error)}{_reason(error)}") from error
  if not isinstance(config, Config):
    raise UserError(f"--config={path}: get_config() must return an atma_jax.config.Config")
  return config


def _place_in(path: str, error: BaseException) -> str:
  """The last line of a recipe that led to an error, such as "line 12: "; "" if there is none."""
  if isinstance(error, SyntaxError):
    return f"line {error.lineno}: " if error.lineno else ""
  place, trace = "", error.__traceback__
  while trace is not None:  # not `traceback.extract_tb`, which reads every source file
    if trace.tb_frame.f_code.co_filename == path:
      place = f"line {trace.tb_lineno}: "
    trace = trace.tb_next
  return place


def _reason(error: BaseException) -> str:
  """The kind of an error and what it says, shortened."""
  if isinstance(error, (UserError, SyntaxError)):
    return str(error.msg if isinstance(error, SyntaxError) else error)
  try:
    text = " ".join(str(error).split())
  except Exception:  # an error of the recipe's own
    text = ""
  return type(error).__name__ + (f": {text[:300]}" if text else "")

"""What all mains share: strict flags, the recipe and its overrides, one-line errors, exit codes.

``--config=FILE`` names a recipe, whose ``get_config()`` returns a `Config`. Every field of `Config` has a flag
(``--config.model.attention=nope``) that overrides the recipe.

Exit codes: 0 done, 1 something outside the program failed, 2 bad input (both say so in one line, without a traceback), 75
pre-empted after saving, 130 interrupted (Ctrl-C).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import importlib.machinery
import importlib.util
import logging as std_logging
import pathlib
import re
import sys
import typing
from typing import Any

from absl import app, flags, logging

from atma_jax.checkpoints.overrides import OVERRIDES, RETENTION_HEADS_HELP, Override, SwitchOverride
from atma_jax.config import AT_LEAST_1, Config, RetentionCap, leaves, within
from atma_jax.dataclass_flags import FieldParser, define_field
from atma_jax.errors import RunError, UserError, unknown_name
from atma_jax.json_input import check_regular

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
ENDED = {"preempted": EXIT_PREEMPTED, "interrupted": EXIT_INTERRUPTED}  # exit codes of what training and sweeps return

flags.disclaim_key_flags()  # --help lists --config among the flags of the main that defines it


class ConfigFlag:
  """``--config=FILE``, and a flag for every field of `Config`."""

  def __init__(self, default: str | None):
    self._recipe = flags.DEFINE_string("config", default, "Recipe, such as configs/quickstart.py.")
    self._fields = {leaf.name: define_field(leaf.name, leaf.hint, None, f"{leaf.help} Default: {leaf.value!r}.")
                    for leaf in leaves(Config())}

  @property
  def given(self) -> bool:
    """Whether a recipe was named."""
    return self._recipe.value is not None

  @property
  def value(self) -> Config:
    """The recipe with the overrides that were given, validated; raises `UserError` for anything wrong with either."""
    if self._recipe.value is None:
      raise UserError("--config=FILE is required: a recipe, e.g. --config=configs/quickstart.py")
    config = load_recipe(self._recipe.value)
    for name, flag in self._fields.items():
      if flag.present:
        *path, leaf = name.split(".")[1:]
        owner = config
        for field in path:
          owner = getattr(owner, field)
        setattr(owner, leaf, flag.value)
    return config.validate()


def define_config_flag(default: str | None = None) -> ConfigFlag:
  """Defines ``--config`` and ``--config.FIELD`` for a main; `default` is the recipe if none is named."""
  return ConfigFlag(default)


class OverrideFlags:
  """A flag for every field of `OVERRIDES`, and ``--retention_heads``."""

  def __init__(self) -> None:
    self._flags = {
      name: flags.DEFINE_float(name, None, override.help) if name == "retention_cap"
      else flags.DEFINE_boolean(name, None, override.help) if isinstance(override, SwitchOverride)
      else flags.DEFINE(_OverrideParser(override), name, None, override.help, serializer=flags.ArgumentSerializer())
      for name, override in OVERRIDES.items()}
    self._heads = flags.DEFINE_string("retention_heads", "all", RETENTION_HEADS_HELP)

  @property
  def heads(self) -> str:
    """The value of ``--retention_heads``."""
    return self._heads.value

  def values(self, *, heads_alone: bool = False) -> dict[str, Any]:
    """The overrides that were given, as `atma_jax.checkpoints.load.load_model` takes them.

    Args:
      heads_alone: allow ``--retention_heads`` without ``--retention_cap``, because other caps are given.
    """
    given: dict[str, Any] = {name: flag.value for name, flag in self._flags.items() if flag.present}
    if given.get("retention_cap") is not None:
      given["retention_cap"] = RetentionCap(given["retention_cap"], self.heads)
    elif self.heads != "all" and not heads_alone:
      raise UserError(f"--retention_heads={self.heads}: says which heads --retention_cap=TOKENS holds; it is missing")
    return given


def define_override_flags() -> OverrideFlags:
  """Defines a flag for every field of `OVERRIDES`, such as ``--window``, and ``--retention_heads`` for a main."""
  return OverrideFlags()


def load_recipe(path: str) -> Config:
  """The `Config` that ``get_config()`` of the Python file `path` returns.

  Raises:
    UserError: no such file, it does not run, or it returns something else; what a recipe raises is named with its line.
  """
  check_regular(path, lambda problem: UserError(f"--config={problem}"))
  if not pathlib.Path(path).is_file():
    near = ", ".join(sorted(str(file) for file in pathlib.Path(path).parent.glob("*.py")))
    raise UserError(f"--config={path}: no such file" + (f"; recipes there: {near}" if near else ""))
  loader = importlib.machinery.SourceFileLoader("recipe", path)
  spec = importlib.util.spec_from_loader("recipe", loader)
  assert spec is not None
  recipe = importlib.util.module_from_spec(spec)
  try:
    loader.exec_module(recipe)
    config = recipe.get_config()
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


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, calls `main` and exits with the code that it returns; None is 0.

  Bad flags and a `UserError` end in one line and exit code 2, a `RunError` in one line and exit code 1.
  """

  def guarded(argv: list[str]) -> None:
    try:
      if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options start with -- (see --help)")
      code = main() or 0
    except UserError as error:
      bad_input(error)
    except RunError as error:
      _end(error, EXIT_FAILED)
    except KeyboardInterrupt:
      _end("interrupted (Ctrl-C)", EXIT_INTERRUPTED)
    else:
      sys.exit(code)

  app.run(guarded, flags_parser=_parse)


def _is_library_chatter(record: std_logging.LogRecord) -> bool:
  """Whether a library logs its own workings: below a warning, or as the warning of a checkpoint that is only read."""
  if not any(part in record.pathname for part in ("/orbax/", "/grain/", "/jax/", "/httpx")):
    return False
  return record.levelno < std_logging.WARNING or re.search("read.only=", record.getMessage()) is not None


def _parse(argv: list[str]) -> list[str]:
  logging.use_absl_handler()
  logging.get_absl_handler().addFilter(lambda record: not _is_library_chatter(record))
  logging.set_stderrthreshold("info")
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    bad_input(_unknown_field(error.flagname) if error.flagname.startswith("config.") else error)
  except flags.Error as error:
    bad_input(error)


def _unknown_field(name: str) -> str:
  """Why there is no flag ``config.a.b``: it names the first part that is no field, or says that ``config.a.b`` is a group."""
  owner, path = Config(), "config"
  for part in name.split(".")[1:]:
    if not dataclasses.is_dataclass(owner):
      return f"--{name}: --{path} has no fields"
    legal = [field.name for field in dataclasses.fields(owner)]
    if part not in legal:
      return unknown_name(f"--{name}: {path} field", part, legal)
    owner, path = getattr(owner, part), f"{path}.{part}"
  return f"--{path}: a group of options; legal: " + ", ".join(f"--{leaf.name}" for leaf in leaves(owner, path))


def bad_input(error: Exception | str) -> typing.NoReturn:
  """Prints what is wrong in one line and exits with code 2."""
  _end(error, EXIT_BAD_INPUT)


def _end(error: Exception | str, code: int) -> typing.NoReturn:
  line = " ".join(str(error).split())  # without what would control the terminal: parts may be out of a file
  print("error:", "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
  sys.exit(code)


class _OverrideParser(flags.ArgumentParser):
  """Parses the text of a flag as the value of an override: a whole number or none."""

  def __init__(self, override: Override):
    self._override = override

  def parse(self, argument: Any) -> Any:
    value = int(argument) if str(argument).lstrip("-").isdigit() else argument
    try:
      self._override.parse(value)
    except UserError as error:
      raise ValueError(f"must be {self.flag_type()}") from error
    return value

  def flag_type(self) -> str:
    return self._override.legal


def parse_field(field: str, text: str) -> Any:
  """The value that the flag ``--config.FIELD`` would take from `text`.

  Raises:
    UserError: no such field, or the text is no value of its type.
  """
  name = f"config.{field}"
  hints = {leaf.name: leaf.hint for leaf in leaves(Config())}
  if name not in hints:
    raise UserError(_unknown_field(name))
  try:
    return FieldParser(hints[name]).parse(text)
  except ValueError as error:
    raise UserError(f"--{name}={text}: {error}") from error


def refuse_empty(*lists: flags.FlagHolder) -> None:
  """Raises `UserError` for a list flag that was given with nothing in it, or with an empty element."""
  for flag in lists:
    if flag.present and not all(flag.value or [""]):
      raise UserError(f"--{flag.name}={','.join(flag.value)}: must be a list without empty elements")


def whole_numbers(flag: str, texts: Sequence[str]) -> tuple[int, ...]:
  """The whole numbers in the texts of a list flag, from 1 to the most that a dimension may be, or from 0 for seeds.

  Raises:
    UserError: there are none, or something else is among them; the message names the flag.
  """
  legal = within(0, (1 << 32) - 1) if flag == "seeds" else AT_LEAST_1
  shown = f"--{flag}={','.join(texts)[:200]}"
  try:
    numbers = tuple(int(text) for text in texts)
  except ValueError as error:
    raise UserError(f"{shown}: must be whole numbers such as 1,2,4,8") from error
  if not numbers or not all(map(legal.allows, numbers)):
    raise UserError(f"{shown}: must be one or more whole numbers, each {legal.legal}")
  return numbers

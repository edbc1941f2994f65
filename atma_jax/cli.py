"""What all mains share: strict flags, the recipe and its overrides, one-line errors, exit codes.

``--config=RECIPE`` names a recipe: one that comes with the package, by its name, or a file (`atma_jax.recipe_files`). Every
field of `Config` has a flag (``--config.model.attention=nope``) that overrides the recipe; ``--print_config`` shows what results.

Exit codes: 0 done, 1 something outside the program failed, 2 bad input (both say so in one line, without a traceback), 75
pre-empted after saving, 130 interrupted (Ctrl-C), 141 nobody reads the output any more (``| head``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import logging as std_logging
import os
import re
import select
import sys
import typing
from typing import Any

from absl import app, flags, logging

from atma_jax.checkpoints.overrides import OVERRIDES, RETENTION_HEADS_HELP, Override, SwitchOverride
from atma_jax.config import AT_LEAST_1, Config, RetentionCap, leaves, within
from atma_jax.dataclass_flags import FieldParser, define_field
from atma_jax.errors import RunError, UserError, unknown_name
from atma_jax.recipe_files import load_recipe, recipe_names, to_json

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # what a shell reports of a program that SIGPIPE has ended
ENDED = {"preempted": EXIT_PREEMPTED, "interrupted": EXIT_INTERRUPTED}  # exit codes of what training and sweeps return

flags.disclaim_key_flags()  # --help lists --config among the flags of the main that defines it


class ConfigFlag:
  """``--config=RECIPE``, ``--print_config``, and a flag for every field of `Config`."""

  def __init__(self, default: str | None):
    self._recipe = flags.DEFINE_string("config", default, f"Recipe: {', '.join(recipe_names())}; or a file, NAME.py with a "
                                       "get_config(), or NAME.json as --print_config writes it.")
    self._print = flags.DEFINE_boolean("print_config", False, "Only print the recipe with its overrides as JSON, which "
                                       "--config=FILE.json takes back.")
    self._fields = {leaf.name: define_field(leaf.name, leaf.hint, None, f"{leaf.help} Default: {leaf.value!r}.")
                    for leaf in leaves(Config())}

  def printed(self) -> bool:
    """Prints the configuration and returns True, if ``--print_config`` asks for it."""
    if self._print.value:
      print(to_json(self.value))
    return bool(self._print.value)

  @property
  def given(self) -> bool:
    """Whether a recipe was named."""
    return self._recipe.value is not None

  @property
  def value(self) -> Config:
    """The recipe with the overrides that were given, validated; raises `UserError` for anything wrong with either."""
    if self._recipe.value is None:
      raise UserError(f"--config=RECIPE is required: {', '.join(recipe_names())}, or a .py or .json file")
    config = load_recipe(self._recipe.value)
    for name, flag in self._fields.items():
      if flag.present:
        *path, leaf = name.split(".")[1:]
        owner = config
        for field in path:
          owner = getattr(owner, field)
        setattr(owner, leaf, flag.value)
    return config.validate()


_config_flags: list[ConfigFlag] = []  # none or one: that of the main


def define_config_flag(default: str | None = None) -> ConfigFlag:
  """Defines ``--config``, ``--print_config`` and ``--config.FIELD`` for a main; `default` is the recipe if none is named."""
  _config_flags.append(ConfigFlag(default))
  return _config_flags[-1]


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


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, calls `main` and exits with the code that it returns; None is 0.

  Bad flags and a `UserError` end in one line and exit code 2, a `RunError` in one line and exit code 1. Output that nobody reads
  any more, as behind ``| head``, ends the program without a word.
  """

  def guarded(argv: list[str]) -> None:
    try:
      if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options start with -- (see --help)")
      code = 0 if any(flag.printed() for flag in _config_flags) else main() or 0
    except UserError as error:
      bad_input(error)
    except RunError as error:
      _end(error, EXIT_FAILED)
    except KeyboardInterrupt:
      _end("interrupted (Ctrl-C)", EXIT_INTERRUPTED)
    else:
      sys.exit(code)

  try:
    try:
      app.run(guarded, flags_parser=_parse)
    finally:
      sys.stdout.flush()
  except BrokenPipeError as error:
    if not _reader_has_gone():
      raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the interpreter can flush what is left when it ends
    ended = error.__context__  # the exit code, if only the flush at the end has failed
    sys.exit(ended.code if isinstance(ended, SystemExit) and ended.code else EXIT_READER_GONE)


def _reader_has_gone() -> bool:
  """Whether standard output is a pipe, or a socket, that nobody reads any more, as behind ``| head``."""
  poll = select.poll()
  poll.register(1, select.POLLOUT)
  return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


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

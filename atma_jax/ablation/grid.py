"""Grids of training runs: axes over fields of the configuration, the cells they span, and presets.

The id of a cell joins one label per axis: ``polar__reg-baseline__distr-0__mem-1__win-0``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import copy
import dataclasses
import itertools
import math
import re
from typing import Any

from atma_jax.config import REGULARIZERS, Config
from atma_jax.data.sources import parse_source
from atma_jax.data.tokenizers import is_hub_name, load_tokenizer
from atma_jax.errors import UserError, unknown_name

# Names of axes in ids and tables, by field. Other axes are called by the last part of their field.
NAMES = {"model.attention": "attention", "model.memory.enabled": "mem", "model.memory.max_half_life": "halflife",
         "model.window": "win", "train.auxiliary.regularizer": "reg", "train.auxiliary.distractors": "distr"}
SEED_FIELDS = ("train.seed", "data.shuffle_seed")
_UNLABELLED = ("attention",)  # axes whose levels are not prefixed with the name of the axis

_OF_THE_SWEEP = {"name": "the name of a cell is its id"}  # fields that are no factors
MOST_CELLS = 10_000
_LEGAL_ID = re.compile(r"[A-Za-z0-9+_-][A-Za-z0-9.+_-]{0,199}")  # a cell's id is the name of its folder

Parse = Callable[[str, str], Any]  # (field without "config.", text) -> value


@dataclasses.dataclass(frozen=True)
class Level:
  """One level of an axis.

  Attributes:
    label: in cell ids.
    changes: fields and their values. A callable value is called with the base configuration and returns the value.
  """

  label: str
  changes: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Axis:
  """A factor of the grid: its name and its levels."""

  name: str
  levels: tuple[Level, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the grid.

  Attributes:
    id: unique within the grid.
    labels: one per axis, by the name of the axis.
    config: the whole configuration.
  """

  id: str
  labels: dict[str, str]
  config: Config


def make_axis(field: str, values: Sequence[Any], name: str | None = None) -> Axis:
  """An axis over the values of one field."""
  name = name or NAMES.get(field, field.rpartition(".")[2])
  return Axis(name, tuple(Level(_label(name, value), ((field, value),)) for value in values))


def seed_axis(seeds: Sequence[int]) -> Axis:
  """An axis over seeds; a seed sets the parameters, the auxiliary draws and the order of the data."""
  return Axis("seed", tuple(Level(f"seed-{seed}", tuple((field, seed) for field in SEED_FIELDS)) for seed in seeds))


def parse_axis(text: str, parse: Parse) -> Axis:
  """The axis that ``[config.]FIELD=VALUE,VALUE,...`` describes; a value that contains commas is written in parentheses.

  Args:
    text: the description.
    parse: parses a value of a field.

  Raises:
    UserError: the text is malformed, or a value is illegal.
  """
  field, equals, values = text.partition("=")
  if not equals or not values:
    raise UserError(f"--axis={text}: must be FIELD=VALUE,VALUE,..., e.g. --axis model.attention=polar,nope")
  field = field.removeprefix("config.")
  if field in _OF_THE_SWEEP:
    raise UserError(f"--axis={text}: {_OF_THE_SWEEP[field]}; name another field")
  return make_axis(field, [parse(field, value) for value in _split(text, values)])


def expand(axes: Sequence[Axis], base: Config, exclude: Sequence[str] = ()) -> list[Cell]:
  """The cells of all combinations of levels, in order.

  Args:
    axes: the factors.
    base: the configuration that levels change.
    exclude: labels joined by commas; a combination that has all labels of one element is left out.

  Raises:
    UserError: two axes or two cells of one name, too many cells, a name that is no name of a folder, an unknown label in
      `exclude`, a tokenizer or source that does not exist, or a combination that is no legal configuration.
  """
  names = [axis.name for axis in axes]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"--axis: two axes are called {name!r}; name each field once")
  known = {level.label for axis in axes for level in axis.levels}
  dropped = [set(labels.split(",")) for labels in exclude]
  for label in set().union(*dropped) - known:
    raise UserError(unknown_name("--exclude: label", label, known))
  for axis in axes:
    if not axis.levels:
      raise UserError(f"--axis: {axis.name} has no values")
  if math.prod(len(axis.levels) for axis in axes) > MOST_CELLS:
    raise UserError(f"--axis: {' x '.join(str(len(axis.levels)) for axis in axes)} are more than {MOST_CELLS} cells: give "
                    "fewer axes or values")
  cells = []
  for levels in itertools.product(*(axis.levels for axis in axes)):
    labels = [level.label for level in levels]
    if any(drop <= set(labels) for drop in dropped):
      continue
    cell = "__".join(labels) or base.name
    if not _LEGAL_ID.fullmatch(cell):
      raise UserError(f"{'--axis' if labels else 'config.name'}: a cell would be called {cell[:250]!r}; legal: at most 200 "
                      "letters, digits and .+_-, the first no full stop")
    config = copy.deepcopy(base)
    for field, value in (change for level in levels for change in level.changes):
      set_field(config, field, value(base) if callable(value) else value)
    config.name = cell
    try:
      cells.append(Cell(cell, dict(zip(names, labels)), config.validate()))
    except UserError as error:
      raise UserError(f"cell {cell}: {error}") from error
  for spec in {cell.config.data.tokenizer for cell in cells} - {base.data.tokenizer, "sentencepiece"}:
    if is_hub_name(spec):
      continue  # the hub is asked when data is prepared, not by a list of cells
    try:
      load_tokenizer(spec)
    except (UserError, ValueError) as error:
      raise UserError(f"--axis=data.tokenizer={spec}: {error}") from error
  for source in {source for cell in cells for source in cell.config.data.sources} - set(base.data.sources):
    parse_source(source)
  for cell, count in Counter(cell.id for cell in cells).items():
    if count > 1:
      raise UserError(f"--axis: two cells are called {cell!r}; give every value once")
  if not cells:
    raise UserError("--exclude: nothing is left of the grid")
  return cells


def set_field(config: Config, field: str, value: Any) -> None:
  """Sets ``config.FIELD`` to a value.

  Raises:
    UserError: there is no such field.
  """
  owner, (*path, leaf) = config, field.split(".")
  for part in path:
    owner = _known(owner, part, field)
  _known(owner, leaf, field)
  setattr(owner, leaf, value)


def _known(owner: Any, part: str, field: str) -> Any:
  """The value of the field `part` of `owner`, which is a part of the dotted name `field`."""
  legal = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
  if part not in legal:
    raise UserError(unknown_name(f"--axis: {part!r} of config field", field, legal))
  return getattr(owner, part)


def _paper() -> list[Axis]:
  """The grid of arXiv 2606.25156, with as many distractors as the sequence has tokens, and a window of half of them."""
  return [
    make_axis("model.attention", ("polar", "nope", "rope")),
    make_axis("train.auxiliary.regularizer", REGULARIZERS),
    _switch("distr", "train.auxiliary.distractors", 0, lambda base: base.data.sequence_length),
    _switch("mem", "model.memory.enabled", False, True),
    _switch("win", "model.window", None, lambda base: base.data.sequence_length // 2),
  ]


def _switch(name: str, field: str, off: Any, on: Any) -> Axis:
  """An axis with the levels NAME-0 and NAME-1 over the values `off` and `on` of a field."""
  return Axis(name, (Level(f"{name}-0", ((field, off),)), Level(f"{name}-1", ((field, on),))))


def _raven() -> list[Axis]:
  """The Raven baselines under their published ids: Raven in all layers with heads twice as large, and in place of attention.

  Blocks are recomputed in the backward pass, for which the slots would otherwise keep several times as much as attention does.
  """
  recipe = (("optimizer.kind", "adamw"), ("optimizer.schedule", "cosine"), ("optimizer.adam_b1", 0.9),
            ("optimizer.adam_b2", 0.95), ("optimizer.adam_eps", 1e-15),
            ("optimizer.warmup_steps", lambda base: base.train.steps // 20), ("model.remat", "block"))
  native = (("model.block_pattern", ("raven",)), ("model.num_heads", lambda base: base.model.num_heads // 2),
            ("model.num_kv_heads", lambda base: base.model.num_heads // 2),
            ("model.head_dim", lambda base: 2 * base.model.head_dim))
  titans = (("model.block_pattern", lambda base: tuple("raven" if k == "global" else k for k in base.model.block_pattern)),)
  _, regularizer, distractors, memory, window = _paper()
  return [Axis("attention", (Level("raven_native", native + recipe), Level("atma_raven_titans", titans + recipe))),
          *(Axis(axis.name, axis.levels[:1]) for axis in (regularizer, distractors)), memory, Axis("win", window.levels[:1])]


def _headline() -> list[Axis]:
  """Attention, memory, initialisation, and a bound on retention at twice the training length: 27 cells per seed."""
  field = "model.memory.max_half_life"
  half_life = Axis("halflife", (Level("halflife-none", ((field, None),)),
                                Level("halflife-2x", ((field, lambda base: 2.0 * base.data.sequence_length),))))
  return [make_axis("model.attention", ("polar", "nope", "rope")),
          Axis("mem", tuple(reversed(_switch("mem", "model.memory.enabled", False, True).levels))), half_life,
          make_axis("model.init", ("mimetic", "default", "published"))]


# Axes and exclusions of the presets. The first version of the paper reports 100 cells, which lack half of those with rope. It
# does not say which half; here it is the windowed one.
PRESETS: dict[str, tuple[Callable[[], list[Axis]], tuple[str, ...]]] = {
  "paper120": (_paper, ()),
  "paper100": (_paper, ("rope,win-1",)),
  "raven": (_raven, ("raven_native,mem-1", "atma_raven_titans,mem-0")),
  "headline": (_headline, ("mem-0,halflife-2x",)),
}


def preset(name: str) -> tuple[list[Axis], tuple[str, ...]]:
  """Axes and exclusions of a preset.

  Raises:
    UserError: there is no such preset.
  """
  if name not in PRESETS:
    raise UserError(unknown_name("--preset", name, PRESETS))
  axes, exclude = PRESETS[name]
  return axes(), exclude


def _split(text: str, values: str) -> list[str]:
  """Splits `values` at the commas outside parentheses.

  Raises:
    UserError: a parenthesis without its other half, or nothing between two commas; the message shows the axis `text`.
  """
  if not re.fullmatch(r"(?:\([^()]*\)|[^(),]|,)*", values):
    raise UserError(f"--axis={text}: its parentheses do not match, e.g. --axis 'model.block_pattern=(local,global),(global)'")
  found = re.findall(r"(?:\([^()]*\)|[^(),])+", values)
  if len(found) != len(re.findall(",", re.sub(r"\([^()]*\)", "", values))) + 1:
    raise UserError(f"--axis={text}: a value is missing before, between or after the commas")
  return found


def _label(name: str, value: Any) -> str:
  """The label of a value on the axis `name`, with no characters that file names do not take."""
  if isinstance(value, bool):
    value = int(value)
  text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
  text = re.sub(r"[^A-Za-z0-9.+_-]", "_", text).lower() if text else "none"
  return text if name in _UNLABELLED else f"{name}-{text}"

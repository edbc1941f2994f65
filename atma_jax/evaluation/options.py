"""Options of an evaluation: those of every evaluation, and those that the suites declare. Each is a flag of the same name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any, TypeVar

from atma_jax.config import NOT_NEGATIVE, POSITIVE, RetentionCap, each, option, within
from atma_jax.errors import UserError, unknown_name
from atma_jax.evaluation.suites import all_suites, check_names


@dataclasses.dataclass(frozen=True)
class CheckedOptions:
  """Options that are checked against the rules of their fields (see `atma_jax.config.option`) when they are made.

  A suite derives its options from this class. Every field made with `option` is a flag of ``python -m atma_jax.evaluate``.
  """

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, rule = getattr(self, field.name), field.metadata["rule"]
      if rule is not None and value is not None and not rule.allows(value):
        raise UserError(f"--{field.name}={_as_flag(value)}: must be {rule.legal}")


_Kind = TypeVar("_Kind", bound=CheckedOptions)


def _as_flag(value: Any) -> str:
  """A value as its flag spells it."""
  if isinstance(value, tuple):
    return ",".join(map(_as_flag, value))
  return f"{value:g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Options(CheckedOptions):
  """What every evaluation has to know, whatever its suites."""

  suite: tuple[str, ...] = option(("loss", "needle"), "Suites to run.")
  multiples: tuple[int, ...] = option((1, 2, 4, 8), "Context lengths, in multiples of the training length.",
                                      each(within(1, 1 << 20), empty=False))
  step: int | None = option(None, "Checkpoint step; default is the newest good one.")
  ema: bool = option(False, "Evaluate the moving average of the weights (config.train.ema_decay).")
  data: str = option("", "Prepared data; default is what the checkpoint was trained on.")
  seed: int = option(0, "Seed of everything that a suite draws at random.", NOT_NEGATIVE)
  trials: int = option(24, "Trials of every cell of the retrieval suites: needle, retrieval, lookup and mqar.", POSITIVE)
  batch_tokens: int = option(8192, "Tokens in a batch on each device.", POSITIVE)
  chunk: int = option(512, "Time steps whose logits exist at once.", POSITIVE)
  prefill_chunk: int = option(65_536, "Most tokens of a row in one pass; longer rows are read in pieces.", POSITIVE)
  memory_gib: float | None = option(None, "Most memory that a program may use on a device; default is what is free.", POSITIVE)
  context: int = option(1, "Devices over which a sequence is split; must divide the number of devices.", POSITIVE)
  keep_window: bool = option(False, "Keep the attention window of training; otherwise every key is visible.")
  min_documents: int = option(4, "Fewest documents that must be as long as the longest length.", POSITIVE)
  max_documents: int | None = option(None, "Held-out documents to read, longest first; default is all.", POSITIVE)

  def __post_init__(self) -> None:
    check_names(self.suite)
    super().__post_init__()


def parse_caps(texts: Sequence[str], heads: str) -> tuple[RetentionCap | None, ...]:
  """The retention caps that ``--retention_cap_sweep`` lists, each on the heads that ``--retention_heads`` names.

  Raises:
    UserError: an element is neither "none" nor a half-life.
  """
  try:
    return tuple(None if text == "none" else RetentionCap(float(text), heads) for text in texts)
  except ValueError as error:
    raise UserError(f"--retention_cap_sweep={','.join(texts)}: must be half-lives in tokens or none, such as none,256,1024"
                    ) from error


def option_owners() -> Iterator[tuple[str, type[CheckedOptions]]]:
  """Every dataclass of options with the name of its suite, the common ones, "", first."""
  yield "", Options
  for name, suite in all_suites().items():
    yield name, suite.options


def split_options(values: Mapping[str, Any]) -> tuple[Options, dict[str, CheckedOptions]]:
  """Sorts options by flag name into the common ones and, by name, those of each suite.

  A list counts as a tuple, and a single suite may be given as a string.

  Raises:
    UserError: an option that does not exist, or an illegal value.
  """
  owners = {owner: {field.name for field in dataclasses.fields(kind)} for owner, kind in option_owners()}
  legal = sorted(set().union(*owners.values()))
  for name in values:
    if name not in legal:
      raise UserError(unknown_name("option", name, legal))
  if isinstance(values.get("suite"), str):
    values = {**values, "suite": (values["suite"],)}
  values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

  def make(owner: str, kind: type[_Kind]) -> _Kind:
    return kind(**{name: values[name] for name in owners[owner] & values.keys()})

  return make("", Options), {owner: make(owner, kind) for owner, kind in option_owners() if owner}

"""Fields that a trained model can be loaded with other values of, although its weights were trained with one of them.

`OVERRIDES` is the only list of these fields. `load_model` checks its argument `overrides` against it, every main that loads
a checkpoint makes its flags from it (`atma_jax.cli.define_override_flags`), and an evaluation records the values in effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from atma_jax.config import WITHOUT_ATTENTION, ModelConfig, RetentionCap
from atma_jax.errors import UserError, unknown_name

WITHOUT = ("none", "None")  # how a command line spells None


@dataclasses.dataclass(frozen=True)
class Override:
  """One overridable field.

  Attributes:
    name: the key in `overrides`, and the flag.
    help: what its flag says.
    label: how a report tells a model apart that was loaded with a value, or "" where the settings of a result do.
    refusal: ``(model configuration, value) -> reason`` why such a model cannot take the value, or "".
    legal: its legal values in words.
  """

  name: str
  help: str
  label: str = ""
  refusal: Callable[[ModelConfig, Any], str] = lambda config, value: ""
  legal: str = "a number of keys, or 0 for no end"

  def parse(self, value: Any, prefix: str = "--") -> Any:
    """A value as it is applied: None stands for "without", which may also be written 0 or "none".

    Raises:
      UserError: not a legal value; the message begins with `prefix` and the field's name.
    """
    if value is None or (isinstance(value, str) and value in WITHOUT):
      return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
      raise UserError(f"{prefix}{self.name}={value}: must be {self.legal}")
    return value or None


class _RetentionCapOverride(Override):
  """A number of tokens holds every head; a `RetentionCap` says which."""

  def parse(self, value: Any, prefix: str = "--") -> RetentionCap | None:
    if value is None or (isinstance(value, str) and value in WITHOUT):
      return None
    if isinstance(value, RetentionCap):
      return value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
      raise UserError(f"{prefix}{self.name}={value}: must be a half-life in tokens, greater than 0")
    return RetentionCap(value)


class SwitchOverride(Override):
  """A field that is on or off; None is off."""

  def parse(self, value: Any, prefix: str = "--") -> bool:
    if value is None or (isinstance(value, str) and value in WITHOUT):
      return False
    if not isinstance(value, bool):
      raise UserError(f"{prefix}{self.name}={value}: must be {self.legal}")
    return value


def _counts_no_keys(config: ModelConfig, value: Any) -> str:
  if set(config.block_pattern) <= set(WITHOUT_ATTENTION):
    return "only polar attention counts its keys, and the model has no attention"
  if config.attention != "polar":
    return f"only polar attention counts its keys, and the model's is {config.attention}"
  return ""


def _has_no_attention(config: ModelConfig, value: Any) -> str:
  if value is not None and set(config.block_pattern) <= set(WITHOUT_ATTENTION):
    return "only attention has a window, and the model has no attention"
  return ""


def _has_no_memory(config: ModelConfig, value: Any) -> str:
  if not value:
    return ""
  if not config.memory.enabled:
    return "the model has no memory"
  return "" if set(config.block_pattern) - {"local"} else "only global and raven blocks have a memory, and the model has neither"


OVERRIDES: dict[str, Override] = {override.name: override for override in (
  Override("window", "Keys that each query may see, the latest ones; 0 is all of them.",
           "window {}", _has_no_attention),
  Override("null_length", "Visible keys at which polar attention's null stops growing, such as the training length; 0 is never; "
           "default is the model's own.", "null to {}", _counts_no_keys),
  Override("count_length", "Visible keys past which polar attention's null and magnitude are told the count relative to it, such "
           "as the training length; 0 is never; default is the model's own.", "counts to {}", _counts_no_keys),
  Override("memory_reset", "Tokens after which the memory begins again from zero, as if a new document began for it alone; 0 is "
           "never.", "memory reset every {}", _has_no_memory, "a number of tokens, or 0 for never"),
  SwitchOverride("memory_off", "Leave out what is read from the memory.", "memory off", _has_no_memory, "true or false"),
  _RetentionCapOverride("retention_cap", "Half-life in tokens that the memory is held to; default is none."),
)}
RETENTION_HEADS_HELP = "Heads held to --retention_cap: all, worst, or LAYER:HEAD pairs such as 6:3,10:1."
RECORDED = tuple(name for name, override in OVERRIDES.items() if override.label)  # fields of a model's configuration


def checked_overrides(overrides: Mapping[str, Any], prefix: str = "--") -> dict[str, Any]:
  """`overrides` with every value as it is applied (see `Override.parse`), before any model is known.

  Raises:
    UserError: a name that is not in `OVERRIDES`, or a value that is not legal.
  """
  for name in overrides:
    if name not in OVERRIDES:
      raise UserError(unknown_name("override", name, OVERRIDES))
  return {name: OVERRIDES[name].parse(value, prefix) for name, value in overrides.items()}


def refuse_unfitting(config: ModelConfig, overrides: Mapping[str, Any], checked: Mapping[str, Any]) -> None:
  """Raises `UserError` for the first of the `checked` overrides that a model of this configuration has no use for."""
  for name, value in checked.items():
    if reason := OVERRIDES[name].refusal(config, value):
      raise UserError(f"--{name}={overrides[name]}: {reason}")


def in_effect(config: ModelConfig) -> dict[str, int | bool]:
  """The overridable fields that are set in a model's configuration, by name: what a result of that model is labelled with."""
  return {name: value for name in RECORDED if (value := getattr(config, name)) is not None and value is not False}

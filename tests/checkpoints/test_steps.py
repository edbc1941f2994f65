"""Which step is loaded when reading one fails."""

from __future__ import annotations

from etils import epath
import jax
import pytest

from atma_jax.checkpoints.steps import newest_good_step
from atma_jax.errors import UserError

OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 13.22GiB")


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'atma_jax.models.mixers.own'"), OUT_OF_MEMORY])
def test_an_error_of_the_machine_is_no_damage(tmp_path, error):
  """An older step is not taken silently where the newest one is whole and this machine could not load it."""
  asked = []

  def load(step: epath.Path):
    asked.append(step.name)
    raise error

  with pytest.raises(type(error)):
    newest_good_step(epath.Path(tmp_path), [2, 1], load)
  assert asked == ["2"]


def test_an_error_of_the_file_is_damage(tmp_path):
  def load(step: epath.Path):
    raise ValueError(f"{step.name}: corrupt chunk")

  with pytest.raises(UserError, match=r"none of the steps .* can be restored"):
    newest_good_step(epath.Path(tmp_path), [2, 1], load)

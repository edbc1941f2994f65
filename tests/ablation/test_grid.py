"""Grids: ids of cells, presets, axes over any field, and errors."""

from __future__ import annotations

import pathlib

import pytest

from atma_jax import cli
from atma_jax.ablation.grid import expand, make_axis, parse_axis, preset, seed_axis
from atma_jax.cli import load_recipe
from atma_jax.config import Config
from atma_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent.parent / "configs"


def grid(*axes: str, **options):
  return expand([parse_axis(axis, cli.parse_field) for axis in axes], Config(), **options)


def test_paper_grids():
  cells = {name: expand(preset(name)[0], Config(), preset(name)[1]) for name in ("paper120", "paper100")}
  assert {name: len(c) for name, c in cells.items()} == {"paper120": 120, "paper100": 100}
  by_id = {cell.id: cell.config for cell in cells["paper120"]}
  assert {c.id for c in cells["paper100"]} < by_id.keys() and len(by_id) == 120
  best = by_id["polar__reg-baseline__distr-0__mem-1__win-0"]
  assert (best.model.attention, best.model.memory.enabled, best.model.window) == ("polar", True, None)
  assert (best.train.auxiliary.regularizer, best.train.auxiliary.distractors) == ("baseline", 0)
  other = by_id["rope__reg-zipfian__distr-1__mem-0__win-1"]
  assert (other.model.attention, other.model.memory.enabled, other.model.window) == ("rope", False, 1024)
  assert (other.train.auxiliary.regularizer, other.train.auxiliary.distractors) == ("zipfian", 2048)
  assert sum(cell.config.model.attention == "rope" for cell in cells["paper100"]) == 20


def test_raven_cells_have_their_published_ids_and_recipes():
  base = load_recipe(str(CONFIGS / "atma_378m.py"))
  base.train.steps = 1900
  cells = {cell.id: cell.config for cell in expand(*(preset("raven")[0], base, preset("raven")[1]))}
  for name, memory in (("raven_native", 0), ("atma_raven_titans", 1)):
    ours, recipe = cells[f"{name}__reg-baseline__distr-0__mem-{memory}__win-0"], load_recipe(str(CONFIGS / f"{name}.py"))
    ours.model.scan, ours.train.loss_chunk = recipe.model.scan, recipe.train.loss_chunk  # how it is computed
    assert (ours.model, ours.optimizer, ours.data, ours.train) == (recipe.model, recipe.optimizer, recipe.data, recipe.train)
  assert len(cells) == 2


def test_headline_cells():
  cells = expand(preset("headline")[0], load_recipe(str(CONFIGS / "headline.py")), preset("headline")[1])
  assert len(cells) == 27 and cells[0].id == "polar__mem-1__halflife-none__init-mimetic"
  bounded = [cell.config.model.memory for cell in cells if "halflife-2x" in cell.id]
  assert len(bounded) == 9 and all(memory.enabled and memory.max_half_life == 1024 for memory in bounded)


def test_axes_over_any_field():
  cells = grid("config.optimizer.muon_learning_rate=0.01,0.02", "model.window=None,8",
               "model.block_pattern=('local','global'),global")
  assert [c.id for c in cells[:3]] == [
    "muon_learning_rate-0.01__win-none__block_pattern-local+global", "muon_learning_rate-0.01__win-none__block_pattern-global",
    "muon_learning_rate-0.01__win-8__block_pattern-local+global"]
  assert cells[-1].config.model.block_pattern == ("global",) and cells[-1].config.optimizer.muon_learning_rate == 0.02
  assert cells[0].labels == {"muon_learning_rate": "muon_learning_rate-0.01", "win": "win-none",
                             "block_pattern": "block_pattern-local+global"}


def test_seeds_and_exclusions():
  cells = expand([make_axis("model.attention", ("polar", "rope")), seed_axis((0, 7))], Config(), ["rope,seed-7"])
  assert [c.id for c in cells] == ["polar__seed-0", "polar__seed-7", "rope__seed-0"]
  assert (cells[1].config.train.seed, cells[1].config.data.shuffle_seed) == (7, 7)


@pytest.mark.parametrize("axes, words", [
  (["model.attention=polar,linear"], "cell linear: config.model.attention='linear': must be one of polar"),
  (["model.atention=polar"], "atention.*did you mean 'attention'"),
  (["model.attention"], "must be FIELD=VALUE"),
  (["model.window=8,many"], "config.model.window=many: must be of type"),
  (["model.window=8,8"], "two cells are called 'win-8'"),
  (["model.window=8", "model.window=9"], "two axes are called 'win'"),
])
def test_bad_axes_are_one_line(axes, words):
  with pytest.raises(UserError, match=words):
    grid(*axes)


def test_bad_exclusion():
  with pytest.raises(UserError, match=r"win-9.*did you mean 'win-8'"):
    grid("model.window=8", exclude=["win-9"])

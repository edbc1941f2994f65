"""Sweeps: flags, cells and results that are wrong end in one line before anything is trained, or are left out and counted."""

from __future__ import annotations

import copy
import json
import pathlib
import string

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.ablation import grid
from atma_jax.ablation.cell_process import run_cell
from atma_jax.ablation.results import gather, read_results, table_files
from atma_jax.ablation.summary import write_summary
from atma_jax.ablation.sweep import CellFolder, Evaluation, create, find
from atma_jax.ablation.worker import Worker
from atma_jax.claims import Claims, hold
from atma_jax.cli import parse_field
from atma_jax.config import Config
from atma_jax.errors import UserError
from tests.faults import tiny_run

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=6)


@pytest.mark.parametrize(("arguments", "words"), [
  (["--suite=zzz"], "'zzz' does not exist"),
  (["--multiples=0"], "--multiples=0"),
  (["--seeds="], "--seeds="),
  (["--axis=name=../../evil,b"], "the name of a cell is its id"),
  (["--axis=data.tokenizer=../../../etc/nothing", "--list"], "../../../etc/nothing"),
  (["--config.name=../../evil"], "config.name"),
  (["--axis=model.window=" + ",".join(map(str, range(1, 300))), "--axis=train.steps=" + ",".join(map(str, range(1, 300)))],
   "more than 10000 cells"),
])
def test_flags_are_refused_before_anything_is_made(main, tmp_path, arguments, words):
  done = main("ablate", f"--config={tiny_run.recipe_file()}", f"--output={tmp_path / 'sweep'}", *arguments, timeout=60)
  tiny_run.one_line(done, words)
  assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("options", [{"suite": ()}, {"suite": ("zzz",)}, {"suite": ("loss", "")}, {"multiples": ()},
                                     {"trials": 0}, {"multiples": (1, 0)}, {"multiples": (-1,)}, {"batch_tokens": 0},
                                     {"min_documents": 0}])
def test_evaluations_are_checked_when_they_are_made(options):
  with pytest.raises(UserError, match=f"--{next(iter(options))}"):
    Evaluation(**options)


@pytest.mark.parametrize(("axis", "words"), [
  ("model.block_pattern=(local", "parentheses do not match"), ("model.block_pattern=local),(global", "parentheses do not match"),
  ("model.window=1,,2", "a value is missing"), ("model.window=1,", "a value is missing"),
  ("model.window=,", "a value is missing"),
  ("model.window=", "must be FIELD=VALUE"), ("", "must be FIELD=VALUE"), ("config.name=a,b", "the name of a cell is its id")])
def test_axes_are_lists_of_values(axis, words):
  with pytest.raises(UserError, match=words):
    grid.parse_axis(axis, parse_field)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(string.printable + "\0é日"), max_size=40), st.sampled_from(
  ["model.window", "name", "data.tokenizer", "model.block_pattern", "train.seed", "model.attention", "zzz"]))
def test_an_axis_is_parsed_or_refused_and_names_folders(text, field):
  try:
    cells = grid.expand([grid.parse_axis(f"{field}={text}", parse_field)], Config())
  except UserError:
    return
  for cell in cells:
    assert pathlib.PurePath(cell.id).name == cell.id and len(cell.id) <= 200 and not cell.id.startswith(".")


@pytest.fixture
def cells(tmp_path) -> list[CellFolder]:
  """Two cells of the tiny recipe, with results."""
  axes = [grid.make_axis("model.window", (8, 16))]
  folders = create(tmp_path, grid.expand(axes, tiny_run.recipe()), Evaluation(suite=("loss",), multiples=(1,), min_documents=1))
  for folder in folders:
    described = folder.describe()
    measure = {"measure": "document_loss", "length": 32, "value": 2.0, "n": 4, "standard_error": 0.1, "interval": [1.9, 2.1]}
    (folder.path / "result.json").write_text(json.dumps({
      "schema": 1, "id": folder.id, "labels": described["labels"], "config": described["config"], "parameters": 10,
      "seconds": 1.0, "hardware": "1 x cpu", "jax": "0", "training": {"loss": [[1, 5.0]], "validation": []},
      "measures": [measure]}))
  return folders


BROKEN = [b"", b"[]", b"{}", b"null", b"5", b'{"seconds"', b"\xff\xfe", b"[" * 100_000, b'{"schema": 1, "id": "win-8"}']


@pytest.mark.parametrize("content", BROKEN)
def test_a_cell_that_describes_none_is_one_line(cells, tmp_path, content):
  (cells[0].path / "cell.json").write_bytes(content)
  for act in (cells[0].describe, cells[0].config, lambda: Worker(cells, lambda folder: ["false"]).run(),
              lambda: run_cell(cells[0].path)):
    with pytest.raises(UserError, match=r"cell\.json"):
      act()
  assert cells[0].progress() == (0.0, None)


@pytest.mark.parametrize("change", [
  {"config": {"model": 5}}, {"config": {"zzz": 1}}, {"config": {"model": {"width": "x"}}}, {"config": {"data": {"sources": 3}}},
  {"config": {"train": {"steps": -1}}}, {"evaluation": {"suite": 5}}, {"evaluation": {"suite": ["zzz"]}},
  {"evaluation": {"z": 1}},
  {"evaluation": {"multiples": [0]}}, {"evaluation": {"trials": "x"}}, {"labels": {"win": 3}}, {"id": "another"}, {"schema": 7}])
def test_a_cell_of_illegal_content_is_one_line(cells, change):
  described = cells[0].describe()
  (cells[0].path / "cell.json").write_text(json.dumps(described | change))
  with pytest.raises(UserError, match=r"cell\.json"):
    Worker(cells, lambda folder: ["false"]).run()


@pytest.mark.parametrize("content", BROKEN)
def test_a_damaged_result_is_left_out_and_counted(cells, tmp_path, content, caplog):
  (cells[1].path / "result.json").write_bytes(content)
  write_summary(tmp_path, find(tmp_path))
  assert any("1 results are damaged and left out" in record.getMessage() for record in caplog.records)
  (cells[0].path / "result.json").write_bytes(content)
  with pytest.raises(UserError, match=r"no cell is done yet.*2 results are damaged"):
    write_summary(tmp_path, find(tmp_path))


def paths_of(value, path=()):
  yield path
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, inner in items:
    yield from paths_of(inner, (*path, key))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_of_another_kind_in_a_result_is_left_out_or_makes_a_table(tmp_path_factory, data):
  """One value of a good result is replaced: what is kept can be tabulated."""
  folder = CellFolder(tmp_path_factory.mktemp("cell") / "win-8")
  folder.path.mkdir()
  good = {"id": "win-8", "labels": {"win": "win-8"},
          "config": {"data": {"sequence_length": 32, "batch_size": 4}, "train": {"steps": 8}},
          "parameters": 10, "seconds": 1.0, "hardware": "cpu", "training": {"loss": [[1, 5.0]], "validation": [[1, 4.0]]},
          "measures": [{"measure": "loss", "length": 32, "value": 2.0, "n": 4, "standard_error": 0.1, "interval": [1.9, 2.1]},
                       {"measure": "loss", "length": 32, "value": 2.0}]}
  changed = copy.deepcopy(good)
  *path, last = data.draw(st.sampled_from([path for path in paths_of(good) if path]))
  owner = changed
  for key in path:
    owner = owner[key]
  owner[last] = data.draw(JSON)
  (folder.path / "result.json").write_text(json.dumps(changed))
  axes, rows, results = gather([folder])
  assert len(results) + len(read_results([folder])[1]) == 1
  table_files(rows, axes)


@pytest.mark.parametrize("content", BROKEN)
def test_other_files_of_a_cell(cells, content):
  """A failure that cannot be read is a failure; records of training that are none are skipped."""
  (cells[0].path / "failed.json").write_bytes(content)
  assert cells[0].failure()["attempt"] == 0
  (cells[0].path / "metrics.jsonl").write_bytes(content)
  assert cells[0].progress() == (0.0, None)
  (cells[0].path / "claim.0").write_bytes(content)
  assert Claims().owner(cells[0].path).startswith("unknown")


def test_a_cell_that_somebody_trains_in_is_not_run(cells, tmp_path):
  (cells[0].path / "result.json").unlink()
  claim = hold(cells[0].path, "--workdir")
  assert Worker(cells[:1], lambda folder: ["false"]).run() == "finished"  # left to its owner
  assert cells[0].failure() is None
  with pytest.raises(UserError, match="in use by"):
    run_cell(cells[0].path)
  claim.release()


def test_an_evaluation_that_the_data_is_too_short_for_is_refused_before_training(tmp_path):
  tiny_run.prepared()
  axes = [grid.make_axis("model.window", (8,))]
  [cell] = create(tmp_path, grid.expand(axes, tiny_run.recipe()), Evaluation(suite=("loss",), multiples=(1000,)))
  with pytest.raises(UserError, match="held-out documents"):
    run_cell(cell.path)
  assert not (cell.path / "checkpoints").exists()

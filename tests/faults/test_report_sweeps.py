"""Sweeps whose files are not what they should be: results are left out and counted, cells are named in one line."""

from __future__ import annotations

import copy
import json
import logging
import pathlib
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.ablation.grid import expand, make_axis
from atma_jax.ablation.results import gather
from atma_jax.ablation.summary import write_summary
from atma_jax.ablation.sweep import CellFolder, Evaluation, create, find, write_json
from atma_jax.config import Config
from atma_jax.errors import UserError

ODD = [None, True, -1, 0, 1e308, 2**63, 1.5, "x", "", [], [1], ["a"], {}, {"a": 1}, [[]], [[1, 2, 3]], "a$b^$", "<script>"]


def result_of(folder: CellFolder) -> dict[str, Any]:
  description = folder.describe()
  return {"schema": 1, "id": folder.id, "labels": description["labels"], "config": description["config"], "parameters": 1000,
          "seconds": 5.0, "hardware": "1 x cpu", "jax": "0",
          "measures": [{"measure": "document_loss", "length": 2048 * m, "value": 2.0, "n": 4, "interval": [1.0, 3.0]}
                       for m in (1, 2)],
          "training": {"loss": [[1, 5.0], [2, 4.0]], "validation": [[2, 4.5]], "tokens_per_second": 9.0}}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> pathlib.Path:
  """Two cells that are done."""
  directory = tmp_path_factory.mktemp("sweep")
  for folder in create(directory, expand([make_axis("model.attention", ("polar", "nope"))], Config()), Evaluation()):
    write_json(folder.path / "result.json", result_of(folder))
  return directory


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
  """The paths of all values that a report uses."""
  inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  found = [path] if path else []
  for key, item in inside:
    if path != ("config",) or key in ("train", "data"):
      found += places(item, (*path, key))
  return found


def write_changed(data: st.DataObject, path: pathlib.Path, original: dict[str, Any]) -> None:
  """Writes a JSON file with one value replaced or left out, or something else altogether."""
  values = copy.deepcopy(original)
  *way, last = data.draw(st.sampled_from(places(values)))
  owner: Any = values
  for part in way:
    owner = owner[part]
  if data.draw(st.integers(0, 3)) or isinstance(owner, list):
    owner[last] = data.draw(st.sampled_from(ODD))
  else:
    del owner[last]
  other = data.draw(st.sampled_from([None] * 8 + ["[]", "null", "{}", '{"id": "x", "lab', "[" * 100_000, '"x"']))
  path.write_text(json.dumps(values) if other is None else other)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_results_are_gathered(sweep, data):
  """One result of two is changed: it is used or left out, the other one is used."""
  path = find(sweep)[0].path / "result.json"
  original = json.loads(path.read_text())
  try:
    write_changed(data, path, original)
    _, rows, results = gather(find(sweep))
    assert 1 <= len(results) <= 2 and len(rows) >= 4
    assert find(sweep)[0].result() is None or len(results) == 2
  finally:
    path.write_text(json.dumps(original))


@given(st.data())
@settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
def test_reports_are_written(sweep, data):
  """All files of the report, whatever one result holds."""
  path = find(sweep)[0].path / "result.json"
  original = json.loads(path.read_text())
  try:
    write_changed(data, path, original)
    assert write_summary(sweep, find(sweep))
  finally:
    path.write_text(json.dumps(original))


def test_malformed_results_are_counted(sweep, caplog):
  """One of two; and none of two is an error of one line."""
  first, second = (cell.path / "result.json" for cell in find(sweep))
  contents = first.read_text(), second.read_text()
  try:
    first.write_text("[]")
    with caplog.at_level(logging.WARNING):
      gather(find(sweep))
    assert "1 of 2 results are malformed and left out" in caplog.text and "must be an object, not a list" in caplog.text
    second.write_text("{")
    with pytest.raises(UserError, match="2 of 2 results are malformed"):
      write_summary(sweep, find(sweep))
  finally:
    first.write_text(contents[0])
    second.write_text(contents[1])


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_cells_of_other_types(sweep, tmp_path_factory, data):
  """A cell is a configuration that is legal, or one line."""
  folder = tmp_path_factory.mktemp("cells") / "cell"
  folder.mkdir()
  write_changed(data, folder / "cell.json", json.loads((find(sweep)[0].path / "cell.json").read_text()))
  (folder / "metrics.jsonl").write_text('[]\n{"step": "x"}\n{"step": 5, "seconds_per_step": null}\nnull\n' + "[" * 5000 + "\n")
  (folder / "failed.json").write_text(data.draw(st.sampled_from(["[]", "{}", "null", '{"exit_code": "x"}', "{"])))
  cell = CellFolder(folder)
  assert cell.failure() is None
  try:
    cell.config().validate()
    assert cell.progress() == (0.0, None)
  except UserError as error:
    assert len(str(error).splitlines()) == 1

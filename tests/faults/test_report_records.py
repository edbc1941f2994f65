"""Reports of records from strangers: what is malformed is left out and counted, and names are shown as they stand."""

from __future__ import annotations

import copy
import json
import logging
import re
from typing import Any
import xml.etree.ElementTree as ElementTree

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.config import Config
from atma_jax.errors import UserError
from atma_jax.evaluation.records import ResultsFile, parse_records
from atma_jax.evaluation.report import plots
from atma_jax.evaluation.report.comparisons import Setting
from atma_jax.evaluation.report.curves import draw_curves
from atma_jax.evaluation.report.drawing import plain
from atma_jax.evaluation.report.figures import loss_panels
from atma_jax.evaluation.report.page import write_report
from atma_jax.evaluation.report.sweep_tables import latex, markdown

CONFIG = json.loads(json.dumps(Config().to_dict()))
EVIL = ("a$b^$", "$", "$$", r"\$x$", r"$\frac{", "_hidden", "<script>alert(1)</script>", "a\nb\x00\x1b[31m", "%&{}~", "x" * 5000,
        "\N{PARTY POPPER}", "'\"><img src=x onerror=alert(1)>", "|", "")


def record(suite: str, measure: str, length: int, value: float | None, **fields: Any) -> dict[str, Any]:
  return {"schema": 1, "checkpoint": "/runs/a", "step": 100, "name": "a", "suite": suite, "settings": {}, "measure": measure,
          "length": length, "value": value, "n": 8, "standard_error": 0.01, "interval": None, "bins": None,
          "training_length": 256, "config": CONFIG, "jax": "0", "hardware": "1 x test", "code": "0.1.0", "seconds": 1.0,
          "status": "ok", **fields}


BINS = [{"start": s, "stop": 2 * s + 1, "value": 4.0, "standard_error": 0.1} for s in (0, 1, 3)]
QUANTILES = [{"quantile": q, "value": 3.0} for q in (0.05, 0.5, 0.95, 1.0)]
GOOD = [
  record("loss", "document_loss", 256, 3.0), record("loss", "stream_loss", 512, 3.0), record("loss", "position_loss", 31, 3.0,
                                                                                             bins=BINS),
  record("needle", "needle_accuracy", 256, 0.9, interval=[0.1, 0.95]),
  record("retrieval", "retrieval_exact", 256, 0.5, settings={"task": "niah", "haystack": "text", "depth": 0.1},
         interval=[0.0, 1.0]),
  record("babilong", "babilong_exact", 0, 0.5, settings={"task": "qa1"}), record("bpb", "bits_per_byte", 256, 1.5),
  record("diagnostics", "n_eff", 256, 5.0, layer=1),
  record("retention", "half_life_measured", 0, 9.0, layer=1, head=0, bins=QUANTILES),
  record("loss", "stream_loss", 2048, None, status="out_of_memory", reason="9 GiB", program_gib=1.0)]

ODD = st.sampled_from([None, True, -1, 0, 1e308, -1e308, 2**63, 1.5, "x", "", [], [1], [1, 2, 3], ["a", "b"], {}, {"a": 1}, [[]],
                       [{}], [None], *EVIL])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
  """The paths of all values inside a record; of its configuration, only those that are shown."""
  inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  found = [path] if path else []
  for key, item in inside:
    if not (path == ("config",) and key != "model") and not (path == ("config", "model") and key == "block_pattern"):
      found += places(item, (*path, key))
  return found


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
  """A good record with one or two values replaced or left out."""
  found = copy.deepcopy(draw(st.sampled_from(GOOD)))
  for _ in range(draw(st.integers(1, 2))):
    *path, last = draw(st.sampled_from(places(found)))
    owner = found
    for part in path:
      owner = owner[part]
    if draw(st.integers(0, 4)) or isinstance(owner, list):
      owner[last] = draw(ODD)
    else:
      del owner[last]
  return found


@given(st.lists(changed() | ODD, min_size=60, max_size=60))
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate],
          suppress_health_check=list(HealthCheck))
def test_records_of_other_types(tmp_path_factory, records):
  """A report of good records is written whatever stands between them."""
  folder = tmp_path_factory.mktemp("report")
  (folder / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in [*GOOD, *records]))
  write_report([folder / "results.jsonl"], folder / "report.html")
  page = (folder / "report.html").read_text()
  assert "<script>alert" not in page and "<img src=x" not in page and "Loss against context length" in page


@given(changed() | ODD)
@settings(max_examples=150, deadline=None)
def test_records_are_judged_when_they_are_read(tmp_path_factory, item):
  """Reading never fails; what is read again by an evaluation has the fields that its tables use."""
  path = tmp_path_factory.mktemp("records") / "results.jsonl"
  path.write_text(json.dumps(item) + "\n" + json.dumps(GOOD[0]) + "\n")
  records = ResultsFile(path).records
  assert records[-1] == GOOD[0]
  assert all(isinstance(r["measure"], str) and isinstance(r["length"], int) for r in records)


def test_malformed_records_are_counted(tmp_path, caplog):
  """Three of twelve, with the first reason; with no good record left, the file is named."""
  path = tmp_path / "results.jsonl"
  lines = [json.dumps(item) for item in GOOD[:9]]
  path.write_text("\n".join([*lines, "[]", '{"schema": 1, "measure": 5}', "[" * 100_000]) + "\n")
  with caplog.at_level(logging.WARNING):
    records, line = parse_records(path.read_bytes(), path)
  assert len(records) == 9 and line == (
    f"3 of 12 records in {path} are malformed and left out: line 10: the value must be an object, not a list")
  path.write_text("[]\n" * 3)
  with pytest.raises(UserError, match=r"holds no results: 3 of 3 records in .* are malformed"):
    write_report([path], tmp_path / "report.html")


def test_names_in_figures():
  """A dollar begins no formula, nothing is hidden, and an SVG stays well-formed."""
  assert ElementTree.fromstring(loss_panels({name: {plain(name): [GOOD[0]], name: [GOOD[0]]} for name in EVIL[:6]})) is not None
  figure, axes = plots.new_plot("".join(EVIL), "heading")
  for name in EVIL:
    plots.draw_series(axes, [GOOD[0]], plain(name), "k", "o")
  assert len(axes.get_legend_handles_labels()[1]) == len(EVIL)
  assert plots.png(figure, axes).startswith(b"\x89PNG")
  sweep = [Setting((("attention", name), ("model", name)), "document_loss", 2.0, 1, 3.0, None, None, None, 2.9, 3.1)
           for name in EVIL]
  content = draw_curves("$", sweep)
  assert content is not None and content.startswith(b"\x89PNG")


@given(st.text(max_size=40) | st.sampled_from(EVIL))
@settings(max_examples=150, deadline=None)
def test_names_in_tables(text):
  """Rows keep their cells, Markdown holds no HTML, LaTeX no command of the name's."""
  table = [("caption", ["a", "b"], [[text, "1"]])]
  row = markdown(table).splitlines()[-1]
  assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 and "<" not in row
  cell = latex(table).split("\\midrule\n")[1].split("\n\\bottomrule")[0]
  assert "\n" not in cell and len(re.findall(r"(?<!\\)&", cell)) == 1
  assert not re.search(r"(?<!\\)[%#]", cell)
  assert set(re.findall(r"\\[a-zA-Z]+", cell)) <= {"\\to", "\\pm", "\\textbackslash", "\\textasciitilde", "\\textasciicircum"}

"""Contrasts, intervals, tables and dashboard of results whose numbers are known."""

from __future__ import annotations

import json
import re

import matplotlib.image
import numpy as np
from plotly.offline import get_plotlyjs
from pyarrow import csv, parquet
import pytest

from atma_jax.ablation.contrasts import find_contrasts, seed_means, student_interval
from atma_jax.ablation.grid import expand, make_axis, seed_axis
from atma_jax.ablation.results import gather
from atma_jax.ablation.summary import write_summary
from atma_jax.ablation.sweep import Evaluation, create, write_json
from atma_jax.config import Config
from atma_jax.errors import UserError
from atma_jax.evaluation.report.curves import line_styles

EFFECT = {"polar": 0.0, "nope": 0.2, "mem-0": 0.1, "mem-1": 0.0, "seed-0": 0.0, "seed-1": 0.01}


@pytest.fixture
def cells(tmp_path):
  """Polar and nope, memory on and off, two seeds. The document loss is 2 plus the sum of the effects, and 0.1 less at 2x."""
  axes = [make_axis("model.attention", ("polar", "nope")), make_axis("model.memory.enabled", (True, False)), seed_axis((0, 1))]
  folders = create(tmp_path, expand(axes, Config()), Evaluation())
  for folder in folders:
    description = folder.describe()
    effect = sum(EFFECT[label] for label in description["labels"].values())
    flip = 0.05 if folder.id == "nope__mem-1__seed-1" else 0.0
    measures = [{"measure": "document_loss", "length": 2048 * m, "value": 2.1 - 0.1 * m + effect, "n": 4, "standard_error": 0.01,
                 "interval": None} for m in (1, 2)]
    needle = {"measure": "needle_accuracy", "length": 2048, "value": 0.9 - effect + flip, "n": 60, "interval": [0.1, 0.95]}
    measures.append(needle)
    measures.append({"measure": "needle_accuracy", "length": 4096, "value": None, "n": 0, "interval": None})
    write_json(folder.path / "result.json", {
      "id": folder.id, "labels": description["labels"], "config": description["config"], "parameters": 1000, "seconds": 5.0,
      "hardware": "1 x cpu", "measures": measures,
      "training": {"loss": [[i, 5.0 - 0.01 * i] for i in range(1, 301)], "validation": [[300, 2.5]], "tokens_per_second": 9.0}})
  return folders


def test_contrasts_are_matched(cells):
  axes, rows, _ = gather(cells)
  assert axes == ["attention", "mem", "seed"]
  found = {(c.axis, c.measure, c.multiple): c for c in find_contrasts(rows, axes)}
  assert "seed" not in {axis for axis, _, _ in found}
  attention = found["attention", "document_loss", 2.0]
  assert (attention.first, attention.second, attention.pairs, attention.wins, attention.ties) == ("polar", "nope", 4, 0, 0)
  np.testing.assert_allclose([attention.difference, attention.low, attention.high], 0.2, atol=1e-12)
  memory = found["mem", "needle_accuracy", 1.0]
  assert (memory.first, memory.second, memory.pairs, memory.wins) == ("1", "0", 4, 0)
  np.testing.assert_allclose(memory.difference, -0.1 - 0.05 / 4, atol=1e-12)
  assert memory.low < memory.difference < memory.high
  assert ("mem", "needle_accuracy", 2.0) not in found  # nothing was measured there


def test_seed_intervals(cells):
  axes, rows, _ = gather(cells)
  polar = next(s for s in seed_means(rows, axes) if s.name == "polar mem=1" and s.measure == "document_loss" and s.multiple == 1)
  assert polar.seeds == 2
  np.testing.assert_allclose(polar.mean, 2.005)
  np.testing.assert_allclose(polar.high - polar.mean, 12.7062047 * 0.01 / np.sqrt(2) / np.sqrt(2), rtol=1e-6)  # t(0.975, 1)
  np.testing.assert_allclose((polar.least, polar.most), (2.0, 2.01))
  assert student_interval([1.0]) == (None, None)


def test_report_files(cells, tmp_path):
  (cells[-1].path / "result.json").unlink()
  write_summary(tmp_path, cells)
  rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  assert parquet.read_table(tmp_path / "results.parquet").to_pylist() == rows
  assert csv.read_csv(tmp_path / "results.csv").num_rows == len(rows) == 7 * 6
  assert next(r["value"] for r in rows if r["measure"] == "train_loss") == pytest.approx(5 - 0.01 * 285.5)
  markdown, latex = (tmp_path / "tables.md").read_text(), (tmp_path / "tables.tex").read_text()
  assert "| polar mem=1 | 2.005 ± 0.064 | 1.905 ± 0.064 |" in markdown
  assert "| attention | polar -> nope | document loss (nats) | 2x |" in markdown and "0 of 3" in markdown
  assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 4 and "(\\%)" in latex
  height, width, _ = matplotlib.image.imread(tmp_path / "curves.png").shape
  assert (height, width) == (5.0 * 140, 2 * 7.0 * 140)  # two panels, documents and needle: there is no stream loss
  page = (tmp_path / "dashboard.html").read_text()
  assert "default-src 'none'" in page and "</script" not in get_plotlyjs()
  page = page.replace(get_plotlyjs(), "")
  assert len(page) < 40_000  # nothing is loaded from elsewhere
  assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", page)
  data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))
  assert len(data["cells"]) == 7 and data["unfinished"] == 1 and data["cells"][0]["labels"]["attention"] == "polar"
  assert len(data["cells"][0]["loss"]) <= 200 and data["cells"][0]["loss"][-1] == [300, 2.0]


def test_a_line_style_for_every_setting(cells):
  """Every setting has a colour; without colour, the marker tells attention, the first axis, apart and the dashes memory."""
  axes, rows, _ = gather(cells)
  settings = seed_means(rows, axes)
  styles = line_styles(settings)
  assert len(styles) == len({color for color, _, _ in styles.values()}) == 4
  assert styles["polar mem=1"][2] == styles["polar mem=0"][2] != styles["nope mem=1"][2]
  assert styles["polar mem=1"][1] == styles["nope mem=1"][1] != styles["polar mem=0"][1]
  assert {s.words for s in settings} == {"polar attention + memory", "polar attention", "nope + memory", "nope"}


def test_nothing_done_is_said(tmp_path):
  cells = create(tmp_path, expand([], Config()), Evaluation())
  with pytest.raises(UserError, match="no cell is done yet"):
    write_summary(tmp_path, cells)

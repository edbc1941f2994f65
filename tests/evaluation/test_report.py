"""The report of made-up results: one page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import re
from typing import Any
import xml.etree.ElementTree as ElementTree

import pytest

from atma_jax.config import Config
from atma_jax.errors import UserError
from atma_jax.evaluation.records import ResultsFile
from atma_jax.evaluation.report.page import render_page, write_report
from atma_jax.evaluation.report.runs import group_runs
from atma_jax.evaluation.suites import all_suites

LENGTHS = (256, 512, 1024)


def record(name: str, suite: str, measure: str, length: int, value: float | None, settings: dict[str, Any] | None = None,
           **fields: Any) -> dict[str, Any]:
  return {"schema": 1, "checkpoint": f"/runs/{name}", "step": 100, "name": name, "suite": suite, "settings": settings or {},
          "measure": measure, "length": length, "value": value, "n": 8, "standard_error": 0.01, "interval": None, "bins": None,
          "training_length": 256, "config": Config().to_dict(), "jax": "0", "hardware": "1 x test", "code": "0.1.0 abc",
          "seconds": 1.0, **fields}


def results(name: str, shift: float) -> list[dict[str, Any]]:
  """Records of every suite."""
  made = []
  for i, length in enumerate(LENGTHS):
    made += [record(name, "loss", m, length, 3 - 0.1 * i + shift) for m in ("document_loss", "stream_loss")]
    made += [record(name, "bpb", "bits_per_byte", length, 1.5 - 0.05 * i)]
    made += [record(name, "needle", m, length, 0.9 - 0.2 * i, interval=[0.1, 0.95])
             for m in ("needle_accuracy", "needle_exact", "absent_accuracy")]
    made += [record(name, "retrieval", m, length, 1 - 0.3 * i - depth / 10,
                    {"task": task, "haystack": hay, "depth": depth}, interval=[0.0, 1.0])
             for m in ("retrieval_accuracy", "retrieval_exact") for task in ("passkey", "niah") for hay in ("filler", "text")
             for depth in (0.1, 0.5, 0.9)]
    made += [record(name, "lookup", measure, length, 0.9 - 0.2 * i,
                    {"task": "multikey-8", "haystack": "text", "wording": wording}, interval=[0.1, 0.95], chance=0.125)
             for measure, wording in (("multikey-8_exact", "seen"), ("multikey-8_unseen_exact", "unseen"))]
    made += [record(name, "mqar", f"mqar-{pairs}_exact", length, 0.9 - 0.2 * i, {"pairs": pairs, "haystack": "text",
                                                                              "wording": "seen"}) for pairs in (4, 16)]
    made += [record(name, "babilong", "babilong_exact", i and 512 << i, 0.5, {"task": "qa1"}, interval=[0.3, 0.7])]
    made += [record(name, "diagnostics", "n_eff", length, 5.0 + layer + i, layer=layer) for layer in range(4)]
  bins = [{"start": s, "stop": 2 * s + 1, "value": 4 - 0.2 * s**0.2, "standard_error": 0.1} for s in (0, 1, 3, 7, 15)]
  made += [record(name, "loss", "position_loss", 31, 3.0, bins=bins)]
  made += [record(name, "retention", f"half_life_{kind}", 0, 2.0**(layer * 4 + head) if layer + head < 5 else None, layer=layer,
                  head=head) for kind in ("zero_input", "measured") for layer in (2, 3) for head in range(3)]
  return made


@pytest.fixture(scope="module")
def page():
  failed = record("one", "loss", "stream_loss", 2048, None, status="out_of_memory", reason="<needs> 9 GiB")
  return render_page([*results("one", 0.0), *results("two", 0.2), failed])


def test_one_page_with_nothing_from_elsewhere(page):
  """All figures are inside and well-formed, no address points elsewhere, and all sections are there."""
  assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page) and "@import" not in page and "url(" not in page
  pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]
  assert len(pictures) == 9
  for picture in pictures:
    assert ElementTree.fromstring(picture).tag.endswith("svg")
  for title in ("Loss against context length", "Loss by position", "Bits per byte", "Induction needle", "Retrieval", "Lookup",
                "Associative", "BABILong", "Retention", "Diagnostics", "Not measured", "All numbers"):
    assert title in page
  assert page.count("one, step 100") > 3 and page.count("two, step 100") > 3
  assert "&lt;needs&gt; 9 GiB" in page and "out of memory" in page and "never" in page


def test_the_latest_record_counts_and_checkpoints_stay_apart():
  """Of two records of one measurement the later counts; other caps, overrides and directories make runs of their own."""
  first, second = record("a", "loss", "document_loss", 256, 3.0), record("a", "loss", "document_loss", 256, 2.0, {"trials": 9})
  capped = record("a", "loss", "document_loss", 256, 1.0, {"retention_cap": "256 tokens, heads 2:1"})
  other = first | {"checkpoint": "/elsewhere/a"}
  stopped, counted = first | {"null_length": 256, "value": 0.5}, first | {"count_length": 256, "value": 0.25}
  runs = group_runs([first, second, capped, other, stopped, counted], all_suites())
  assert [run.records[0]["value"] for run in runs] == [2.0, 1.0, 3.0, 0.5, 0.25]
  assert len({run.label for run in runs}) == 5 and "null to 256" in runs[3].label and "counts to 256" in runs[4].label


def test_files_are_read_and_named(tmp_path):
  """Records without newer fields are shown; a missing, malformed or empty file is named in one line."""
  old = {k: v for k, v in record("old", "loss", "document_loss", 256, 3.0).items() if k != "code"}
  ResultsFile(tmp_path / "results.jsonl").append([old])
  write_report([tmp_path / "results.jsonl"], tmp_path / "report.html")
  assert "old, step 100" in (tmp_path / "report.html").read_text()
  assert json.loads((tmp_path / "results.jsonl").read_text())["name"] == "old"
  with pytest.raises(UserError, match="--report: cannot read"):
    write_report([tmp_path / "absent.jsonl"], tmp_path / "report.html")
  (tmp_path / "odd.jsonl").write_text(json.dumps(record("odd", "loss", "document_loss", 256, 3.0) | {"settings": None}) + "\n")
  with pytest.raises(UserError, match=r"odd\.jsonl holds no results: 1 of 1 records .* 'settings' must be an object, not null"):
    write_report([tmp_path / "odd.jsonl"], tmp_path / "report.html")
  (tmp_path / "empty.jsonl").write_text("{}\n")
  with pytest.raises(UserError, match=r"empty\.jsonl holds no results"):
    write_report([tmp_path / "empty.jsonl"], tmp_path / "report.html")

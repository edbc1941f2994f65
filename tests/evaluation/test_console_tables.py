"""The tables that `evaluate` prints: whole on a terminal of 100 columns, shares in percent."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from atma_jax.evaluation.report.console_tables import results_text, shares_text
from atma_jax.evaluation.suites import all_suites

SUITES = {name: dataclasses.replace(suite, table=None) for name, suite in all_suites().items()}
COLUMNS = [(name, column) for name, suite in SUITES.items() for column in suite.columns]


def records(columns, lengths=(512, 65536), value=0.9375):
  return [{"suite": suite, "measure": column, "length": length, "value": value}
          for suite, column in columns for length in lengths]


@given(st.lists(st.sampled_from(COLUMNS), min_size=1, unique=True), st.lists(st.integers(1, 1 << 24), min_size=1, max_size=5),
       st.sampled_from([0.0, 1.0, 12.3456, None]))
@settings(max_examples=100, deadline=None)
def test_tables_fit_100_columns(columns, lengths, value):
  """Whatever is measured: all of it is there, and every table begins with the lengths."""
  lines = results_text(records(columns, lengths, value), SUITES, 512).splitlines()
  assert max(map(len, lines)) <= 100
  words = " ".join(lines).split()
  assert all(words.count(column) == 1 for _, column in columns)
  tables = sum(line.startswith("  length") for line in lines)
  assert len([line for line in lines if line.strip()]) == tables * (1 + len(set(lengths)))


def test_shares_are_in_percent():
  text = results_text(records([("needle", "needle_exact"), ("loss", "document_loss")]), SUITES, 512)
  assert text.splitlines() == [
    "  length       x  document_loss  needle_exact", "     512       1         0.9375        93.8 %",
    "   65536     128         0.9375        93.8 %"]


@given(st.lists(st.text("ab c", min_size=1, max_size=120), min_size=1, max_size=3, unique=True),
       st.lists(st.integers(1, 1 << 24), min_size=1, max_size=9, unique=True))
@settings(max_examples=50, deadline=None)
def test_shares_fit_100_columns(labels, lengths):
  found = [{"measure": label, "length": length, "value": 0.5, "interval": [0.401, 1.0], "settings": {"trials": 24}}
           for label in labels for length in lengths]
  text = shares_text(found, "needle", lambda record: record["measure"])
  assert max(map(len, text.splitlines())) <= 100
  assert text.count("50 [40.1, 100.0]") == len(found)

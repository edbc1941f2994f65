"""Runs the cells of an evaluation: each is computed as a whole, recorded as a whole, and skipped once it is recorded."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import gc
import time

from absl import logging
import jax

from atma_jax import distributed
from atma_jax.evaluation.records import Record, ResultsFile, is_ok
from atma_jax.evaluation.resources import OutOfMemory
from atma_jax.evaluation.scoring import Scorer
from atma_jax.evaluation.suite import Cell
from atma_jax.progress import progress_bar


def run_cells(cells: Sequence[tuple[str, Cell]], results: ResultsFile, identity: Record, context: Record,
              scorer: Scorer) -> list[Record]:
  """Runs the cells that are not recorded yet, appends each as soon as it is done, and returns the records of all cells.

  Args:
    cells: with the names of their suites.
    results: the file of all records.
    identity: fields that say what is evaluated. Only records with the same ones count as known.
    context: fields that say how, for the records only.
    scorer: whose compilations and largest program are recorded.
  """
  records = []
  with progress_bar(sum(cell.tokens for _, cell in cells), "tok", enabled=jax.process_index() == 0) as bar:
    for suite, cell in cells:
      cell_identity = {**identity, "suite": suite, "settings": cell.settings}
      known = [results.find(cell_identity, *number) for number in cell.expected]
      bar.set_description(cell.label)
      all_known = all(record is not None and _is_final(record, context) for record in known)
      if distributed.from_first(str(all_known)) == "True":  # only process 0 knows the file
        records += filter(None, known)
        bar.update(cell.tokens)
        continue
      started, compiled, done = time.perf_counter(), scorer.compile_seconds, bar.n
      scorer.largest_program = 0
      try:
        measured = [dataclasses.asdict(m) | {"status": "ok"} for m in cell.run(bar.update)]
      except OutOfMemory as error:
        logging.warning("%s: out of memory: %s", cell.label, error)
        names = ("measure", "length", "layer", "head")
        measured = [dict(zip(names, number)) | {"value": None, "n": 0, "status": "out_of_memory", "reason": str(error)}
                    for number in cell.expected]
        bar.update(cell.tokens - (bar.n - done))
      gc.collect()  # frees what a failed cell held
      seconds = max(time.perf_counter() - started - (scorer.compile_seconds - compiled), 1e-9)
      rate = {"tokens_per_second": round(cell.tokens / seconds, 1)} if measured[0]["status"] == "ok" else {}
      results.append([{**cell_identity, **m, **context, "seconds": round(seconds, 3), "tokens": cell.tokens, **rate,
                       "program_gib": round(scorer.largest_program / 2**30, 3)} for m in measured])
      records += results.records[-len(measured):]
  return records


def _is_final(record: Record, context: Record) -> bool:
  """Whether measuring again would change nothing: true of numbers, and of failures on equal hardware within equal limits."""
  return is_ok(record) or (record["hardware"] == context["hardware"] and record["limits"] == context["limits"])

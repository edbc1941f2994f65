"""Evaluates a checkpoint directory: builds the cells of the suites, runs those not yet recorded, reports."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import gc
import pathlib
import time
from typing import Any

from absl import logging
import jax

from atma_jax import distributed
from atma_jax.checkpoints.load import load_model, overridden
from atma_jax.checkpoints.overrides import in_effect
from atma_jax.data.pipeline import heldout_documents, validation_stream
from atma_jax.errors import UserError, unknown_name
from atma_jax.evaluation.cells import Cell, Inputs
from atma_jax.evaluation.options import BabilongOptions, Options
from atma_jax.evaluation.records import ResultsFile
from atma_jax.evaluation.report import plots
from atma_jax.evaluation.resources import OutOfMemory, code_version, hardware
from atma_jax.evaluation.scoring import Scorer
from atma_jax.evaluation.suites.babilong import babilong_cells
from atma_jax.evaluation.suites.bpb import bits_per_byte_cells
from atma_jax.evaluation.suites.diagnostics import diagnostics_cells, diagnostics_table
from atma_jax.evaluation.suites.loss import loss_cells
from atma_jax.evaluation.suites.needle import needle_cells
from atma_jax.evaluation.suites.retention import retention_cells, retention_table
from atma_jax.evaluation.suites.retrieval import retrieval_cells
from atma_jax.models.retention_cap import capped_heads, with_retention_cap
from atma_jax.progress import progress_bar
from atma_jax.sharding import make_mesh

SUITES = {"loss": loss_cells, "needle": needle_cells, "retrieval": retrieval_cells, "bpb": bits_per_byte_cells,
          "babilong": babilong_cells, "retention": retention_cells, "diagnostics": diagnostics_cells}
COLUMNS = ("document_loss", "stream_loss", "bits_per_byte", "needle_accuracy", "needle_exact", "needle_loss", "absent_accuracy",
           "retrieval_accuracy", "retrieval_exact", "babilong_exact")  # of tables


def evaluate(checkpoint: str, output: str, options: Options, babilong: BabilongOptions | None = None) -> list[dict[str, Any]]:
  """Runs the suites and returns their records, one a number.

  Appends to ``OUTPUT/results.jsonl`` after every cell; a cell already recorded for this step and these settings is not run
  again. One that runs out of memory is recorded with status "out_of_memory" and no value, and tried again only on other
  hardware or with other limits. Prints a table and writes PNG plots beside the results.

  Raises:
    UserError: an unknown suite, no good checkpoint, data missing or too short.
  """
  for name in options.suite:
    if name not in SUITES:
      raise UserError(unknown_name("--suite", name, SUITES))
  try:
    mesh = make_mesh(context=options.context)
  except ValueError as error:
    raise UserError(f"--context={options.context}: {error}") from error
  config, model, tokenizer, step = load_model(checkpoint, options.step, mesh, ema=options.ema,
                                              null_length=options.null_length, count_length=options.count_length)
  model = model if options.keep_window else overridden(model, {"window": None})
  directory = pathlib.Path(options.data or config.data.directory)
  if not (directory / "manifest.json").is_file():
    raise UserError(f"--data={directory}: holds no prepared data (manifest.json); name the directory the model was trained on")
  limit = None if options.memory_gib is None else int(options.memory_gib * 2**30)
  scorer = Scorer(model, mesh, cap=config.model.logit_cap, batch_tokens=options.batch_tokens, chunk=options.chunk,
                  prefill_chunk=options.prefill_chunk, memory_bytes=limit)
  length = config.data.sequence_length
  lengths = tuple(sorted({m * length for m in options.multiples}))
  documents = [document[1:] for document in heldout_documents(directory)[:options.max_documents]]
  inputs = Inputs(scorer, tokenizer, documents, validation_stream(directory), lengths, options.trials, options.seed,
                  options.min_documents, options.stream_windows, config, model, mesh,
                  tuple(depth / 100 for depth in options.depths), options.bpb_span, babilong)
  with distributed.agreed():
    results = ResultsFile(pathlib.Path(output) / "results.jsonl")
  common = {"checkpoint": str(pathlib.Path(checkpoint).absolute()), "step": step, "name": config.name}
  if options.ema:
    common["ema"] = True
  common |= in_effect(model.config)
  extra = {"training_length": length, "config": config.to_dict(), "jax": jax.__version__, "code": code_version(),
           "hardware": hardware(), "limits": {"batch_tokens": options.batch_tokens, "chunk": options.chunk,
                                              "prefill_chunk": options.prefill_chunk, "memory_gib": options.memory_gib}}
  found = []
  for cap in options.caps():
    settings, capped = {}, inputs
    if cap is not None:
      heads = cap.heads if cap.heads == "all" else ",".join(f"{layer}:{head}" for layer, head in capped_heads(model, cap))
      settings = {"retention_cap": {"tokens": cap.tokens, "heads": heads}}  # of "worst", the head it stands for
      capped = dataclasses.replace(inputs, model=with_retention_cap(model, cap))
      capped = dataclasses.replace(capped, scorer=scorer.of(capped.model))
    cells = []
    for suite in options.suite:
      built = SUITES[suite](dataclasses.replace(capped, trials=options.retrieval_trials) if suite == "retrieval" else capped)
      cells += [(suite, dataclasses.replace(cell, settings=cell.settings | settings)) for cell in built]
    found.append((str(cap or "none"), run_cells(cells, results, common, extra, capped.scorer)))
    if jax.process_index() == 0:
      print(tables(found[-1][1], length, "" if cap is None else f"retention cap {cap.tokens:g} tokens on {heads}"))
  if jax.process_index() == 0:
    if len(found) > 1:
      print("\n" + sweep_table(found))
    _plot(found[0][1], pathlib.Path(output), f"{config.name}, step {step}", length)
  return [record for _, records in found for record in records]


def run_cells(cells: Sequence[tuple[str, Cell]], results: ResultsFile, common: dict[str, Any], extra: dict[str, Any],
              scorer: Scorer) -> list[dict[str, Any]]:
  """The records of all cells, those found in the file and those measured now, each cell appended as soon as it is done."""
  records = []
  with progress_bar(sum(cell.tokens for _, cell in cells), "tok", enabled=jax.process_index() == 0) as bar:
    for suite, cell in cells:
      identity = {**common, "suite": suite, "settings": cell.settings}
      found = [results.find(identity, *number) for number in cell.expected]
      bar.set_description(cell.label)
      known = all(record is not None and _is_final(record, extra) for record in found)
      if distributed.from_first(str(known)) == "True":  # only process 0 knows the file
        records += filter(None, found)
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
      gc.collect()  # what a failed cell held
      seconds = max(time.perf_counter() - started - (scorer.compile_seconds - compiled), 1e-9)
      rate = {"tokens_per_second": round(cell.tokens / seconds, 1)} if measured[0]["status"] == "ok" else {}
      results.append([{**identity, **m, **extra, "seconds": round(seconds, 3), **rate,
                       "program_gib": round(scorer.largest_program / 2**30, 3)} for m in measured])
      records += results.records[-len(measured):]
  return records


def _is_final(record: dict[str, Any], extra: dict[str, Any]) -> bool:
  """Whether measuring again would do the same; records older than `status` have values."""
  if record.get("status", "ok") == "ok":
    return True
  return record["hardware"] == extra["hardware"] and record["limits"] == extra["limits"]


def tables(records: Sequence[dict[str, Any]], training_length: int, title: str = "") -> str:
  """The tables of the suites that were run."""
  measures = {record["measure"] for record in records}
  parts = [title] if title else []
  if measures & set(COLUMNS):
    parts.append(table(records, training_length))
  if any(measure.startswith("half_life") for measure in measures):
    parts.append(retention_table(records))
  if any(measure.startswith("residual") for measure in measures):
    parts.append(diagnostics_table(records))
  return "\n\n".join(parts)


def sweep_table(results: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str:
  """A block a measure: one line a length, one column a retention cap; means, as in `table`."""
  lines = []
  for measure in COLUMNS:
    values: dict[tuple[str, int], list[float | None]] = {}
    failed = set()
    for name, records in results:
      for record in records:
        if record["measure"] == measure:
          values.setdefault((name, record["length"]), []).append(record["value"])
          if record.get("status", "ok") == "out_of_memory":
            failed.add((name, record["length"]))
    if values:
      lines.append("  ".join([f"{measure:>18}", *(f"{f'cap {name}':>16}" for name, _ in results)]))
      for length in sorted({length for _, length in values}):
        lines.append("  ".join([f"{length:>18}", *(f"{_mean(values.get((name, length), []), (name, length) in failed):>16}"
                                                     for name, _ in results)]))
  return "\n".join(lines)


def _mean(values: Sequence[float | None], out_of_memory: bool) -> str:
  if None in values:
    return "no memory" if out_of_memory else "not finite"
  return f"{sum(values) / len(values):.4f}" if values else ""


def table(records: Sequence[dict[str, Any]], training_length: int) -> str:
  """One line a length, one column a measure; the retrieval grid as means over its depths and haystacks."""
  columns = [m for m in COLUMNS if any(r["measure"] == m for r in records)]
  values: dict[tuple[str, int], list[float | None]] = {}
  failed = {(r["measure"], r["length"]) for r in records if r.get("status", "ok") == "out_of_memory"}
  for record in records:
    values.setdefault((record["measure"], record["length"]), []).append(record["value"])
  lines = ["  ".join(["  length", "     x", *(f"{c:>18}" for c in columns)])]
  for length in sorted({length for measure, length in values if measure in columns}):
    cells = [_mean(values.get((column, length), []), (column, length) in failed) for column in columns]
    lines.append("  ".join([f"{length:>8}", f"{length / training_length:>6g}", *(f"{c:>18}" for c in cells)]))
  return "\n".join(lines)


def _plot(records: Sequence[dict[str, Any]], folder: pathlib.Path, title: str, length: int) -> None:
  def of(measure: str) -> list[dict[str, Any]]:
    return [r for r in records if r["measure"] == measure and r.get("status", "ok") == "ok"]

  written = []
  if of("document_loss"):
    plots.plot_loss_vs_length(folder / "loss_vs_length.png", title, length, document=of("document_loss"),
                              stream=of("stream_loss"))
    plots.plot_loss_by_position(folder / "loss_by_position.png", title, length, curve=of("position_loss")[-1])
    written += ["loss_vs_length.png", "loss_by_position.png"]
  if of("needle_accuracy"):
    plots.plot_needle_vs_distance(folder / "needle_vs_distance.png", title, length, accuracy=of("needle_accuracy"),
                                  exact=of("needle_exact"), absent=of("absent_accuracy"))
    written += ["needle_vs_distance.png"]
  logging.info("results: %s; plots: %s", folder / "results.jsonl", ", ".join(written) or "none")

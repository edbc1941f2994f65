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
import tqdm

from atma_jax import distributed
from atma_jax.config import UserError, unknown_name
from atma_jax.data.pipeline import heldout_documents, validation_stream
from atma_jax.evaluation import plots
from atma_jax.evaluation.babilong import babilong_cells
from atma_jax.evaluation.bits_per_byte import bits_per_byte_cells
from atma_jax.evaluation.cells import Cell, Inputs
from atma_jax.evaluation.losses import loss_cells
from atma_jax.evaluation.needle import needle_cells
from atma_jax.evaluation.options import BabilongOptions, Options
from atma_jax.evaluation.records import ResultsFile
from atma_jax.evaluation.resources import OutOfMemory, code_version, hardware
from atma_jax.evaluation.retrieval import retrieval_cells
from atma_jax.evaluation.scoring import Scorer
from atma_jax.models import Atma
from atma_jax.sharding import make_mesh
from atma_jax.training.checkpointing import load_model
from atma_jax.training.state import ModelDefinition, params_of

SUITES = {"loss": loss_cells, "needle": needle_cells, "retrieval": retrieval_cells, "bpb": bits_per_byte_cells,
          "babilong": babilong_cells}


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
  config, model, tokenizer, step = load_model(checkpoint, options.step, mesh, ema=options.ema)
  model = model if options.keep_window else at_full_context(model)
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
  if model.config.window is not None:
    common["window"] = model.config.window
  extra = {"training_length": length, "config": config.to_dict(), "jax": jax.__version__, "code": code_version(),
           "hardware": hardware(), "limits": {"batch_tokens": options.batch_tokens, "chunk": options.chunk,
                                              "prefill_chunk": options.prefill_chunk, "memory_gib": options.memory_gib}}
  cells = []
  for suite in options.suite:
    built = SUITES[suite](dataclasses.replace(inputs, trials=options.retrieval_trials) if suite == "retrieval" else inputs)
    cells += [(suite, cell) for cell in built]
  records = run_cells(cells, results, common, extra, scorer)
  if jax.process_index() == 0:
    print(table(records, length))
    _plot(records, pathlib.Path(output), f"{config.name}, step {step}", length)
  return records


def at_full_context(model: Atma) -> Atma:
  """The same parameters without an attention window, which is a matter of training."""
  if model.config.window is None:
    return model
  return ModelDefinition(dataclasses.replace(model.config, window=None)).merge(params_of(model))


def run_cells(cells: Sequence[tuple[str, Cell]], results: ResultsFile, common: dict[str, Any], extra: dict[str, Any],
              scorer: Scorer) -> list[dict[str, Any]]:
  """The records of all cells, those found in the file and those measured now, each cell appended as soon as it is done."""
  records = []
  with tqdm.tqdm(total=sum(cell.tokens for _, cell in cells), unit="tok", unit_scale=True, mininterval=1,
                 disable=jax.process_index() > 0) as bar:
    for suite, cell in cells:
      identity = {**common, "suite": suite, "settings": cell.settings}
      found = [results.find(identity, *where) for where in cell.expected]
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
        measured = [{**dict(zip(("measure", "length", "layer", "head"), where)), "value": None, "n": 0,
                     "status": "out_of_memory", "reason": str(error)} for where in cell.expected]
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


def table(records: Sequence[dict[str, Any]], training_length: int) -> str:
  """One line a length, one column a measure; the retrieval grid as means over its depths and haystacks."""
  columns = [m for m in ("document_loss", "stream_loss", "bits_per_byte", "needle_accuracy", "needle_exact", "needle_loss",
                         "absent_accuracy", "retrieval_accuracy", "retrieval_exact", "babilong_exact")
             if any(r["measure"] == m for r in records)]
  values: dict[tuple[str, int], list[float | None]] = {}
  failed = {(r["measure"], r["length"]) for r in records if r.get("status", "ok") == "out_of_memory"}
  for record in records:
    values.setdefault((record["measure"], record["length"]), []).append(record["value"])
  lines = ["  ".join(["  length", "     x", *(f"{c:>18}" for c in columns)])]
  for length in sorted({length for measure, length in values if measure in columns}):
    cells = []
    for column in columns:
      found = values.get((column, length), [])
      missing = "no memory" if (column, length) in failed else "not finite" if found else ""
      cells.append(missing if not found or None in found else f"{sum(found) / len(found):.4f}")
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
